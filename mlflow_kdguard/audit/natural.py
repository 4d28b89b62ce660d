"""How easily clean networks of one architecture are sent to each class."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from pydantic import Field
from torch import nn

from mlflow_kdguard.audit import calibration
from mlflow_kdguard.audit.question import Question
from mlflow_kdguard.config import AuditSection
from mlflow_kdguard.nets.architecture import Architecture

Profile = tuple[tuple[float, ...], ...]
"""Log-odds of the rates, looks × classes: universal inversion at each radius, then, where it is
asked for, a perturbation for each image."""


class Natural(calibration.Origin):
    """Profiles of clean networks (`kdguard.natural/1`): networks × looks × classes, log-odds."""

    schema_: Literal["kdguard.natural/1"] = Field("kdguard.natural/1", alias="schema")
    radii: tuple[float, ...] = Field(min_length=1)
    own_radius: float | None = None
    profiles: tuple[Profile, ...] = Field(min_length=1)

    def means(self, place: int) -> tuple[float, ...]:
        """Class by class at one of the looks, over the networks."""
        each = [profile[place] for profile in self.profiles]
        return tuple(fmean(values) for values in zip(*each, strict=True))

    def settings(self, config: AuditSection) -> dict[str, tuple[Any, Any]]:
        own = {
            "radii": (self.radii, config.radii),
            "own radius": (self.own_radius, config.own_radius),
        }
        return own | super().settings(config)


@dataclass(frozen=True, slots=True)
class Known:
    """What nature is like, or why nobody knows."""

    record: Natural | None
    why: str = ""

    def document(self) -> dict[str, Any]:
        """For the finding's details."""
        return {"why": self.why} if self.record is None else self.record.document()


def of(net: nn.Module, question: Question, take: Callable[[nn.Module], Profile]) -> Known:
    """Profiles of clean networks like `net`, from the file or from fresh shadow networks.

    Raises what `calibration.find` does.
    """

    def make(architecture: Architecture) -> Natural:
        profiles = calibration.of_shadows(architecture, question, take)
        return Natural(
            **calibration.origin(architecture, question),
            radii=question.config.radii,
            own_radius=question.config.own_radius,
            profiles=tuple(profiles),
        )

    found = calibration.find(net, question, Natural, make)
    return Known(None, found) if isinstance(found, str) else Known(found)
