"""What a consumer of a registered model does: load it by its alias and ask it."""

from typing import Any

import mlflow
import mlflow.pyfunc
import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.config import RegistrySection


def predict(section: RegistrySection, uri: str, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits N×K of `images` (N×C×H×W) from `models:/…` through `mlflow.pyfunc.load_model`.

    MLflow's loader only knows the process-wide URIs, which are put back afterwards.
    """
    tracking, registry = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    try:
        if section.tracking_uri is not None:
            mlflow.set_tracking_uri(section.tracking_uri)
        if section.registry_uri is not None:
            mlflow.set_registry_uri(section.registry_uri)
        answers: Any = mlflow.pyfunc.load_model(uri).predict(images)
    finally:
        mlflow.set_tracking_uri(tracking)
        mlflow.set_registry_uri(registry)
    logits = next(iter(answers.values())) if isinstance(answers, dict) else answers
    return np.asarray(logits, np.float32)
