"""The rule about faithfulness: on drawn images, the student says what its reference says.

A figure counts only for images that nobody chose (the draw is repeated here), with every drawn
image in the denominator, and only where a constant network would not look as faithful.
"""

from collections.abc import Iterator

from mlflow_kdguard.draw import draw
from mlflow_kdguard.gate.case import Case, Verdict, absent, another, at_most, shown, verdict, waived
from mlflow_kdguard.policy import Certified, Smoothed
from mlflow_kdguard.records import FaithfulFigure

Option = Certified | Smoothed

LARGEST_POPULATION = 2_000_000
"""Images from which a draw is still repeated."""


def faithful(case: Case) -> Verdict:
    """At least one option of the policy is met by at least one figure."""
    policy, figures = case.policy.faithful, case.figures.faithful
    if policy is None:
        return waived(max((f.share_lower(case.confidence) for f in figures), default=None))
    limit = [option.model_dump(mode="json") for option in policy.any_of]
    if not figures:
        return absent(limit, "bound on the confidence gap between reference and student")
    if not policy.any_of:
        return verdict(limit, None, ["the policy names no way to be faithful"], "")
    tried = [_tried(case, option) for option in policy.any_of]
    best, figure = min(tried, key=lambda item: len(item[0]))
    shortcomings = [" and ".join(problems) for problems, _ in tried]
    problems = [" — or — ".join(shortcomings)] if best else []
    share = None if figure is None else figure.share_lower(case.confidence)
    return verdict(limit, share, problems, "" if figure is None else _fine(figure, case))


def _tried(case: Case, option: Option) -> tuple[list[str], FaithfulFigure | None]:
    """What the best figure lacks for an option."""
    kind = [f for f in case.figures.faithful if (f.method, f.norm) == (option.method, option.norm)]
    if not kind:
        return [f"there is no {option.method} {option.norm} bound"], None
    judged = [(list(_shortcomings(case, option, figure)), figure) for figure in kind]
    return min(judged, key=lambda item: len(item[0]))


def _shortcomings(case: Case, option: Option, figure: FaithfulFigure) -> Iterator[str]:
    yield from _pair(case, figure)
    yield from _claim(option, figure)
    yield from _share(case, option, figure)
    yield from _selection(case, option, figure)
    if option.below_constant_control:
        yield from _control(case, option, figure)


def _pair(case: Case, figure: FaithfulFigure) -> Iterator[str]:
    """The gap is the one between the certificate's reference and its student."""
    reference = case.certificate.reference.sha256
    if other := another("another reference was bounded:", figure.reference, reference):
        yield other
    if other := another("another student was bounded:", figure.student, case.student):
        yield other


def _claim(option: Option, figure: FaithfulFigure) -> Iterator[str]:
    """What was bounded is at least what the policy asks for."""
    radius = option.eps if isinstance(option, Certified) else option.radius
    if not figure.eps >= radius:
        yield f"bounded within eps {figure.eps:g}, less than {radius:g}"
    if isinstance(option, Smoothed) and figure.sigma != option.sigma:
        yield f"smoothed with sigma {figure.sigma}, not {option.sigma:g}"
    if isinstance(option, Smoothed) and figure.error is None:
        yield "it does not say how often an image is proved by chance"
    if isinstance(option, Certified) and (figure.sigma is not None or figure.error is not None):
        yield "it is about networks under noise"
    if not at_most(figure.delta, option.delta):
        yield f"bounded by delta {figure.delta:g}, more than {option.delta:g}"
    if option.classes == "all" and figure.classes != "all":
        yield f"only the {figure.classes} class was bounded, not all"


def _share(case: Case, option: Option, figure: FaithfulFigure) -> Iterator[str]:
    """Among all drawn images, enough are proved, and there are enough of them."""
    within, limit = figure.within, option.share_lower_at_least
    lower = figure.share_lower(case.confidence)
    if not at_most(limit, lower):
        yield (
            f"gap <= {figure.delta:g} is proved on {within.k} of {within.n} images: lower bound "
            f"{shown(lower, limit)} < {shown(limit, lower)}"
        )
    if within.n < option.samples_at_least:
        yield f"{within.n} images were drawn, fewer than {option.samples_at_least}"


def _selection(case: Case, option: Option, figure: FaithfulFigure) -> Iterator[str]:
    """The images are the ones that the draw gives, on data that is pinned."""
    if figure.selection != option.selection:
        yield f"images were selected by {figure.selection!r}, not {option.selection}"
    if len(figure.indices) != figure.within.n:
        yield f"{len(figure.indices)} images are listed, and {figure.within.n} counted"
    if case.unpinned(figure.data):
        yield f"the data {figure.data.uri} is not pinned"
    if figure.nonce != case.nonce:
        yield f"images were drawn with the nonce {figure.nonce!r}, not {case.nonce!r}"
    if (measured := _measured(case, figure)) and figure.population != measured:
        yield f"images were drawn among {figure.population}, and there are {measured} test images"
    if figure.population > LARGEST_POPULATION:
        yield f"a draw among {figure.population} images is not repeated here"
    elif case.student is not None and not _drawn(case, figure):
        yield "the listed images are not the ones that the draw gives"


def _measured(case: Case, figure: FaithfulFigure) -> int:
    """How many images of the same data the student was measured on."""
    source, alone = case.figures.measured_on, case.figures.accuracy
    same = source is not None and source.sha256 == figure.data.sha256
    return alone.n if same and alone is not None else 0


def _drawn(case: Case, figure: FaithfulFigure) -> bool:
    parts = (case.certificate.reference.sha256, case.student or "", figure.data.sha256)
    repeated = draw(figure.population, len(figure.indices), *parts, figure.nonce)
    return tuple(figure.indices) == repeated


def _control(case: Case, option: Option, figure: FaithfulFigure) -> Iterator[str]:
    """The best constant network, the null model, is clearly less faithful than was asked."""
    control, free = figure.control, 1.0 - option.share_lower_at_least
    if not figure.delta < control.gap_mean:
        yield (
            f"delta {figure.delta:g} is no less than {shown(control.gap_mean, figure.delta)}, the "
            "mean gap of a constant network: the reference hardly says anything"
        )
    upper = figure.control_upper(case.confidence)
    if not at_most(upper, free):
        yield (
            f"a constant network is within delta on {control.within.k} of {control.within.n} "
            f"images: upper bound {shown(upper, free)} > {shown(free, upper)}"
        )
    if control.within.n != figure.within.n:
        yield f"the constant network was asked on {control.within.n} of {figure.within.n} images"


def _fine(figure: FaithfulFigure, case: Case) -> str:
    lower = figure.share_lower(case.confidence)
    whose = "Gap" if figure.sigma is None else f"Gap of the pair smoothed with {figure.sigma:g}"
    return (
        f"{whose} <= {figure.delta:g} within {figure.norm} eps {figure.eps:g} is proved on "
        f"{figure.within.k} of {figure.within.n} drawn images: lower bound {lower:.3f}."
    )
