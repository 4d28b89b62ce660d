"""From bounds to the record: statuses, the null model, and the summary over all drawn images."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.certify.budget import Limit
from mlflow_kdguard.config import CertifySection
from mlflow_kdguard.files import sha256
from mlflow_kdguard.records import (
    CertifiedSample,
    CertifyReport,
    CertifySummary,
    Control,
    Model,
    Rate,
    Source,
    Status,
)

SKIPPED = "skipped"
"""Method of an image that was not bounded: `stopped` says why."""

SHARES = (0.05, 0.1, 0.2, 0.3)
"""Gaps that the summary gives shares for, beside delta."""


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked: configuration, digests, and the indices that follow from them."""

    config: CertifySection
    method: str
    reference: str
    student: str
    data: str
    uri: str
    population: int
    nonce: str
    device: str
    indices: tuple[int, ...]

    def seed(self, index: int) -> int:
        """Seed of the witness search that starts with image `index`."""
        text = "\x1f".join((self.reference, self.student, self.data, self.nonce, str(index)))
        return int(sha256(text.encode())[:15], 16)


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """One image: the reference's confidences (K) at it, and both bounds.

    `bound` speaks of the real functions, `float32_margin` of onnxruntime's rounding.
    """

    index: int
    label: int
    confidences: NDArray[np.float64]
    lower: float
    bound: float
    float32_margin: float
    method: str
    nodes: int
    seconds: float
    stopped: Limit | None = None

    @property
    def upper(self) -> float:
        """No gap that onnxruntime computes exceeds it; a sum that is not below 1 is 1."""
        total = math.nextafter(self.bound + self.float32_margin, math.inf)
        return min(1.0, total)  # Not a number: 1.

    @property
    def top(self) -> int:
        """The reference's class at the clean image."""
        return int(self.confidences.argmax())

    def status(self, delta: float) -> Status:
        """PROVED needs upper <= delta, REFUTED lower > delta, on an image the reference gets."""
        if self.top != self.label:
            return Status.MISCLASSIFIED
        if self.upper <= delta and self.method != SKIPPED:
            return Status.PROVED
        return Status.REFUTED if self.lower > delta else Status.UNDECIDED


def summarise(
    question: Question, judged: list[Judged], *, interrupted: bool = False
) -> CertifyReport:
    """The report over all drawn images."""
    config = question.config
    return CertifyReport(
        norm=config.norm,
        eps=config.eps,
        delta=config.delta,
        classes=config.classes,
        reference=Model(sha256=question.reference),
        student=Model(sha256=question.student),
        data=Source(uri=question.uri, sha256=question.data),
        population=question.population,
        selection="uniform-seeded",
        nonce=question.nonce,
        device=question.device,
        samples=tuple(_sample(item, config.delta) for item in judged),
        control=_control(judged, config),
        summary=_summary(judged, config.delta),
        interrupted=interrupted,
    )


def _sample(item: Judged, delta: float) -> CertifiedSample:
    return CertifiedSample(
        index=item.index,
        label=item.label,
        reference_class=item.top,
        lower=item.lower,
        bound=item.bound,
        float32_margin=item.float32_margin,
        upper=item.upper,
        status=item.status(delta),
        method=item.method,
        nodes=item.nodes,
        seconds=item.seconds,
        stopped=item.stopped,
    )


def _control(judged: list[Judged], config: CertifySection) -> Control:
    """The constant network that answers the reference's mean confidences, without perturbation."""
    confidences = np.stack([item.confidences for item in judged])
    gaps = np.abs(confidences - confidences.mean(0))
    if config.classes == "top":
        gaps = gaps[np.arange(len(gaps)), confidences.argmax(1)][:, None]
    worst = gaps.max(1)
    within = Rate(k=int((worst <= config.delta).sum()), n=len(worst))
    return Control(gap_mean=float(worst.mean()), within=within)


def _summary(judged: list[Judged], delta: float) -> CertifySummary:
    """Means over all drawn images. A share counts images that the reference gets right and whose
    upper bound lies within the limit: at delta it is the share of PROVED.
    """
    upper = np.array([item.upper for item in judged])
    right = np.array([item.top == item.label and item.method != SKIPPED for item in judged])
    return CertifySummary(
        n=len(judged),
        lower_mean=float(np.mean([item.lower for item in judged])),
        bound_mean=float(np.mean([item.bound for item in judged])),
        float32_margin_mean=float(np.mean([item.float32_margin for item in judged])),
        upper_mean=float(upper.mean()),
        upper_p95=float(np.quantile(upper, 0.95, method="higher")),
        upper_max=float(upper.max()),
        seconds_mean=float(np.mean([item.seconds for item in judged])),
        share_within={
            f"{limit:g}": float((right & (upper <= limit)).mean())
            for limit in sorted({*SHARES, delta})
        },
    )
