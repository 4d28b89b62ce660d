"""The rule about patches: whatever is in a square, few images of other classes are flipped.

A figure counts for the squares that lie within its own, for images that nobody chose (the draw is
repeated here), and with every drawn image in the denominator.
"""

from collections.abc import Iterator

from mlflow_kdguard.draw import draw
from mlflow_kdguard.gate.case import Case, Verdict, absent, another, at_most, shown, verdict, waived
from mlflow_kdguard.gate.faithful import LARGEST_POPULATION
from mlflow_kdguard.policy import Patch
from mlflow_kdguard.records import PatchFigure
from mlflow_kdguard.records.patch import Corner


def patch(case: Case) -> Verdict:
    """Every target and position of the policy is met by a figure, all bounds holding together."""
    policy, figures = case.policy.patch, case.figures.patch
    if policy is None:
        return waived(max((f.each.unproved.upper(case.confidence) for f in figures), default=None))
    limit = policy.model_dump(mode="json")
    if not figures:
        return absent(limit, "bound on what patches of any content do")
    asked = [(target, place) for target in policy.targets for place in policy.positions]
    tried = [_tried(case, policy, target, place) for target, place in asked]
    problems = list(dict.fromkeys(problem for found, _ in tried for problem in found))
    worst = max((_upper(case, policy, f) for _, f in tried if f is not None), default=None)
    fine = (
        f"Patches of {policy.size}×{policy.size} pixels towards {len(policy.targets)} classes, at "
        f"{len(policy.positions)} positions, flip at most {worst or 0.0:.3f}."
    )
    return verdict(limit, worst, problems, fine)


def _tried(
    case: Case, policy: Patch, target: int, place: Corner
) -> tuple[list[str], PatchFigure | None]:
    """What the best figure lacks for one target and position."""
    covering = [f for f in case.figures.patch if f.target == target and _covers(f, policy, place)]
    if not covering:
        where = f"{policy.size}×{policy.size} pixels at {place[0]},{place[1]}"
        return [f"patches of {where} towards class {target} were not bounded"], None
    judged = [(list(_shortcomings(case, policy, figure)), figure) for figure in covering]
    return min(judged, key=lambda item: len(item[0]))


def _covers(figure: PatchFigure, policy: Patch, place: Corner) -> bool:
    """Whether one of the figure's squares holds the policy's: its content is free there, too."""
    return any(_holds(start, figure.size, place, policy.size) for start in figure.positions)


def _holds(outer: Corner, size: int, inner: Corner, part: int) -> bool:
    pairs = zip(outer, inner, strict=True)
    return all(start <= place and place + part <= start + size for start, place in pairs)


def _shortcomings(case: Case, policy: Patch, figure: PatchFigure) -> Iterator[str]:
    about = f"towards class {figure.target}"
    if other := another(f"patches {about} were bounded on", figure.student, case.student):
        yield other
    yield from _limits(case, policy, figure, about)
    if figure.each.n < policy.samples_at_least:
        yield f"{figure.each.n} images were drawn {about}, fewer than {policy.samples_at_least}"
    if not at_most(policy.margin_at_least, figure.margin):
        yield f"a lead of {figure.margin:g} was asked {about}, less than {policy.margin_at_least:g}"
    yield from _selection(case, policy, figure, about)


def _confidence(case: Case, policy: Patch) -> float:
    """All classes together: one of many would otherwise pass by luck."""
    return case.together(len(policy.targets))


def _upper(case: Case, policy: Patch, figure: PatchFigure) -> float:
    return figure.each.unproved.upper(_confidence(case, policy))


def _limits(case: Case, policy: Patch, figure: PatchFigure, about: str) -> Iterator[str]:
    kinds = (
        ("a patch for each image", figure.each, policy.upper_at_most),
        ("one patch for all images", figure.universal, policy.universal_upper_at_most),
    )
    for kind, flips, limit in kinds:
        upper = flips.unproved.upper(_confidence(case, policy))
        if limit is not None and not at_most(upper, limit):
            yield (
                f"{kind} {about} may flip {flips.certified} of {flips.n}: upper bound "
                f"{shown(upper, limit)} > {shown(limit, upper)}"
            )


def _selection(case: Case, policy: Patch, figure: PatchFigure, about: str) -> Iterator[str]:
    """The images are the ones that the draw gives, among all of other classes, on pinned data."""
    if figure.selection != policy.selection:
        yield f"images {about} were selected by {figure.selection!r}, not {policy.selection}"
    if not len(figure.ranks) == figure.each.n == figure.universal.n:
        yield f"{len(figure.ranks)} images are listed {about}, and {figure.each.n} counted"
    if case.unpinned(figure.data):
        yield f"the data {figure.data.uri} is not pinned"
    if figure.nonce != case.nonce:
        yield f"images were drawn with the nonce {figure.nonce!r}, not {case.nonce!r}"
    counted = _counted(case, figure)
    if counted and figure.population not in counted:
        yield (
            f"images {about} were drawn among {figure.population}, and {min(counted)} were asked "
            "for the success of triggers"
        )
    if figure.population > LARGEST_POPULATION:
        yield f"a draw among {figure.population} images is not repeated here"
    elif case.student is not None and not _drawn(case, figure):
        yield f"the images listed {about} are not the ones that the draw gives"


def _counted(case: Case, figure: PatchFigure) -> set[int]:
    """How many images of other classes a trigger aimed at the same class was tried on."""
    source = case.figures.measured_on
    if source is None or source.sha256 != figure.data.sha256:
        return set()
    return {asr.n for asr in case.figures.asr if asr.target == figure.target}


def _drawn(case: Case, figure: PatchFigure) -> bool:
    parts = (case.student or "", figure.data.sha256, f"target={figure.target}", figure.nonce)
    return figure.ranks == draw(figure.population, len(figure.ranks), *parts)
