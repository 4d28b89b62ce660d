"""Which classes are unlearned and capped."""

from mlflow_kdguard.config import DetoxSection
from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.records import AuditReport

NEEDING = frozenset({"unlearn", "margin_cap", "margin_swap"})
"""Rows of the chain that work on suspect classes."""


def choose(
    config: DetoxSection, report: AuditReport | None, *, classes: int
) -> tuple[tuple[int, ...], str]:
    """The suspect classes and where they come from.

    Named in the configuration (`all`: every one of `classes`, whatever an audit says); else the
    classes that the audit flagged; else the class that universal inversion reaches best. The last
    is the safe side: an audit without calibration, or one that missed, still leaves the most likely
    target guarded.
    A chain without rows that work on suspects (`NEEDING`) needs none. Raises ConfigError where
    one does, nothing was named and no inversion was run.
    """
    if config.suspects == "all":
        return tuple(range(classes)), "every class"
    if config.suspects != "auto":
        return config.suspects, "named in the configuration"
    findings = (
        [] if report is None else [each for each in report.detectors if "rates" in each.details]
    )
    if not findings and not NEEDING & set(config.chain):
        return (), "nobody: the chain works on no suspects"
    if not findings:
        raise ConfigError(
            "no suspect class is known: the audit ran no inversion.",
            remedy="Add inversion to audit.detectors, or name the classes in detox.suspects.",
        )
    flagged = tuple(
        sorted({label for each in findings for label in each.details.get("flagged", ())})
    )
    if flagged:
        return flagged, "flagged by the audit"
    rates = findings[0].details["rates"]
    best = max(range(len(rates)), key=lambda label: rates[label])
    return (best,), "largest inversion rate; nothing was flagged"
