"""Which classes are unlearned and capped, and how far unlearning reaches."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlflow_kdguard.config import DetoxSection
from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.records import AuditReport, Finding

COMBINING = frozenset({"margin_cap", "margin_swap"})
"""Rows whose reference is the raw teacher but for the suspects."""
NEEDING = COMBINING | {"unlearn"}
"""Rows of the chain that work on suspect classes."""
RADIUS = 2.8
"""Where no radius is known at which a suspect stands out."""
_BEYOND = 1.2
"""Radius of unlearning as a share of the one at which the suspects stand out."""


@dataclass(frozen=True, slots=True)
class Suspicion:
    """The suspect classes, where they come from, and the radius of unlearning.

    `aside`: a calibrated audit saw nobody, and the guard is to leave the teacher alone.
    """

    classes: tuple[int, ...]
    source: str
    radius: float = RADIUS
    aside: bool = False

    def settled(self, config: DetoxSection) -> DetoxSection:
        """The section with its `auto` radius settled, and, `aside`, without rows for suspects.

        Without suspects cap and swap leave the raw teacher as it is: the chain is empty.
        """
        chain = config.chain
        if self.aside:
            left = tuple(row for row in chain if row not in NEEDING)
            chain = () if COMBINING & set(chain) else left
        return config.model_copy(update={"unlearn_radius": self.radius, "chain": chain})


def choose(config: DetoxSection, report: AuditReport | None, *, classes: int) -> Suspicion:
    """The suspect classes and where they come from.

    Named in the configuration (`all`: every one of `classes`, whatever an audit says); else the
    classes that the audit flagged; else `config.unflagged`: the likeliest, which is the class that
    leads its natural profile furthest or, without a profile, that universal inversion reaches best;
    or every class; or none, if a detector looked that is calibrated for every class: any other
    audit still leaves the most likely target guarded.
    A chain without rows that work on suspects (`NEEDING`) needs none. Raises ConfigError where
    one does, nothing was named and no inversion was run.
    """
    findings = _searched(report)
    radius = _radius(config, findings)
    if config.suspects == "all":
        return Suspicion(tuple(range(classes)), "every class", radius)
    if config.suspects != "auto":
        return Suspicion(config.suspects, "named in the configuration", radius)
    if not findings and not NEEDING & set(config.chain):
        return Suspicion((), "nobody: the chain works on no suspects", radius)
    if not findings:
        raise ConfigError(
            "no suspect class is known: the audit ran no inversion.",
            remedy="Add inversion or profile to audit.detectors, or name the classes in "
            "detox.suspects.",
        )
    flagged = {label for each in findings for label in each.details.get("flagged", ())}
    if flagged:
        return Suspicion(tuple(sorted(flagged)), "flagged by the audit", radius)
    return _unflagged(config, findings, radius, classes)


def _unflagged(
    config: DetoxSection, findings: Sequence[Finding], radius: float, classes: int
) -> Suspicion:
    if config.unflagged == "all":
        return Suspicion(tuple(range(classes)), "every class; nothing was flagged", radius)
    if config.unflagged == "none" and any(map(_saw_everything, findings)):
        return Suspicion((), "nobody: a calibrated audit flagged nothing", radius, aside=True)
    measure, values = _measured(findings)
    best = max(range(len(values)), key=lambda label: values[label])
    return Suspicion((best,), f"largest {measure}; nothing was flagged", radius)


def _saw_everything(finding: Finding) -> bool:
    """Whether it was calibrated, and for every class."""
    calibration = finding.details.get("calibration", {"why": "an older report"})
    return "why" not in calibration and not finding.details.get("unseen")


def _searched(report: AuditReport | None) -> list[Finding]:
    """Findings of detectors that inverted every class."""
    found = () if report is None else report.detectors
    return [each for each in found if {"rates", "leads"} & set(each.details)]


def _measured(findings: Sequence[Finding]) -> tuple[str, list[float]]:
    for each in findings:
        if "leads" in each.details:
            return "lead over the natural profile", each.details["leads"]
    return "inversion rate", findings[0].details["rates"]


def _radius(config: DetoxSection, findings: Sequence[Finding]) -> float:
    if config.unlearn_radius != "auto":
        return config.unlearn_radius
    stood = [each.details.get("radius") for each in findings if "leads" in each.details]
    return max((_BEYOND * radius for radius in stood if radius is not None), default=RADIUS)
