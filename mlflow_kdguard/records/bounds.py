"""What the certifier reports: bounds on the confidence gap, sample by sample."""

from enum import StrEnum
from typing import Literal

from pydantic import Field, model_validator

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

    `lower` is a witness (a gap that an image in the ball attains, in float64), `bound` the
    verifier's own bound of the real functions, never clamped by the witness, and `float32_margin`
    what onnxruntime's rounding may add to it. `upper`, what the gate reads, is their sum (at most
    1): no gap that onnxruntime computes in the ball exceeds it. `stopped`: the limit at which its
    search was ended with something left to split; a bound found by then holds as any other does.
    """

    index: int
    label: int
    reference_class: int
    lower: float
    bound: float
    float32_margin: float = Field(ge=0)
    upper: float
    status: Status
    method: str
    nodes: int = 0
    seconds: float = 0.0
    stopped: Literal["nodes", "seconds", "memory", "interrupted"] | None = Field(
        None, exclude_if=lambda value: value is None
    )

    @model_validator(mode="after")
    def _upper_holds_the_margin(self) -> "CertifiedSample":
        if self.upper < min(1.0, self.bound + self.float32_margin):
            raise ValueError(f"upper={self.upper} leaves out the float32 margin")
        return self


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
    bound_mean: float
    float32_margin_mean: float
    upper_mean: float
    upper_p95: float
    upper_max: float
    seconds_mean: float
    share_within: dict[str, float]


class CertifyReport(Record):
    """Bounds on the confidence gap between reference and student (`kdguard.certify/1`).

    `proofs`: the index of the proofs, where they were kept. `interrupted`: somebody stopped the
    work; images that were not begun have the method "skipped" and upper 1, and no certificate is
    made of it.
    """

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
    proofs: Model | None = Field(None, exclude_if=lambda value: value is None)
    interrupted: bool = Field(False, exclude_if=lambda value: not value)
