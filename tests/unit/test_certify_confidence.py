"""Constants of the Lagrangian split against sampling, and the closed forms they must meet."""

import math
from itertools import product

import pytest
import torch

from mlflow_kdguard.certify import confidence
from mlflow_kdguard.certify.confidence import Band, Margins
from mlflow_kdguard.proof import confidence as checks

M = (1, 2, 4, 8)


def boxes(n: int, m: int, seed: int, width: float = 3.0) -> Margins:
    generator = torch.Generator().manual_seed(seed)
    middle = 3.0 * torch.randn((n, m), generator=generator, dtype=torch.float64) - 1.0
    radius = width * torch.rand((n, m), generator=generator, dtype=torch.float64) ** 2
    return Margins(middle - radius, middle + radius)


def samples(box: Margins, seed: int):
    generator = torch.Generator().manual_seed(seed)
    for number in range(300):
        share = torch.rand(box.lo.shape, generator=generator, dtype=torch.float64)
        share = share.round() if number % 2 else share
        yield box.lo + share * (box.hi - box.lo)


def drawn_weights(n: int, m: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((n, m), generator=generator, dtype=torch.float64) ** 4 * 0.3


@pytest.mark.parametrize("m", M)
def test_lower_constant_is_above_every_sample(m):
    box, weights = boxes(40, m, 1), drawn_weights(40, m, 2)
    constant = confidence.lower_constant(box, weights)
    for b in samples(box, 3):
        value = -confidence.probability(b) - (weights * b).sum(-1)
        assert bool((constant >= value - 1e-12).all())


@pytest.mark.parametrize("m", [1, 2, 4])
def test_lower_constant_is_attained(m):
    """Up to five classes it is the exact supremum: a grid comes close."""
    box, weights = boxes(20, m, 4), drawn_weights(20, m, 5)
    constant = confidence.lower_constant(box, weights)
    ticks = torch.linspace(0, 1, {1: 2001, 2: 201, 4: 17}[m], dtype=torch.float64)
    grid = torch.cartesian_prod(*[ticks] * m).reshape(-1, 1, m)
    b = box.lo + grid * (box.hi - box.lo)
    best = (-confidence.probability(b) - (weights * b).sum(-1)).amax(0)
    torch.testing.assert_close(constant, best, atol={1: 1e-6, 2: 1e-4, 4: 1e-2}[m], rtol=0)


def test_lower_constant_follows_its_multipliers():
    """The gradient is minus the worst point (envelope theorem), as finite differences say."""
    box = boxes(30, 4, 6)
    weights = (drawn_weights(30, 4, 7) + 1e-3).requires_grad_()
    (slope,) = torch.autograd.grad(confidence.lower_constant(box, weights).sum(), weights)
    step = 1e-7
    moved = confidence.lower_constant(box, weights + step * torch.eye(4, dtype=torch.float64)[0])
    numeric = (moved - confidence.lower_constant(box, weights)) / step
    torch.testing.assert_close(slope[:, 0], numeric.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("m", M)
def test_upper_plane_is_above_every_sample(m):
    box = boxes(40, m, 8)
    at = box.lo + 0.3 * (box.hi - box.lo)
    slope = torch.logspace(-6, math.log10(0.25), 40, dtype=torch.float64)
    plane = confidence.upper_plane(box, at, slope)
    assert bool((plane.weights <= 0.0).all())
    for a in samples(box, 9):
        bound = (plane.weights * a).sum(-1) + plane.constant
        assert bool((bound >= confidence.probability(a) - 1e-12).all())


def test_upper_plane_touches_where_it_is_concave():
    """Above one half the confidence is concave, and its tangent is exact at the point."""
    at = torch.tensor([[-3.0, -2.5]], dtype=torch.float64)
    box = Margins(at - 0.5, at + 0.5)
    p = confidence.probability(at)
    plane = confidence.upper_plane(box, at, p * (1 - p))
    assert float((plane.weights * at).sum() + plane.constant[0]) == pytest.approx(float(p[0]))


def test_gaps_from_boxes_and_links_hold_for_every_pair_of_samples():
    high, shift = boxes(60, 4, 10), boxes(60, 4, 11, width=0.2)
    shift = Margins(shift.lo / 20, shift.hi / 20)
    low = Margins(high.lo - shift.hi, high.hi - shift.lo)
    plain, linked = confidence.interval_gap(high, low), confidence.linked_gap(high, low, shift)
    for a, d in zip(samples(high, 12), samples(shift, 13), strict=True):
        gap = confidence.probability(a) - confidence.probability(a - d)
        assert bool((plain >= gap - 1e-12).all())
        assert bool((linked >= gap - 1e-12).all())


def test_the_link_is_tanh_of_a_quarter_of_the_difference():
    wide = Margins(torch.full((1, 3), -9.0).double(), torch.full((1, 3), 9.0).double())
    shift = Margins(torch.full((1, 3), -0.8).double(), torch.full((1, 3), 0.1).double())
    linked = float(confidence.linked_gap(wide, wide, shift)[0])
    assert linked == pytest.approx(math.tanh(0.8 / 4))


def test_margins_beyond_the_range_of_exp_stay_numbers():
    box = Margins(torch.full((2, 9), -1e4).double(), torch.full((2, 9), 1e4).double())
    constant = confidence.lower_constant(box, torch.full((2, 9), 1e-5).double())
    assert bool(torch.isfinite(constant).all())
    assert bool((constant >= -1e-12).all())


# ── Bands ───────────────────────────────────────────────────────────────────────────────────────


def banded(box: Margins, seed: int) -> Band:
    """A part of what the confidences of a box can be."""
    generator = torch.Generator().manual_seed(seed)
    whole = Band.of(box)
    ends = torch.rand((2, len(box.lo)), generator=generator, dtype=torch.float64).sort(0).values
    return Band(
        whole.lo + ends[0] * (whole.hi - whole.lo), whole.lo + ends[1] * (whole.hi - whole.lo)
    )


def within(band: Band, margins: torch.Tensor) -> torch.Tensor:
    odds = -torch.logsumexp(margins, -1)
    return (odds >= band.lo) & (odds <= band.hi)


@pytest.mark.parametrize("m", M)
def test_constants_of_a_band_hold_inside_it(m):
    box, weights = boxes(200, m, 14), drawn_weights(200, m, 15)
    band = banded(box, 16)
    at = box.lo + 0.3 * (box.hi - box.lo)
    slope = torch.logspace(-6, 1, 200, dtype=torch.float64)  # steeper than any derivative, too
    plane = confidence.upper_plane(box, at, slope, band)
    constant = confidence.lower_constant(box, weights, band)
    seen = 0
    for x in samples(box, 17):
        inside, p = within(band, x), confidence.probability(x)
        seen += int(inside.sum())
        assert bool((plane.constant >= p - (plane.weights * x).sum(-1) - 1e-9)[inside].all())
        assert bool((constant >= -p - (weights * x).sum(-1) - 1e-9)[inside].all())
    assert seen > 1_000


@pytest.mark.parametrize("m", [1, 2])
def test_the_lower_constant_of_a_band_is_attained(m):
    box, weights = boxes(30, m, 18), drawn_weights(30, m, 19)
    band = banded(box, 20)
    constant = confidence.lower_constant(box, weights, band)
    ticks = torch.linspace(0, 1, {1: 20001, 2: 1001}[m], dtype=torch.float64)
    grid = torch.cartesian_prod(*[ticks] * m).reshape(-1, 1, m)
    b = box.lo + grid * (box.hi - box.lo)
    values = -confidence.probability(b) - (weights * b).sum(-1)
    best = values.masked_fill(~within(band, b), -torch.inf).amax(0)
    known = best.isfinite()
    assert int(known.sum()) > 10
    torch.testing.assert_close(constant[known], best[known], atol=5e-3, rtol=0)


@pytest.mark.parametrize("checker", [False, True])
def test_a_narrow_band_is_not_blurred_by_the_classes_that_are_not_enumerated(checker):
    """The exact supremum, by all ends of all coordinates but one, for each of many sums."""
    m, n = 8, 30
    box, weights = boxes(n, m, 51, width=4.0), drawn_weights(n, m, 52)
    whole = Band.of(box)
    lo = whole.lo + 0.2 * (whole.hi - whole.lo)
    band = Band(lo, lo + 0.05 * (whole.hi - whole.lo))
    tight, inside = confidence.tightened(box, band)
    if checker:
        part = checks.Part(*(v.numpy() for v in (tight.lo, tight.hi, inside.lo, inside.hi)))
        constant = torch.from_numpy(checks.lower_constant(part, weights.numpy()))
    else:
        constant = confidence.lower_constant(tight, weights, inside)
    corners = torch.tensor(list(product((0.0, 1.0), repeat=m - 1)), dtype=torch.float64)
    sums = torch.exp(-torch.stack([inside.lo.lerp(inside.hi, t) for t in torch.linspace(0, 1, 21)]))
    best = torch.full((n,), -torch.inf, dtype=torch.float64)
    for free in range(m):
        others = [j for j in range(m) if j != free]
        b = tight.lo[:, None, others].lerp(tight.hi[:, None, others], corners)
        own = (sums[:, :, None] - b.exp().sum(-1)).log()
        fits = (own >= tight.lo[:, free, None]) & (own <= tight.hi[:, free, None])
        value = -1.0 / (1.0 + sums[:, :, None]) - weights[:, free, None] * own
        value = value - (weights[:, None, others] * b).sum(-1)
        best = torch.maximum(best, torch.where(fits, value, -torch.inf).amax((0, 2)))
    assert bool((best > -torch.inf).all())
    assert bool((constant >= best - 1e-9).all())
    # With the tangent at the box's own least sum this is .085.
    assert float((constant - best).max()) < 0.025


def test_a_band_outside_of_the_box_is_empty():
    box = boxes(50, 4, 21)
    whole = Band.of(box)
    beyond = Band(whole.hi + 0.1, whole.hi + 0.2)
    assert bool((confidence.lower_constant(box, drawn_weights(50, 4, 22), beyond) < -1e300).all())
    plane = confidence.upper_plane(box, box.lo, torch.full((50,), 0.1).double(), beyond)
    assert bool((plane.constant < -1e300).all())


def test_nothing_of_a_band_is_cut_off_with_its_box():
    box = boxes(200, 4, 23)
    band = banded(box, 24)
    cut, kept = confidence.tightened(box, band)
    assert bool((cut.hi - cut.lo <= box.hi - box.lo + 1e-6).all())
    for x in samples(box, 25):
        inside = within(band, x)
        inside &= ((x >= box.lo) & (x <= box.hi)).all(-1)  # not beyond its end by rounding
        assert bool(((x >= cut.lo) & (x <= cut.hi)).all(-1)[inside].all())
        assert bool(within(kept, x)[inside].all())


@pytest.mark.parametrize("scale", [1.0, 300.0, 1e5, 1e8])
def test_bands_hold_where_exponentials_overflow(scale):
    """A sum that float64 cannot hold is unbounded, not the largest number that it can."""
    box = boxes(200, 4, 26)
    box = Margins(scale * box.lo, scale * box.hi)
    weights = drawn_weights(200, 4, 27)
    whole = Band.of(box)
    slope = torch.logspace(-6, 3, 200, dtype=torch.float64)
    for band in (whole, Band(whole.lo, whole.middle), Band(whole.middle, whole.hi)):
        plane = confidence.upper_plane(box, box.lo, slope, band)
        constant = confidence.lower_constant(box, weights, band)
        upper_error = confidence.margin(5, plane.weights, box)
        lower_error = confidence.margin(5, weights, box)
        cut, kept = confidence.tightened(box, band)
        for x in samples(box, 28):
            inside = within(band, x) & ((x >= box.lo) & (x <= box.hi)).all(-1)
            p = confidence.probability(x)
            over = plane.constant + upper_error - p + (plane.weights * x).sum(-1)
            assert bool((over >= 0.0)[inside].all())
            under = constant + lower_error + p + (weights * x).sum(-1)
            assert bool((under >= 0.0)[inside].all())
            assert bool(((x >= cut.lo) & (x <= cut.hi)).all(-1)[inside].all())
            assert bool(within(kept, x)[inside].all())


def test_the_margin_of_steep_planes_covers_log_odds_of_margins_near_zero():
    """Log-odds of m margins near 0 are -log m, not 0: a steep line's error is not small there."""
    box = Margins(torch.full((1, 9), -1e-12).double(), torch.full((1, 9), 1e-12).double())
    steep = torch.full((1, 9), 1e3 / 9).double()
    needed = 1e3 * math.log(10) * 2.0**-53
    assert float(confidence.margin(10, steep, box)[0]) >= 8 * needed
