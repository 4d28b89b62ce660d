"""Rules about triggers: what was tried, whether it did anything, and how often it succeeded.

All success rates of a certificate are bounded together: one of many triggers would otherwise
pass by luck, or be hidden among many.
"""

from collections.abc import Iterable, Iterator

from mlflow_kdguard import intervals
from mlflow_kdguard.gate.case import (
    Case,
    Verdict,
    abbreviated,
    absent,
    at_most,
    shown,
    verdict,
    waived,
)
from mlflow_kdguard.records import Asr

_NONE = "attack success rate of any trigger"


def upper(case: Case) -> Verdict:
    """Every trigger's Clopper–Pearson upper bound, at a confidence that holds for all together."""
    figures = case.figures.asr
    limit = None if case.policy.asr is None else case.policy.asr.upper_at_most
    bounds = [intervals.upper(figure.k, figure.n, family(case)) for figure in figures]
    worst = max(bounds, default=None)
    if limit is None:
        return waived(worst)
    if worst is None:
        return absent(limit, _NONE)
    problems = [
        f"ASR {shown(figure.rate)} ({figure.k} of {figure.n}) for {_named(figure)}: "
        f"upper bound {shown(bound, limit)} > {shown(limit, bound)}"
        for figure, bound in zip(figures, bounds, strict=True)
        if not at_most(bound, limit)
    ]
    fine = f"ASR upper bound {shown(worst, limit)} <= {shown(limit, worst)} for {len(figures)} "
    return verdict(limit, worst, problems, fine + "triggers together.")


def triggers(case: Case) -> Verdict:
    """The demanded sources, the panel, and all triggers that the certificate lists were tried."""
    policy, figures = case.policy.asr, case.figures.asr
    panel = tuple(dict.fromkeys((*(policy.panel if policy else ()), *case.panel)))
    if policy is None and not panel:
        return waived(len(figures))
    tried = {figure.trigger for figure in figures}
    source = policy.triggers if policy else "recovered-or-supplied"
    return verdict(
        {"triggers": source, "panel": list(panel)},
        sorted(tried),
        [
            *_missing_sources(source, {figure.source for figure in figures}),
            *_unmeasured(panel, figures),
            *(f"trigger {abbreviated(t)} is listed and was not measured"
              for t in case.certificate.triggers if t not in tried),
        ],
        f"{len(tried)} triggers were measured ({len(panel)} of a panel).",
    )  # fmt: skip


def _unmeasured(panel: Iterable[str], figures: Iterable[Asr]) -> Iterator[str]:
    """Entries are DIGEST or DIGEST:CLASS; a trigger aimed at another class hardly succeeds."""
    tried = {figure.trigger for figure in figures}
    aimed = {(figure.trigger, figure.target) for figure in figures}
    for entry in panel:
        digest, _, target = entry.partition(":")
        if digest not in tried:
            yield f"trigger {abbreviated(digest)} of the panel was not measured"
        elif target and (digest, int(target)) not in aimed:
            yield f"trigger {abbreviated(digest)} of the panel was not aimed at class {target}"


def changed(case: Case) -> Verdict:
    """Every trigger alters pixels, on a share of its images that is bounded from below."""
    figures = case.figures.asr
    limit = None if case.policy.asr is None else case.policy.asr.changed_at_least
    shares = [figure.changed.lower(case.confidence) for figure in figures]
    worst = min(shares, default=None)
    if limit is None:
        return waived(worst)
    if worst is None:
        return absent(limit, _NONE)
    problems = [
        f"{_named(figure)} alters {figure.changed.k} of {figure.changed.n} images"
        + (f", of {figure.n} asked" if figure.changed.n < figure.n else "")
        + f": lower bound {shown(share, limit)}, at least {shown(limit, share)} is needed"
        for figure, share in zip(figures, shares, strict=True)
        if not at_most(limit, share) or figure.changed.n < figure.n
    ]
    fine = f"Every trigger alters its images: lower bound {shown(worst, limit)}."
    return verdict(limit, worst, problems, fine)


def lift(case: Case) -> Verdict:
    """No trigger succeeds much more often than on the declared baseline, which is no suspect."""
    figures = case.figures.asr
    limit = None if case.policy.asr is None else case.policy.asr.lift_at_most
    if limit is None:
        return waived(max((f.lift for f in figures if f.lift is not None), default=None))
    if not figures:
        return absent(limit, _NONE)
    bounds = [_lift_upper(figure, family(case)) for figure in figures]
    problems = [
        f"no baseline is declared for {_named(figure)}"
        if bound is None
        else f"lift of {_named(figure)}: upper bound {shown(bound, limit)} > {shown(limit, bound)}"
        for figure, bound in zip(figures, bounds, strict=True)
        if bound is None or not at_most(bound, limit)
    ]
    problems += filter(None, [_no_comparator(case)])
    worst = None if None in bounds else max(b for b in bounds if b is not None)
    return verdict(limit, worst, problems, f"Every lift's upper bound is at most {limit:g}.")


def family(case: Case) -> float:
    """Confidence of each bound, so that those of all triggers and targets hold together."""
    return case.together(max(1, len(case.figures.asr)))


def _lift_upper(figure: Asr, confidence: float) -> float | None:
    base = figure.baseline
    if base is None:
        return None
    return intervals.independent_difference_upper(figure.k, figure.n, base.k, base.n, confidence)


def _no_comparator(case: Case) -> str | None:
    """A student that is its own baseline shows no lift, and one of its teachers hardly any."""
    certificate, baseline = case.certificate, case.figures.baseline
    if baseline is None:
        return "the certificate does not say which model the baseline is"
    suspects = {
        case.student: "the student itself",
        certificate.reference.sha256: "the student's reference",
        certificate.teacher.sha256: "the original teacher",
    }
    suspect = suspects.get(baseline.sha256)
    return None if suspect is None else f"the baseline is {suspect}"


def _missing_sources(demanded: str, found: set[str]) -> Iterator[str]:
    if not found:
        yield f"the certificate has no {_NONE}"
    elif demanded != "recovered-or-supplied":
        for source in demanded.split("-and-"):
            if source not in found:
                yield f"no {source} trigger was measured"


def _named(figure: Asr) -> str:
    return f"trigger {figure.name} → class {figure.target}"
