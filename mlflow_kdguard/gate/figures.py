"""Rules about accuracy, the reference, audits and the export."""

from typing import Literal

from mlflow_kdguard.gate.case import (
    Case,
    Verdict,
    abbreviated,
    absent,
    another,
    at_most,
    shown,
    verdict,
    waived,
)

SAME = 1e-6
"""Softmax difference up to which two networks are the same one in other bytes."""

PARITY_IMAGES = 1000
"""Images that an export must have been compared on."""

_OTHER_REFERENCE = "the gap is the one of another reference:"


def accuracy(case: Case) -> Verdict:
    """Original teacher minus student on the same images (Newcombe's paired upper bound)."""
    limit = None if case.policy.accuracy is None else case.policy.accuracy.drop_upper_at_most
    paired, alone = case.figures.paired, case.figures.accuracy
    bound = None if paired is None else paired.drop_upper(case.confidence)
    if limit is None:
        return waived(bound)
    if paired is None or bound is None:
        return absent(limit, "comparison of student and original teacher on the same images")
    right = paired.both + paired.only_student
    teacher = paired.both + paired.only_teacher
    told = f"teacher right on {teacher}, student on {right} of {paired.n} images"
    return verdict(
        limit,
        bound,
        [
            _other_teacher(case),
            "no image was compared" if paired.n == 0 else None,
            "the certificate has no accuracy of the student" if alone is None else None,
            f"the student's accuracy is stated as {alone.k} of {alone.n}, and as {right} of "
            f"{paired.n} beside the teacher"
            if alone is not None and (alone.k, alone.n) != (right, paired.n)
            else None,
            f"{told}: upper bound of the drop {shown(bound, limit)} > {shown(limit, bound)}"
            if not at_most(bound, limit)
            else None,
        ],
        f"{told[0].upper()}{told[1:]}: upper bound of the drop {shown(bound, limit)}.",
    )


def reference_gap(case: Case) -> Verdict:
    """The reference stayed near the original teacher on clean images."""
    limit = None if case.policy.reference is None else case.policy.reference.gap_mean_at_most
    gap = case.figures.reference
    if limit is None:
        return waived(None if gap is None else gap.gap_mean)
    if gap is None:
        return absent(limit, "gap between reference and original teacher")
    mean = f"mean gap to the original teacher {shown(gap.gap_mean, limit)}"
    return verdict(
        limit,
        gap.gap_mean,
        [
            _other_teacher(case),
            another(_OTHER_REFERENCE, gap.model, case.certificate.reference.sha256),
            "the gap to the original teacher was taken on no image" if gap.n < 1 else None,
            f"{mean} > {shown(limit, gap.gap_mean)} on {gap.n} images"
            if not at_most(gap.gap_mean, limit)
            else None,
        ],
        f"{mean[0].upper()}{mean[1:]} on {gap.n} images.",
    )


def reference_distinct(case: Case) -> Verdict:
    """The student is not its own reference, in the same bytes or in others."""
    asked = case.policy.reference is not None and case.policy.reference.distinct_from_student
    gap = case.figures.reference
    if not asked:
        return waived(None if gap is None else gap.student_gap_max)
    if gap is None:
        return absent(SAME, "gap between reference and student")
    return verdict(
        SAME,
        gap.student_gap_max,
        [
            "the reference is the student's own file"
            if case.certificate.reference.sha256 == case.student
            else None,
            another(_OTHER_REFERENCE, gap.model, case.certificate.reference.sha256),
            "the gap between reference and student was taken on no image" if gap.n < 1 else None,
            f"reference and student differ by at most {gap.student_gap_max:.1e}: they are the "
            "same network"
            if not gap.student_gap_max > SAME
            else None,
        ],
        f"Reference and student differ by up to {gap.student_gap_max:.3f}.",
    )


def teacher_audit(case: Case) -> Verdict:
    """The original teacher was audited."""
    return _audit(case, "teacher", case.certificate.teacher.sha256)


def student_audit(case: Case) -> Verdict:
    """The student was audited."""
    return _audit(case, "student", case.student)


def export(case: Case) -> Verdict:
    """The exported graph computes what the trained network computes."""
    limit = None if case.policy.export is None else case.policy.export.parity_at_most
    parity = case.figures.export
    if limit is None:
        return waived(None if parity is None else parity.softmax_max)
    if parity is None:
        return absent(limit, "comparison of the exported with the trained network")
    same = parity.argmax
    return verdict(
        limit,
        parity.softmax_max,
        [
            another("another file was compared with its network:", parity.model, case.student),
            f"softmax outputs differ by {parity.softmax_max:.3g} > {limit:.3g}"
            if not at_most(parity.softmax_max, limit)
            else None,
            f"the predicted class differs on {same.n - same.k} of {same.n} images"
            if same.k != same.n
            else None,
            f"compared on {same.n} images, fewer than {PARITY_IMAGES}"
            if same.n < PARITY_IMAGES
            else None,
        ],
        f"Outputs differ by at most {parity.softmax_max:.1e} on {same.n} images.",
    )


def _audit(case: Case, side: Literal["teacher", "student"], sha256: str | None) -> Verdict:
    limit = None if case.policy.audit is None else getattr(case.policy.audit, side)
    figure = case.figures.audit.get(side)
    if limit is None:
        return waived(None if figure is None else figure.verdict)
    if figure is None:
        return absent(limit, f"audit of the {side}")
    return verdict(
        limit,
        figure.verdict,
        [
            another(f"another model was audited as {side}:", figure.model, sha256),
            f"the audit of the {side} says {figure.verdict}, not clean"
            if limit == "clean" and figure.verdict != "clean"
            else None,
        ],
        f"The {side} was audited: {figure.verdict}.",
    )


def _other_teacher(case: Case) -> str | None:
    compared = case.figures.teacher
    if compared is None:
        return "the certificate does not say which teacher was compared"
    if compared.sha256 != case.certificate.teacher.sha256:
        return (
            f"compared with {abbreviated(compared.sha256)}, which is not the original teacher "
            f"{abbreviated(case.certificate.teacher.sha256)}"
        )
    return None
