"""Rules about the certificate itself: whose word, about what, from when, on which data."""

import math
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from mlflow_kdguard.gate.case import STUDENT, Case, Verdict, abbreviated, another, verdict
from mlflow_kdguard.policy import guarded_name
from mlflow_kdguard.records import Source, parse_time


def subjects(case: Case) -> Verdict:
    """There is exactly one student among the certified files, and it is what was measured."""
    paths = [subject.path for subject in case.certificate.subjects]
    figures = case.figures
    measured = figures.accuracy or figures.paired or figures.asr or figures.reference
    return verdict(
        STUDENT,
        case.student,
        [
            f"{STUDENT} is named {paths.count(STUDENT)} times" if case.student is None else None,
            "a file is named twice" if len(set(paths)) != len(paths) else None,
            another(f"figures were taken on another {STUDENT}:", figures.student, case.student)
            if measured or figures.student is not None
            else None,
        ],
        f"{STUDENT} is {abbreviated(case.student)}, with {len(paths)} certified files.",
    )


def signers(case: Case) -> Verdict:
    """Enough different owners signed: two keys of one person are one person."""
    limit = case.policy.certificate.signers_at_least
    owners = {guarded_name(signatory.owner) for signatory in case.signers}
    names = ", ".join(f"{s.owner} as {s.role}" for s in case.signers) or "nobody"
    return verdict(
        limit,
        len(owners),
        [
            f"signed by {len(owners)} different owners ({names}), fewer than {limit}"
            if len(owners) < limit
            else None
        ],
        f"Signed by {names}.",
    )


def figures_from(case: Case) -> Verdict:
    """Figures were measured by whom the policy wants, and `recomputed` is a verifier's word."""
    limit, figure = case.policy.certificate.figures_from, case.certificate.figures_from
    by_verifier = any(signatory.role == "verifier" for signatory in case.signers)
    return verdict(
        limit,
        figure,
        [
            "the figures are the builder's own; the policy wants them recomputed by a verifier"
            if limit == "recomputed" and figure != "recomputed"
            else None,
            "recomputed figures are claimed, and no verifier signed"
            if figure == "recomputed" and not by_verifier
            else None,
        ],
        f"The figures are {figure}.",
    )


def expiry(case: Case) -> Verdict:
    """Issued in the past, not expired, and not older than the policy allows."""
    limit = case.policy.certificate.expires_after_days
    certificate = case.certificate
    try:
        issued, expires = parse_time(certificate.issued), parse_time(certificate.expires)
    except ValueError as error:
        return verdict(limit, certificate.expires, [f"the validity cannot be read: {error}"], "")
    old = limit is not None and case.now - issued >= timedelta(days=limit)
    return verdict(
        limit,
        certificate.expires,
        [
            f"issued only at {certificate.issued}" if issued > case.now else None,
            f"expired at {certificate.expires}" if expires <= case.now else None,
            f"issued at {certificate.issued}, {limit:g} days ago or more" if old else None,
        ],
        f"Issued at {certificate.issued}, valid until {certificate.expires}.",
    )


def data(case: Case) -> Verdict:
    """Every figure was taken on data that the operator pinned."""
    sources = _sources(case)
    free = case.allow_unpinned or case.policy.data.allow_unpinned
    return verdict(
        "any" if free else sorted(case.pins),
        sorted({source.sha256 for _, source in sources}),
        [
            "the certificate does not say on which data it was measured"
            if case.figures.measured_on is None
            else None,
            *(
                f"{what} was taken on {source.uri} ({abbreviated(source.sha256)}), which is not "
                "pinned"
                for what, source in sources
                if case.unpinned(source)
            ),
        ],
        "Unpinned data is allowed." if free else "All data is pinned.",
    )


def finite(case: Case) -> Verdict:
    """No figure is NaN or infinite: no comparison means anything with one."""
    bad = sorted(_not_finite(case.figures.model_dump(by_alias=True), ""))
    return verdict(
        "finite", bad, [f"{where} is not finite" for where in bad], "Every figure is finite."
    )


def _sources(case: Case) -> list[tuple[str, Source]]:
    measured = case.figures.measured_on
    named = [] if measured is None else [("the measurement", measured)]
    named += [(f"the {f.method} gap", f.data) for f in case.figures.faithful]
    return named + [(f"the bound of patches to {f.target}", f.data) for f in case.figures.patch]


def _not_finite(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield where
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _not_finite(inner, f"{where}/{key}")
    elif isinstance(value, list | tuple):
        for position, inner in enumerate(value):
            yield from _not_finite(inner, f"{where}/{position}")
