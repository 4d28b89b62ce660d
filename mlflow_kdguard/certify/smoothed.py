"""What was asked about a smoothed pair, what was drawn, and the report of it."""

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.certify.layers import Layers, Moments, hoeffding
from mlflow_kdguard.config import SmoothSection
from mlflow_kdguard.records import (
    Control,
    Model,
    Rate,
    SmoothPoint,
    SmoothReport,
    SmoothSample,
    Source,
    Status,
)

STEPS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""Radii of the report's curve, in multiples of the one that was asked for."""

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked: configuration, digests, and the indices that follow from them."""

    config: SmoothSection
    sigma: float
    reference: str
    student: str
    data: str
    uri: str
    population: int
    nonce: str
    entropy: str
    device: str
    indices: tuple[int, ...]
    began: float = field(default_factory=time.monotonic)

    @property
    def told(self) -> tuple[str, ...]:
        """What the noise follows from, beside the image's index."""
        deviation = self.sigma.hex()
        return (
            "smooth", self.reference, self.student, self.data, deviation, self.nonce, self.entropy
        )  # fmt: skip

    @property
    def shift(self) -> float:
        """The radius in deviations of the noise."""
        return self.config.radius / self.sigma


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """One image: what its draws came to. `top` is the reference's class without noise,
    `confidences` (K) are the reference's means under noise.
    """

    index: int
    label: int
    top: int
    confidences: Values
    gap_mean: float
    layers: Layers
    differences: Moments
    seconds: float

    def upper(self, shifts: "float | Values") -> "Values":
        """What the smoothed gap is at most at these distances (r/σ)."""
        found: Values = np.asarray(self.layers.upper(shifts))
        return found

    @property
    def lower(self) -> float:
        """What the smoothed gap is at least, at the image itself."""
        means = self.differences
        return float(np.maximum(0.0, np.abs(means.mean) - means.radius(self.layers.error)).max())

    @property
    def right(self) -> bool:
        """Whether the reference is right about the image, both without noise and in the mean."""
        return self.top == self.label == int(self.confidences.argmax())

    def proved(self, question: Question) -> bool:
        """Whether gap <= delta in the ball, on an image that the reference is right about."""
        return self.right and float(self.upper(question.shift)) <= question.config.delta

    def status(self, question: Question) -> Status:
        """What is known; PROVED and REFUTED are each wrong with the error at most."""
        if not self.right:
            return Status.MISCLASSIFIED
        if self.proved(question):
            return Status.PROVED
        return Status.REFUTED if self.lower > question.config.delta else Status.UNDECIDED


def report(question: Question, judged: list[Judged]) -> SmoothReport:
    """The report over all drawn images; what was not judged has the bound 1."""
    config = question.config
    rest = question.indices[len(judged) :]
    samples = tuple(_sample(item, question) for item in judged)
    samples += tuple(_absent(index) for index in rest)
    return SmoothReport(
        sigma=question.sigma,
        radius=config.radius,
        delta=config.delta,
        classes=config.classes,
        draws=config.draws,
        error=config.error,
        reference=Model(sha256=question.reference),
        student=Model(sha256=question.student),
        data=Source(uri=question.uri, sha256=question.data),
        population=question.population,
        selection="uniform-seeded",
        nonce=question.nonce,
        noise=question.entropy,
        device=question.device,
        complete=not rest,
        lower_mean=float(np.mean([sample.lower for sample in samples])),
        upper_mean=float(np.mean([sample.upper for sample in samples])),
        curve=tuple(_point(question, judged, step * config.radius) for step in STEPS),
        control=_control(question, judged),
        samples=samples,
        seconds=time.monotonic() - question.began,
    )


def _sample(item: Judged, question: Question) -> SmoothSample:
    return SmoothSample(
        index=item.index,
        label=item.label,
        reference_class=item.top,
        draws=item.layers.n,
        lower=item.lower,
        gap_mean=min(1.0, item.gap_mean),
        upper=float(item.upper(question.shift)),
        status=item.status(question),
        seconds=item.seconds,
    )


def _absent(index: int) -> SmoothSample:
    return SmoothSample(
        index=index, label=-1, reference_class=-1, draws=0, lower=0.0, gap_mean=0.0, upper=1.0,
        status=Status.UNDECIDED,
    )  # fmt: skip


def _point(question: Question, judged: list[Judged], radius: float) -> SmoothPoint:
    n = len(question.indices)
    bounds = np.ones(n)
    bounds[: len(judged)] = [float(item.upper(radius / question.sigma)) for item in judged]
    right = np.zeros(n, bool)
    right[: len(judged)] = [item.right for item in judged]
    within = int((right & (bounds <= question.config.delta)).sum())
    return SmoothPoint(radius=radius, upper_mean=float(bounds.mean()), within=Rate(k=within, n=n))


def _control(question: Question, judged: list[Judged]) -> Control:
    """The constant network that answers the smoothed reference's mean confidences.

    Its gap is what it is at least: the reference's means are known up to the draws. Images that
    were not judged count as if it were right about them.
    """
    n, config = len(question.indices), question.config
    gaps = np.zeros(n)
    if judged:
        confidences = np.stack([item.confidences for item in judged])
        found = np.abs(confidences - confidences.mean(0))
        if config.classes == "top":
            found = found[np.arange(len(judged)), [item.top for item in judged]][:, None]
        error = hoeffding(config.draws, confidences.shape[1], config.error)
        gaps[: len(judged)] = np.maximum(0.0, found.max(1) - error)
    within = Rate(k=int((gaps <= config.delta).sum()), n=n)
    return Control(gap_mean=float(gaps.mean()), within=within)
