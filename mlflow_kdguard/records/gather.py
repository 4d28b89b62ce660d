"""From the stages' documents to the figures of a certificate. What is absent stays absent."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from mlflow_kdguard.errors import CertificateError
from mlflow_kdguard.records.base import Model, Rate, Sha256
from mlflow_kdguard.records.bounds import CertifyReport, Status
from mlflow_kdguard.records.certificate import AuditFigure, FaithfulFigure, Figures
from mlflow_kdguard.records.figures import AuditReport, Measurement, Parity
from mlflow_kdguard.records.patch import PatchFigure, PatchReport
from mlflow_kdguard.records.smooth import SmoothReport

Side = Literal["teacher", "student"]


def figures_of(
    *,
    measurement: Measurement | None = None,
    bounds: CertifyReport | None = None,
    smooth: SmoothReport | None = None,
    patches: Sequence[PatchReport] = (),
    audits: Mapping[Side, AuditReport] | None = None,
    parity: Parity | None = None,
) -> Figures:
    """Everything that the gate decides on, from the documents that are there."""
    taken: dict[str, Any] = {}
    if measurement is not None:
        taken = {
            "student": measurement.model,
            "accuracy": measurement.accuracy,
            "teacher": measurement.teacher,
            "baseline": measurement.baseline,
            "paired": measurement.paired,
            "measured_on": measurement.data,
            "asr": measurement.asr,
            "reference": measurement.reference,
        }
    return Figures(
        **taken,
        faithful=(
            *(() if bounds is None else (faithful_of(bounds),)),
            *(() if smooth is None else (smooth_of(smooth),)),
        ),
        patch=tuple(patch_of(report) for report in patches),
        audit={side: audit_of(report) for side, report in (audits or {}).items()},
        export=parity,
    )


def mixed_up(
    figures: Figures, *, student: Sha256, teacher: Sha256, reference: Sha256
) -> Iterator[str]:
    """Every figure that was taken on another model than the one that it would speak of."""
    own = {"student": student, "teacher": teacher, "reference": reference}
    for what, role, model in _taken_on(figures):
        if model is not None and model.sha256 != own[role]:
            yield f"{what} is about the {role} {model.sha256}, not {own[role]}"


def _taken_on(figures: Figures) -> Iterator[tuple[str, str, Model | None]]:
    yield "the measurement", "student", figures.student
    yield "the measurement", "teacher", figures.teacher
    if figures.reference is not None:
        yield "the measurement", "reference", figures.reference.model
    for bound in figures.faithful:
        yield f"the {bound.method} bound", "reference", bound.reference
        yield f"the {bound.method} bound", "student", bound.student
    for patch in figures.patch:
        yield f"the bound of patches towards class {patch.target}", "student", patch.student
    for side, audit in figures.audit.items():
        yield f"the audit of the {side}", side, audit.model
    if figures.export is not None:
        yield "the export", "student", figures.export.model


def faithful_of(report: CertifyReport) -> FaithfulFigure:
    """The gated figure of a report: on how many of all drawn images gap <= delta is PROVED.

    CertificateError for a report of a certification that was interrupted.
    """
    if report.interrupted:
        raise CertificateError(
            "the certification was interrupted: its report is not of all that was asked.",
            remedy="Run `kdguard certify` again, to its end or to a limit of its own.",
        )
    proved = sum(sample.status is Status.PROVED for sample in report.samples)
    return FaithfulFigure(
        method="certified",
        norm=report.norm,
        eps=report.eps,
        within=Rate(k=proved, n=len(report.samples)),
        lower_mean=report.summary.lower_mean,
        upper_mean=report.summary.upper_mean,
        **_asked(report),
    )


def smooth_of(report: SmoothReport) -> FaithfulFigure:
    """The gated figure of a report about a smoothed pair: the same, of another kind."""
    return FaithfulFigure(
        method="smoothed",
        norm=report.norm,
        eps=report.radius,
        within=report.within,
        lower_mean=report.lower_mean,
        upper_mean=report.upper_mean,
        sigma=report.sigma,
        error=report.error,
        **_asked(report),
    )


def _asked(report: CertifyReport | SmoothReport) -> dict[str, Any]:
    """What was asked, about which bytes and images: both kinds of reports say it alike."""
    names = (
        "reference", "student", "delta", "classes", "selection", "population", "nonce", "data",
        "control",
    )  # fmt: skip
    return {
        **{name: getattr(report, name) for name in names},
        "indices": tuple(sample.index for sample in report.samples),
    }


def patch_of(report: PatchReport) -> PatchFigure:
    """The gated figure of a report about patches."""
    return PatchFigure(
        student=report.student,
        target=report.target,
        size=report.size,
        positions=tuple(place.position for place in report.places),
        margin=report.margin,
        each=report.each,
        universal=report.universal,
        selection=report.selection,
        population=report.population,
        nonce=report.nonce,
        ranks=tuple(sample.rank for sample in report.samples),
        data=report.data,
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
