"""Fine-tuning on clean images: what every other defence is compared with."""

from mlflow_kdguard.detox.state import State, Work
from mlflow_kdguard.detox.tuning import Tuning, open_copy, options, plain, tuned

NAME = "fine_tune"
OPTIONS = {"steps": 300.0, "lr": 0.02}


def cleanse(state: State, work: Work) -> State:
    """Train the copy on the clean images."""
    return tuned(state, work, Tuning(NAME, open_copy(state, work), plain, options(work, OPTIONS)))
