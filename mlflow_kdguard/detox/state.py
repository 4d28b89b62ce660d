"""What the rows of the detox table hand on to each other."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from mlflow_kdguard.config import DetoxSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.detox.record import Outcome, StepRecord
from mlflow_kdguard.records import Progress, Rate
from mlflow_kdguard.training import accuracy

Combine = Callable[[nn.Module], nn.Module]
"""From a detoxed copy to the reference that the rest of the chain makes of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What every row is told besides the state. `folder` None keeps nothing on disk."""

    config: DetoxSection
    seed: int
    device: torch.device
    folder: Path | None
    progress: Progress


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Raw teacher P (frozen), current copy D, current reference R, and how they came about.

    `preview` is what decides about clean accuracy: the reference that the chain would end with if
    D were final. `least` is the number of validation images that it must get right.
    """

    teacher: nn.Module
    copy: nn.Module
    reference: nn.Module
    train: Dataset
    validation: Dataset
    suspects: tuple[int, ...]
    least: int
    preview: Combine
    steps: tuple[StepRecord, ...] = ()
    layers: tuple[str, ...] = ()

    @property
    def place(self) -> int:
        """Position of the row that works on this state, from 1."""
        return len(self.steps) + 1

    def judge(self, reference: nn.Module, device: torch.device) -> Rate:
        """Clean validation accuracy."""
        return accuracy(reference, self.validation, device=device)

    def trained(
        self,
        copy: nn.Module,
        *,
        name: str,
        outcome: Outcome,
        kept_at: int,
        steps: int,
        device: torch.device,
        details: dict[str, object],
        layers: tuple[str, ...] = (),
    ) -> "State":
        """The state after a row that changed the copy; an undone row leaves the old copy."""
        copy = self.copy if outcome == "undone" else copy.eval().requires_grad_(False)
        record = StepRecord(
            name=name,
            outcome=outcome,
            kept_at=kept_at,
            steps=steps,
            detoxed=self.judge(copy, device),
            reference=self.judge(self.preview(copy), device),
            details=details,
        )
        return replace(
            self,
            copy=copy,
            reference=copy,
            steps=(*self.steps, record),
            layers=tuple(dict.fromkeys((*self.layers, *layers))),
        )
