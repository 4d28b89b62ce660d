"""No teacher at all: only the labels teach. The floor that every accuracy is held against."""

import torch
from torch import nn

from mlflow_kdguard.config import DistillSection
from mlflow_kdguard.distill.look import Term


def none(
    config: DistillSection,
    *,
    student: nn.Module,
    reference: nn.Module,
    features_from: nn.Module,
    shape: tuple[int, int, int],
) -> Term:
    """Nothing from the reference: the loss is label_weight · CE on the labelled images alone."""
    return Term(lambda look: torch.zeros((), device=look.batch.x.device))
