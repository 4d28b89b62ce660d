"""What the terms of a distillation loss share: one look at a batch, computed on demand, once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlflow_kdguard.config import DistillSection
from mlflow_kdguard.data import UNLABELLED
from mlflow_kdguard.nets.taps import Taps
from mlflow_kdguard.training import Batch


class Look:
    """Student and reference on one batch; `tapped` names student layers whose output is kept."""

    def __init__(
        self, student: nn.Module, reference: nn.Module, batch: Batch, tapped: tuple[str, ...] = ()
    ) -> None:
        self.student = student
        self.reference = reference
        self.batch = batch
        self._taps = Taps(student, tapped)

    @cached_property
    def logits(self) -> Tensor:
        """The student's logits on the batch, N×K, in train mode and with gradients."""
        with self._taps:
            return as_float(self.student(self.batch.x))

    @cached_property
    def targets(self) -> Tensor:
        """The reference's logits on the batch, N×K, without gradients."""
        with torch.no_grad():
            return as_float(self.reference(self.batch.x))

    @cached_property
    def features(self) -> dict[str, Tensor]:
        """The student's tapped feature maps on the batch, by layer name."""
        assert self.logits is not None
        return self._taps.features

    @cached_property
    def labels(self) -> Tensor:
        """Cross-entropy on the labelled images, summed, over the size of the whole batch."""
        total = functional.cross_entropy(
            self.logits, self.batch.y, ignore_index=UNLABELLED, reduction="sum"
        )
        return total / len(self.batch.y)

    def with_labels(self, loss: Tensor, alpha: float) -> Tensor:
        """`loss` + (1-α)·CE(S(x), y); no label is read where α is 1."""
        return loss if alpha == 1 else loss + (1 - alpha) * self.labels

    def report_agreement(self, logits: Tensor, targets: Tensor) -> None:
        """Report how often student and reference name the same class."""
        same = logits.detach().argmax(1) == targets.argmax(1)
        self.batch.figures["agreement"] = same.double().mean()


@dataclass(frozen=True, slots=True)
class Term:
    """One row of the loss table, ready to be asked at every step.

    `along` is trained with the student and discarded (connectors); `taps` are student layers
    whose output the term reads from `Look.features`.
    """

    value: Callable[[Look], Tensor]
    along: nn.Module | None = None
    taps: tuple[str, ...] = ()


class Row(Protocol):
    """What a row of the loss table is: it makes the term for one student and one reference.

    `features_from` is the network whose feature maps are matched (the reference itself, unless
    the caller has a better one); `shape` is (C, H, W) of an image.
    """

    def __call__(
        self,
        config: DistillSection,
        *,
        student: nn.Module,
        reference: nn.Module,
        features_from: nn.Module,
        shape: tuple[int, int, int],
    ) -> Term: ...


def as_float(logits: object) -> Tensor:
    """Logits in float32, also where autocast computed them in less."""
    assert isinstance(logits, Tensor)
    return logits.float()
