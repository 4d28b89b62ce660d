"""What a rule looks at, and what it answers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from mlflow_kdguard import intervals
from mlflow_kdguard.policy import Policy
from mlflow_kdguard.records import Certificate, Figures, Model, Signatory, Source

STUDENT = "model.onnx"
"""The file of the bundle that is the student."""

WAIVED = "Waived: the policy writes null."


@dataclass(frozen=True, slots=True)
class Case:
    """A certificate before the gate, with everything that the caller grants."""

    certificate: Certificate
    policy: Policy
    signers: tuple[Signatory, ...]
    now: datetime
    pins: frozenset[str]
    panel: tuple[str, ...]
    allow_unpinned: bool
    nonce: str

    @property
    def figures(self) -> Figures:
        """The certificate's figures."""
        return self.certificate.figures

    @property
    def student(self) -> str | None:
        """SHA-256 of the student: the one subject that is called `model.onnx`."""
        found = [s.sha256 for s in self.certificate.subjects if s.path == STUDENT]
        return found[0] if len(found) == 1 else None

    @property
    def confidence(self) -> float:
        """Confidence of each bound at this attempt.

        The error of attempt m is 5 % · 6 / (π² m²). Since Σ 1/m² = π²/6, all attempts together err
        with at most 5 %: trying again until a borderline model passes does not pay.
        """
        return self.together(1)

    def together(self, questions: int) -> float:
        """Confidence at this attempt of each of several bounds, so that all of them hold."""
        attempt = self.certificate.attempt
        error = (1.0 - intervals.CONFIDENCE) * 6.0 / (math.pi * attempt) ** 2
        return intervals.bonferroni(1.0 - error, questions)

    def unpinned(self, source: Source) -> bool:
        """Whether nobody vouches for a data set."""
        allowed = self.allow_unpinned or self.policy.data.allow_unpinned
        return not allowed and source.sha256 not in self.pins


@dataclass(frozen=True, slots=True)
class Verdict:
    """A rule's answer: it holds exactly where there are no problems."""

    limit: Any
    figure: Any
    problems: tuple[str, ...]
    fine: str

    @property
    def why(self) -> str:
        """Every problem with its numbers, or what was found to hold."""
        return "; ".join(self.problems) + "." if self.problems else self.fine


def verdict(limit: Any, figure: Any, problems: Iterable[str | None], fine: str) -> Verdict:
    """A verdict from checks that each return a problem or None."""
    return Verdict(limit, plain(figure), tuple(p for p in problems if p), fine)


def waived(figure: Any = None) -> Verdict:
    """A rule that the policy does not ask for."""
    return Verdict(None, plain(figure), (), WAIVED)


def absent(limit: Any, what: str) -> Verdict:
    """A rule whose figure the certificate does not have."""
    return Verdict(limit, None, (f"the certificate has no {what}",), "")


def another(what: str, model: Model | None, wanted: str | None) -> str | None:
    """The problem with a figure that was taken on another model than the certificate's own."""
    found = None if model is None else model.sha256
    if found is not None and found == wanted:
        return None
    return f"{what} {abbreviated(found)}, not {abbreviated(wanted)}"


def at_most(figure: float, limit: float) -> bool:
    """Whether a figure is within its limit; NaN is not."""
    return figure <= limit


def shown(figure: float, limit: float | None = None) -> str:
    """A number with as many digits as it takes to see on which side of its limit it lies."""
    for digits in range(3, 12):
        text = f"{figure:.{digits}f}"
        if limit is None or figure == limit or text != f"{limit:.{digits}f}":
            return text
    return repr(figure)


def plain(value: Any) -> Any:
    """A value that JSON can hold: a number that is not finite becomes its name."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def abbreviated(digest: str | None) -> str:
    """A digest short enough to read."""
    return "none" if digest is None else f"{digest[:12]}…"
