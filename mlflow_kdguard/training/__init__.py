"""The one training loop: teachers, poisoning, unlearning and students all go through `fit`."""

from mlflow_kdguard.training.batches import derive
from mlflow_kdguard.training.checkpoint import state_sha256
from mlflow_kdguard.training.inference import accuracy, evaluating, predict
from mlflow_kdguard.training.loop import Fitted, fit
from mlflow_kdguard.training.run import Batch, Loss
from mlflow_kdguard.training.schedule import one_cycle, rate

__all__ = [
    "Batch",
    "Fitted",
    "Loss",
    "accuracy",
    "derive",
    "evaluating",
    "fit",
    "one_cycle",
    "predict",
    "rate",
    "state_sha256",
]
