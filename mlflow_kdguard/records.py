"""Frozen values that stages hand on: numbers and strings, never tensors.

Every record is a strict pydantic model: unknown keys, NaN and infinity are errors wherever a
document is read back. `document()` is the JSON that the command line prints and that is stored.
"""

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mlflow_kdguard import intervals

Progress = Callable[[str, int, int, Mapping[str, float]], None]
"""Called by long work: (what, done, total, figures so far)."""

Sha256 = str


def silent(_what: str, _done: int, _total: int, _figures: Mapping[str, float]) -> None:
    """The progress listener that does nothing."""


class Record(BaseModel):
    """Base of every record: frozen, closed to unknown keys, finite."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True
    )

    def document(self) -> dict[str, Any]:
        """The record as a JSON value, with the published key names."""
        return self.model_dump(mode="json", by_alias=True)


class Rate(Record):
    """k of n, read through its bounds."""

    k: int = Field(ge=0)
    n: int = Field(ge=0)

    @model_validator(mode="after")
    def _k_among_n(self) -> "Rate":
        if self.k > self.n:
            raise ValueError(f"k={self.k} exceeds n={self.n}")
        return self

    @property
    def rate(self) -> float:
        """k / n, and 0 where nothing was asked."""
        return self.k / self.n if self.n else 0.0

    def lower(self, confidence: float = intervals.CONFIDENCE) -> float:
        """One-sided Clopper–Pearson lower bound."""
        return intervals.lower(self.k, self.n, confidence)

    def upper(self, confidence: float = intervals.CONFIDENCE) -> float:
        """One-sided Clopper–Pearson upper bound."""
        return intervals.upper(self.k, self.n, confidence)


class Source(Record):
    """Data that a figure was taken on."""

    uri: str
    sha256: Sha256


class Model(Record):
    """A model file, by its bytes."""

    sha256: Sha256


# ── measure ─────────────────────────────────────────────────────────────────────────────────────


class Paired(Record):
    """Teacher and student on the same images: how often each was right."""

    both: int = Field(ge=0)
    only_teacher: int = Field(ge=0)
    only_student: int = Field(ge=0)
    neither: int = Field(ge=0)

    @property
    def n(self) -> int:
        """Number of images."""
        return self.both + self.only_teacher + self.only_student + self.neither

    def drop_upper(self, confidence: float = intervals.CONFIDENCE) -> float:
        """Upper bound of accuracy(teacher) - accuracy(student)."""
        return intervals.paired_difference_upper(
            self.both, self.only_teacher, self.only_student, self.neither, confidence
        )


class Asr(Record):
    """Attack success rate of one trigger: images of other classes sent to `target`.

    `changed` counts the images whose pixels the trigger alters by more than half a grey level;
    a trigger that changes nothing measures nothing. `baseline` is the same trigger on a declared
    comparator (the student of a clean teacher, or the previous certified student).
    """

    trigger: Sha256
    name: str
    target: int = Field(ge=0)
    source: Literal["supplied", "recovered"]
    k: int = Field(ge=0)
    n: int = Field(ge=0)
    changed: Rate
    confidence: float = Field(gt=0, lt=1)
    baseline: Rate | None = None

    @property
    def rate(self) -> float:
        """The attack success rate."""
        return self.k / self.n if self.n else 0.0

    @property
    def upper(self) -> float:
        """Its one-sided Clopper–Pearson upper bound at `confidence` (1 if nothing was asked)."""
        return intervals.upper(self.k, self.n, self.confidence)

    @property
    def lift(self) -> float | None:
        """Rate above the declared baseline, if one is declared."""
        return None if self.baseline is None else self.rate - self.baseline.rate

    def document(self) -> dict[str, Any]:
        return super().document() | {"rate": self.rate, "upper": self.upper, "lift": self.lift}


class ReferenceGap(Record):
    """How far the reference moved from the original teacher, on clean images.

    `gap_mean` is the mean over `n` images of max_k |R_k(x) - P_k(x)| (softmax outputs);
    `student_gap_max` the largest difference between reference and student on the same images.
    """

    gap_mean: float = Field(ge=0)
    student_gap_max: float = Field(ge=0)
    n: int = Field(ge=0)


class Measurement(Record):
    """What onnxruntime answers on the bytes that ship (`kdguard.measure/1`)."""

    schema_: Literal["kdguard.measure/1"] = Field("kdguard.measure/1", alias="schema")
    model: Model
    data: Source
    provider: str
    accuracy: Rate
    asr: tuple[Asr, ...] = ()
    teacher: Model | None = None
    paired: Paired | None = None
    reference: ReferenceGap | None = None

    def document(self) -> dict[str, Any]:
        body = super().document()
        body["accuracy"]["rate"] = self.accuracy.rate
        body["asr"] = [figure.document() for figure in self.asr]
        return body


# ── audit ───────────────────────────────────────────────────────────────────────────────────────


class Finding(Record):
    """One detector's answer. `p_value` is None where it was not calibrated."""

    name: str
    score: float
    p_value: float | None = Field(None, ge=0, le=1)
    target: int | None = None
    flagged: bool = False
    seconds: float = Field(0.0, ge=0)
    details: dict[str, Any] = Field(default_factory=dict)


class AuditReport(Record):
    """Findings and a verdict (`kdguard.audit/1`)."""

    schema_: Literal["kdguard.audit/1"] = Field("kdguard.audit/1", alias="schema")
    model: Model
    data: Source
    detectors: tuple[Finding, ...]
    verdict: Literal["clean", "suspect", "undecided"]
    target: int | None = None
    asr: tuple[Asr, ...] = ()

    def document(self) -> dict[str, Any]:
        return super().document() | {"asr": [figure.document() for figure in self.asr]}


# ── export ──────────────────────────────────────────────────────────────────────────────────────


class Parity(Record):
    """Exported graph against the trained network: max |Δ softmax| and equal argmax."""

    softmax_max: float = Field(ge=0)
    argmax: Rate
    provider: str


class Exported(Record):
    """An exported network."""

    path: str
    sha256: Sha256
    parity: Parity


# ── certify ─────────────────────────────────────────────────────────────────────────────────────


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


# ── gate ────────────────────────────────────────────────────────────────────────────────────────


class RuleResult(Record):
    """One rule of the policy: its limit, the certificate's figure, and why."""

    rule: str
    limit: Any
    figure: Any
    ok: bool
    why: str


class Decision(Record):
    """The gate's answer, with every rule (`kdguard.gate/1`)."""

    schema_: Literal["kdguard.gate/1"] = Field("kdguard.gate/1", alias="schema")
    decision: Literal["pass", "refuse"]
    rules: tuple[RuleResult, ...]

    @property
    def passed(self) -> bool:
        """Whether promotion is allowed."""
        return self.decision == "pass"

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the rules that refused."""
        return tuple(result.rule for result in self.rules if not result.ok)


# ── certificate ─────────────────────────────────────────────────────────────────────────────────


class Subject(Record):
    """A file that the certificate speaks of, by its path in the bundle and its bytes."""

    path: str
    sha256: Sha256


class FaithfulFigure(Record):
    """Share of drawn images on which gap <= delta is PROVED, and what it was asked of."""

    method: Literal["certified", "smoothed"]
    norm: Literal["linf", "l2"]
    eps: float = Field(gt=0)
    delta: float = Field(gt=0)
    classes: Literal["all", "top"]
    within: Rate
    lower_mean: float = Field(ge=0)
    upper_mean: float = Field(ge=0)
    selection: str
    population: int = Field(ge=0)
    nonce: str
    indices: tuple[int, ...]
    data: Source
    control: Control


class AuditFigure(Record):
    """An audit's verdict about one model."""

    model: Model
    verdict: Literal["clean", "suspect", "undecided"]
    p_value: float | None = Field(None, ge=0, le=1)
    target: int | None = None


class Figures(Record):
    """Everything that the gate decides on. Absent figures are None or empty, never guessed."""

    accuracy: Rate | None = None
    paired: Paired | None = None
    measured_on: Source | None = None
    asr: tuple[Asr, ...] = ()
    reference: ReferenceGap | None = None
    faithful: tuple[FaithfulFigure, ...] = ()
    audit: dict[Literal["teacher", "student"], AuditFigure] = Field(default_factory=dict)
    export: Parity | None = None


class Certificate(Record):
    """The signed predicate (`kdguard.certificate/1`)."""

    schema_: Literal["kdguard.certificate/1"] = Field("kdguard.certificate/1", alias="schema")
    subjects: tuple[Subject, ...]
    model_name: str
    registry: str
    reference: Model
    teacher: Model
    data: tuple[Source, ...]
    triggers: tuple[Sha256, ...]
    figures: Figures
    figures_from: Literal["recomputed", "imported"]
    attempt: int = Field(1, ge=1)
    config: Sha256
    seed: int
    tools: dict[str, str]
    proofs: Model | None = None
    issued: str
    expires: str
