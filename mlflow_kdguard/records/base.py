"""What every record is made of: a frozen base, a rate, and things named by their digest."""

from collections.abc import Callable, Mapping
from typing import Any

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
