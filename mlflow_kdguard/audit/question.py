"""What a detector is asked, and what it answers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from mlflow_kdguard.config import AuditSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.records import Finding, Progress
from mlflow_kdguard.triggers import Trigger

Recovered = tuple[Trigger, int]
"""A trigger found by a detector, and the class that it leads to."""


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """Clean labelled images and settings; `folder` keeps what a killed audit goes on from."""

    data: Dataset
    config: AuditSection
    seed: int
    device: torch.device
    progress: Progress
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A finding, what it recovered, and whether the verdict waits for its p-value."""

    finding: Finding
    recovered: tuple[Recovered, ...] = field(default_factory=tuple)
    decides: bool = True


Detector = Callable[[nn.Module, Question], Answer]
"""A row of the detector table."""
