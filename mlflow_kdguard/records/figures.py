"""What stages report: measurements, findings, export parity."""

from typing import Any, Literal

from pydantic import Field, model_validator

from mlflow_kdguard import intervals
from mlflow_kdguard.records.base import Count, Model, Rate, Record, Sha256, Source


class Paired(Record):
    """Teacher and student on the same images: how often each was right."""

    both: Count
    only_teacher: Count
    only_student: Count
    neither: Count

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

    derived = ("rate", "upper", "lift")

    trigger: Sha256
    name: str
    target: int = Field(ge=0)
    source: Literal["supplied", "recovered"]
    k: Count
    n: Count
    changed: Rate
    confidence: float = Field(gt=0, lt=1)
    baseline: Rate | None = None

    @model_validator(mode="after")
    def _k_among_n(self) -> "Asr":
        if self.k > self.n:
            raise ValueError(f"k={self.k} exceeds n={self.n}")
        return self

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
        return super().document() | {name: getattr(self, name) for name in self.derived}


class ReferenceGap(Record):
    """How far the reference moved from the original teacher, on clean images.

    `model` is the reference. `gap_mean` is the mean over `n` images of max_k |R_k(x) - P_k(x)|
    (softmax outputs); `student_gap_max` the largest difference between reference and student on
    the same images.
    """

    model: Model
    gap_mean: float = Field(ge=0)
    student_gap_max: float = Field(ge=0)
    n: Count


class Measurement(Record):
    """What onnxruntime answers on the bytes that ship (`kdguard.measure/1`).

    `teacher` is the model that `paired` and `reference` compare with, `baseline` the comparator
    that every trigger was tried on, too.
    """

    schema_: Literal["kdguard.measure/1"] = Field("kdguard.measure/1", alias="schema")
    model: Model
    data: Source
    provider: str
    accuracy: Rate
    asr: tuple[Asr, ...] = ()
    teacher: Model | None = None
    paired: Paired | None = None
    reference: ReferenceGap | None = None
    baseline: Model | None = None

    def document(self) -> dict[str, Any]:
        body = super().document()
        body["accuracy"]["rate"] = self.accuracy.rate
        body["asr"] = [figure.document() for figure in self.asr]
        return body


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


class Parity(Record):
    """Exported graph (`model`) against the trained network: max |Δ softmax| and equal argmax."""

    model: Model
    softmax_max: float = Field(ge=0)
    argmax: Rate
    provider: str


class Exported(Record):
    """An exported network."""

    path: str
    sha256: Sha256
    parity: Parity

    @model_validator(mode="after")
    def _one_file(self) -> "Exported":
        if self.parity.model.sha256 != self.sha256:
            raise ValueError("parity is that of another file")
        return self
