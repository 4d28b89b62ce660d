"""What every record is made of: a frozen base, a rate, and things named by their digest."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from math import isclose
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, model_validator

from mlflow_kdguard import intervals

Progress = Callable[[str, int, int, Mapping[str, float]], None]
"""Called by long work: (what, done, total, figures so far)."""

Sha256 = str

Count = Annotated[int, Field(ge=0, le=1_000_000_000)]
"""How many: bounded, so that a made-up number in a certificate cannot overflow a bound."""


def format_time(moment: datetime) -> str:
    """A moment as certificates and keys write it: ISO 8601, UTC, whole seconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> datetime:
    """The moment that an ISO 8601 text names; ValueError where it names none or no time zone."""
    moment = datetime.fromisoformat(text)
    if moment.utcoffset() is None:
        raise ValueError(f"{text!r} has no time zone")
    return moment


def silent(_what: str, _done: int, _total: int, _figures: Mapping[str, float]) -> None:
    """The progress listener that does nothing."""


class Record(BaseModel):
    """Base of every record: frozen, closed to unknown keys, finite."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True
    )
    derived: ClassVar[tuple[str, ...]] = ()
    """Properties that documents print beside the fields that they follow from."""

    @model_validator(mode="wrap")
    @classmethod
    def _derived_follow(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not (cls.derived and isinstance(value, Mapping)):
            return handler(value)
        record = handler({key: value[key] for key in value if key not in cls.derived})
        for key in cls.derived:
            if key in value and not _agree(value[key], getattr(record, key)):
                raise ValueError(f"{key}={value[key]!r} does not follow from the counts")
        return record

    def document(self) -> dict[str, Any]:
        """The record as a JSON value, with the published key names."""
        return self.model_dump(mode="json", by_alias=True)


class Rate(Record):
    """k of n, read through its bounds."""

    derived = ("rate",)

    k: Count
    n: Count

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


def _agree(stated: Any, derived: float | None) -> bool:
    """Whether a printed figure is the derived one, to within another machine's rounding."""
    if derived is None or isinstance(stated, bool) or not isinstance(stated, int | float):
        return stated is None and derived is None
    return isclose(stated, derived, rel_tol=1e-9, abs_tol=1e-12)
