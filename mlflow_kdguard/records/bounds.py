"""What the certifier reports: bounds on the confidence gap, sample by sample."""

from enum import StrEnum
from typing import Literal

from pydantic import Field

from mlflow_kdguard.records.base import Model, Rate, Record, Source


class Status(StrEnum):
    """What is known about gap <= delta on one image."""

    PROVED = "PROVED"
    REFUTED = "REFUTED"
    UNDECIDED = "UNDECIDED"
    MISCLASSIFIED = "MISCLASSIFIED"
    """The reference is wrong about the clean image: counted as a failure."""


class CertifiedSample(Record):
    """Bounds on the confidence gap around one image.

    `lower` is a witness (a gap that an image in the ball attains, in float64), `upper` the
    verifier's own bound, never clamped by the witness.
    """

    index: int
    label: int
    reference_class: int
    lower: float
    upper: float
    status: Status
    method: str
    nodes: int = 0
    seconds: float = 0.0


class Control(Record):
    """The constant network closest to the reference, on the same images: the null model.

    `within` counts images on which it lies within delta even without any perturbation.
    """

    gap_mean: float
    within: Rate


class CertifySummary(Record):
    """Means over all drawn images."""

    n: int
    lower_mean: float
    upper_mean: float
    upper_p95: float
    upper_max: float
    seconds_mean: float
    share_within: dict[str, float]


class CertifyReport(Record):
    """Bounds on the confidence gap between reference and student (`kdguard.certify/1`)."""

    schema_: Literal["kdguard.certify/1"] = Field("kdguard.certify/1", alias="schema")
    norm: Literal["linf", "l2"]
    eps: float
    delta: float
    classes: Literal["all", "top"]
    reference: Model
    student: Model
    data: Source
    population: int
    selection: str
    nonce: str
    device: str
    samples: tuple[CertifiedSample, ...]
    control: Control
    summary: CertifySummary
