"""`teach`: train a teacher of one's own, adversarially and, where asked for, verifiably."""

from pathlib import Path

import torch

from mlflow_kdguard.adversary.verifiable import verifiable
from mlflow_kdguard.config import TeachSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.errors import DataError
from mlflow_kdguard.nets import zoo
from mlflow_kdguard.nets.architecture import Architecture
from mlflow_kdguard.records import Progress, silent
from mlflow_kdguard.training import Fitted, fit

__all__ = ["check_labels", "teach"]


def teach(
    architecture: Architecture,
    data: Dataset,
    *,
    config: TeachSection,
    seed: int,
    device: torch.device,
    checkpoint: Path | None = None,
    progress: Progress = silent,
    trust_code: bool = False,
) -> tuple[torch.nn.Module, Fitted]:
    """A new network, trained on labelled `data` under `adversary.verifiable`; and how it ended.

    Resumes from `checkpoint` as `training.fit` does. Raises DataError for images without labels,
    ModelError where the network's functions have no interval bounds, and what `fit` raises.
    """
    check_labels(data)
    net = zoo.build(architecture, seed=seed, trust_code=trust_code)
    fitted = fit(
        net,
        data,
        verifiable(config),
        config,
        seed=seed,
        device=device,
        what="teacher",
        checkpoint=checkpoint,
        progress=progress,
    )
    return net, fitted


def check_labels(data: Dataset) -> None:
    """DataError where an image has no label."""
    if not len(data) or data.y.min() < 0:
        raise DataError(f"{data.uri} has images without labels.", remedy="Train on labelled ones.")
