"""From the stages' documents to the figures of a certificate. What is absent stays absent."""

from collections.abc import Mapping
from typing import Any, Literal

from mlflow_kdguard.records.base import Rate
from mlflow_kdguard.records.bounds import CertifyReport, Status
from mlflow_kdguard.records.certificate import AuditFigure, FaithfulFigure, Figures
from mlflow_kdguard.records.figures import AuditReport, Measurement, Parity

Side = Literal["teacher", "student"]


def figures_of(
    *,
    measurement: Measurement | None = None,
    bounds: CertifyReport | None = None,
    audits: Mapping[Side, AuditReport] | None = None,
    parity: Parity | None = None,
) -> Figures:
    """Everything that the gate decides on, from the documents that are there."""
    taken: dict[str, Any] = {}
    if measurement is not None:
        taken = {
            "accuracy": measurement.accuracy,
            "teacher": measurement.teacher,
            "paired": measurement.paired,
            "measured_on": measurement.data,
            "asr": measurement.asr,
            "reference": measurement.reference,
        }
    return Figures(
        **taken,
        faithful=() if bounds is None else (faithful_of(bounds),),
        audit={side: audit_of(report) for side, report in (audits or {}).items()},
        export=parity,
    )


def faithful_of(report: CertifyReport) -> FaithfulFigure:
    """The gated figure of a report: on how many of all drawn images gap <= delta is PROVED."""
    proved = sum(sample.status is Status.PROVED for sample in report.samples)
    return FaithfulFigure(
        method="certified",
        norm=report.norm,
        eps=report.eps,
        delta=report.delta,
        classes=report.classes,
        within=Rate(k=proved, n=len(report.samples)),
        lower_mean=report.summary.lower_mean,
        upper_mean=report.summary.upper_mean,
        selection=report.selection,
        population=report.population,
        nonce=report.nonce,
        indices=tuple(sample.index for sample in report.samples),
        data=report.data,
        control=report.control,
    )


def audit_of(report: AuditReport) -> AuditFigure:
    """The gated figure of an audit: its verdict, and its smallest calibrated p-value."""
    p_values = [f.p_value for f in report.detectors if f.p_value is not None]
    return AuditFigure(
        model=report.model,
        verdict=report.verdict,
        p_value=min(p_values, default=None),
        target=report.target,
    )
