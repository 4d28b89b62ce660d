"""What the gate reads and answers: the certificate, its figures, and the decision."""

from typing import Any, Literal

from pydantic import Field, model_validator

from mlflow_kdguard import intervals
from mlflow_kdguard.records.base import Count, Model, Rate, Record, Sha256, Source
from mlflow_kdguard.records.bounds import Control
from mlflow_kdguard.records.figures import Asr, Paired, Parity, ReferenceGap
from mlflow_kdguard.records.patch import PatchFigure


class Subject(Record):
    """A file that the certificate speaks of, by its path in the bundle and its bytes."""

    path: str
    sha256: Sha256


class FaithfulFigure(Record):
    """Share of drawn images on which gap <= delta is PROVED, and what it was asked of.

    The gap is the one between `reference` and `student`. `eps` is the radius of the ball. Of
    smoothed networks, `sigma` is the noise, and `error` the probability that one image is PROVED
    and should not be; both are None for others (`error` is not written there: so it was when
    older certificates were signed).
    """

    reference: Model
    student: Model
    method: Literal["certified", "smoothed"]
    norm: Literal["linf", "l2"]
    eps: float = Field(gt=0)
    delta: float = Field(gt=0)
    classes: Literal["all", "top"]
    within: Rate
    lower_mean: float = Field(ge=0)
    upper_mean: float = Field(ge=0)
    selection: str
    population: Count
    nonce: str
    indices: tuple[int, ...]
    data: Source
    control: Control
    sigma: float | None = Field(None, gt=0)
    error: float | None = Field(None, gt=0, lt=1, exclude_if=lambda value: value is None)

    def share_lower(self, confidence: float) -> float:
        """The population's share within delta, at least: by drawn images, and by drawn noise."""
        return intervals.claimed_lower(self.within.k, self.within.n, self.error or 0.0, confidence)

    def control_upper(self, confidence: float) -> float:
        """And the share of a constant network, at most."""
        within = self.control.within
        return intervals.missed_upper(within.k, within.n, self.error or 0.0, confidence)


class AuditFigure(Record):
    """An audit's verdict about one model."""

    model: Model
    verdict: Literal["clean", "suspect", "undecided"]
    p_value: float | None = Field(None, ge=0, le=1)
    target: int | None = None


class Figures(Record):
    """Everything that the gate decides on. Absent figures are None or empty, never guessed.

    `student` is the model that everything was measured on, `teacher` the one that `paired` and
    `reference` compare with (the original teacher), `baseline` the one that each trigger's
    baseline was taken on. Where there is no `patch`, nothing is written: so it was when older
    certificates were signed.
    """

    student: Model | None = None
    accuracy: Rate | None = None
    teacher: Model | None = None
    baseline: Model | None = None
    paired: Paired | None = None
    measured_on: Source | None = None
    asr: tuple[Asr, ...] = ()
    reference: ReferenceGap | None = None
    faithful: tuple[FaithfulFigure, ...] = ()
    patch: tuple[PatchFigure, ...] = Field((), exclude_if=lambda value: not value)
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
    attempt: int = Field(1, ge=1, le=10_000)
    config: Sha256
    seed: int
    tools: dict[str, str]
    proofs: Model | None = None
    issued: str
    expires: str


class Signatory(Record):
    """Who signed: a key (SHA-256 of its DER public key), its owner and its role."""

    key: Sha256
    owner: str
    role: Literal["builder", "verifier"]


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

    @model_validator(mode="after")
    def _a_pass_is_earned(self) -> "Decision":
        if self.passed and (not self.rules or self.failed):
            raise ValueError("a pass needs rules, and every one of them met")
        return self

    @property
    def passed(self) -> bool:
        """Whether promotion is allowed."""
        return self.decision == "pass"

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the rules that refused."""
        return tuple(result.rule for result in self.rules if not result.ok)
