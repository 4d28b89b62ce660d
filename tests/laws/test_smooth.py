"""Laws of smoothed pairs: against closed forms, quadrature and attacks that share no code."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import binom, kstest, norm

from mlflow_kdguard import intervals, noise
from mlflow_kdguard.certify.layers import THRESHOLDS, Layers, Moments, counts, hoeffding
from mlflow_kdguard.certify.smooth import certify_smooth
from mlflow_kdguard.config import SmoothSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.files import sha256

Values = NDArray[np.float64]
SIGMA = 0.02
"""So small that noise on grey pixels never meets the ends of [0, 1]."""


@dataclass
class Linear:
    """Two classes: softmax_1 = sigmoid(steepness·(a·(x - centre) - shift))."""

    a: Values
    shift: float = 0.0
    steepness: float = 1.0
    provider: str = "NumPy"
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        self.sha256 = sha256(repr((self.a.tolist(), self.shift, self.steepness)).encode())

    def logits(
        self, x: NDArray[np.float32], batch: int = 1, *, indices: object = None
    ) -> NDArray[np.float32]:
        flat = x.reshape(len(x), -1).astype(np.float64) - 0.5
        z = self.steepness * (flat @ self.a - self.shift)
        return np.stack([np.zeros_like(z), z], 1).astype(np.float32)


def grey(n: int = 1, size: int = 5) -> Dataset:
    """Images of class 0, all grey."""
    x = np.full((n, 1, 1, size), 0.5, np.float32)
    return Dataset.of(x, np.zeros(n, np.int64), uri="npz:grey", classes=2)


def direction(seed: int, size: int = 5) -> Values:
    a = np.random.default_rng(seed).normal(size=size)
    return np.asarray(a / np.linalg.norm(a))


def section(**changes: float) -> SmoothSection:
    values = {"sigma": SIGMA, "radius": SIGMA, "samples": 1, "draws": 500, "error": 0.05}
    return SmoothSection.model_validate(values | changes)


# ── The bound against what is true ──────────────────────────────────────────────────────────────

SHAPES: dict[str, Callable[[Values], Values]] = {
    "step": lambda z: (z > 1.2).astype(np.float64),
    "rare step": lambda z: (z > 2.6).astype(np.float64),
    "slope": lambda z: expit(2.0 * z - 3.0),
    "small": lambda z: 0.004 * expit(z),
    "nearly constant": lambda z: 0.3 + 1e-6 * expit(z),
    "zero": np.zeros_like,
    "one": np.ones_like,
    "half a step": lambda z: 0.011 + 0.4 * (z > 0.5),
}
"""Increasing functions of one normal number: the worst point at distance c shifts it by c."""


def shifted_mean(shape: Callable[[Values], Values], shift: float) -> float:
    """E shape(z + shift) by quadrature."""
    points = [t - shift for t in (0.5, 1.2, 2.6)]
    value, _ = quad(
        lambda z: float(shape(np.array(z + shift))) * norm.pdf(z), -10, 10, points=points, limit=400
    )
    return float(value)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
def test_the_interval_covers_as_often_as_it_says(name: str, shift: float) -> None:
    """1,000 samples of 200 draws: the bound is below the truth at most as often as `error` allows.

    For steps all thresholds but the rare ones count the same event, so that even error/13 holds;
    a bound that is the plain mean would fail about every other time.
    """
    shape, error, runs = SHAPES[name], 0.2, 1000
    truth = shifted_mean(shape, shift)
    random = np.random.default_rng(sum(map(ord, name)))
    missed = 0
    for _ in range(runs):
        layers = Layers(counts(shape(random.standard_normal(200))), 200, error)
        missed += bool(layers.upper(shift) < truth - 1e-9)
    level = error / len(THRESHOLDS) if "step" in name and name != "half a step" else error
    assert missed <= binom.ppf(1 - 1e-6, runs, level)


def test_a_bound_without_its_confidence_would_be_caught() -> None:
    """The test above has teeth: counts without Clopper and Pearson miss far too often."""
    random = np.random.default_rng(0)
    shape, runs = SHAPES["step"], 1000
    truth = shifted_mean(shape, 0.5)
    shares = (shape(random.standard_normal((runs, 200)))).mean(1)
    missed = int((norm.cdf(norm.ppf(shares) + 0.5) < truth).sum())
    assert missed > binom.ppf(1 - 1e-6, runs, 0.2)


def test_with_endless_draws_a_step_is_met_exactly() -> None:
    """Given the distribution at the image, no smaller bound exists: Neyman and Pearson's case."""
    n = 10**9
    for share in (0.001, 0.1, 0.5, 0.9):
        k = np.full(len(THRESHOLDS), round(share * n))
        for shift in (0.0, 0.25, 1.0, 3.0):
            exact = norm.cdf(norm.ppf(share) + shift)
            assert exact <= Layers(k, n, 0.01).upper(shift) <= exact + 1e-3


@given(st.floats(0, 1), st.floats(0, 3))
def test_never_above_the_formula_that_knows_the_mean_difference_only(
    share: float, shift: float
) -> None:
    """2Φ(Φ⁻¹(h) + r/σ) - 1 with h = (d + 1)/2, for d in {0, 1} with the same mean."""
    n = 10**9
    k = np.full(len(THRESHOLDS), round(share * n))
    formula = 2 * norm.cdf(norm.ppf((k[0] / n + 1) / 2) + shift) - 1
    assert Layers(k, n, 0.01).upper(shift) <= formula + 2e-3


SORTED = st.lists(st.integers(0, 300), min_size=len(THRESHOLDS), max_size=len(THRESHOLDS)).map(
    lambda found: np.array(sorted(found, reverse=True))
)


@given(SORTED, st.floats(0, 4), st.floats(0, 4), st.integers(0, len(THRESHOLDS) - 1))
def test_monotone(k: Values, shift: float, more: float, at: int) -> None:
    """In distance, in what was counted, in draws, in the error, in the slack."""
    layers = Layers(np.asarray(k, np.int64), 300, 0.01)
    bound = float(layers.upper(shift))
    assert 0.0 <= bound <= 1.0
    assert bound <= float(layers.upper(shift + more)) + 1e-12
    higher = layers.counts.copy()
    higher[: at + 1] = np.maximum(higher[: at + 1], min(300, int(higher[at]) + 1))
    assert bound <= float(Layers(higher, 300, 0.01).upper(shift)) + 1e-12
    assert float(Layers(10 * layers.counts, 3000, 0.01).upper(shift)) <= bound + 1e-12
    assert bound <= float(Layers(layers.counts, 300, 0.001).upper(shift)) + 1e-12
    assert bound <= float(Layers(layers.counts, 300, 0.01, slack=0.01).upper(shift)) + 1e-12
    grid = layers.upper(np.array([shift, shift + more]))
    assert grid.shape == (2,)
    assert grid[0] == bound


def test_the_mean_of_what_was_drawn_is_below_the_bound() -> None:
    for seed in range(50):
        random = np.random.default_rng(seed)
        values = random.beta(*random.uniform(0.05, 3, 2), size=int(random.integers(1, 400)))
        assert values.mean() <= Layers(counts(values), len(values), 0.05).upper(0.0)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.0])
def test_lower_bounds_of_means_cover(scale: float) -> None:
    """Empirical Bernstein and Hoeffding: 2,000 samples, three means at once."""
    random, error, runs, n = np.random.default_rng(3), 0.2, 2000, 100
    p = np.array([0.5, 0.05, 0.9])
    missed = [0, 0]
    for _ in range(runs):
        draws = scale * (2.0 * (random.random((n, 3)) < p) - 1.0)
        moments = Moments(n, draws.sum(0), (draws**2).sum(0))
        off = np.abs(moments.mean - scale * (2 * p - 1))
        missed[0] += bool((off > moments.radius(error) + 1e-12).any())
        missed[1] += bool((off / 2 > hoeffding(n, 3, error)).any())
    assert max(missed) <= binom.ppf(1 - 1e-6, runs, error)
    assert (Moments(1, p, p).radius(error) >= 2.0).all()


# ── The whole certificate against closed forms ──────────────────────────────────────────────────


@pytest.mark.parametrize("steps", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_a_step_against_a_constant_is_known_exactly(steps: float, shift: float) -> None:
    """The reference always answers 0, the student answers 1 where a·x > shift·σ. At distance r
    along a, the smoothed gap is Φ(r/σ - shift), and no point of the ball has more.
    """
    a, radius = direction(1), max(steps, 1e-9) * SIGMA
    student = Linear(a, shift=shift * SIGMA, steepness=1e7)
    reference = Linear(np.zeros(5), shift=1.0, steepness=1e3)
    report = certify_smooth(
        reference, student, grey(), config=section(draws=20_000, radius=radius, error=1e-4)
    )
    (sample,), truth = report.samples, norm.cdf(steps - shift)
    assert truth <= sample.upper <= truth + 0.06
    assert sample.lower <= norm.cdf(-shift) <= sample.lower + 0.05
    assert sample.gap_mean == pytest.approx(norm.cdf(-shift), abs=0.01)


NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(120)


def logistic_mean(mean: float, deviation: float) -> float:
    """E sigmoid(N(mean, deviation²)) by Gauss and Hermite's quadrature."""
    return float(expit(mean + deviation * NODES) @ WEIGHTS / math.sqrt(2 * math.pi))


@pytest.mark.parametrize("seed", range(6))
def test_sigmoid_pairs_at_the_worst_point(seed: int) -> None:
    """Two sigmoids of different directions: the true smoothed gap, at 400 points of the sphere and
    along both directions, never exceeds the bound, and the gap at the image never falls below
    the lower one.
    """
    random = np.random.default_rng(seed)
    nets = [
        Linear(
            direction(10 * seed + i) * random.uniform(10, 60), shift=random.normal(), steepness=1
        )
        for i in range(2)
    ]
    config = section(radius=SIGMA * random.uniform(0.2, 2), draws=2000, error=1e-4)
    (sample,) = certify_smooth(nets[0], nets[1], grey(), config=config).samples
    ways = random.normal(size=(400, 5))
    ways = np.concatenate([ways, nets[0].a[None], -nets[0].a[None], nets[1].a[None],
                           -nets[1].a[None], nets[1].a[None] - nets[0].a[None]])  # fmt: skip
    ways *= config.radius / np.linalg.norm(ways, axis=1, keepdims=True)

    def gap(way: Values) -> float:
        means = [
            logistic_mean(float(net.a @ way) - net.shift, SIGMA * float(np.linalg.norm(net.a)))
            for net in nets
        ]
        return abs(means[0] - means[1])

    assert max(gap(way) for way in ways) <= sample.upper
    assert sample.lower <= gap(np.zeros(5))


def test_equal_and_constant_networks() -> None:
    """Nothing but the price of finite draws: the bound is what no exceedance among n allows."""
    net = Linear(direction(2) * 30)
    config = section(draws=1000, error=0.001)
    (sample,) = certify_smooth(net, net, grey(), config=config).samples
    share = 1.0 - (0.001 / len(THRESHOLDS)) ** (1 / 1000)
    assert (sample.lower, sample.gap_mean) == (0.0, 0.0)
    assert sample.upper == pytest.approx(norm.cdf(norm.ppf(share) + 1.0), rel=1e-3)
    far = [Linear(np.zeros(5), shift=s, steepness=1e3) for s in (1.0, -1.0)]
    (sample,) = certify_smooth(far[0], far[1], grey(), config=config).samples
    assert sample.upper == 1.0
    assert sample.lower > 0.9


def test_an_attack_on_the_smoothed_gap_stays_below_the_bound() -> None:
    """Ascent over the mean of 256 draws in torch, judged with 20,000 fresh ones."""
    import torch

    random = np.random.default_rng(5)
    for seed in range(4):
        weights = [
            (random.normal(size=(8, 6)) * 3, random.normal(size=8), random.normal(size=(3, 8)) * 3)
            for _ in range(2)
        ]
        pair = [Mlp(*w) for w in weights]
        x = random.uniform(0.1, 0.9, (1, 1, 1, 6)).astype(np.float32)
        data = Dataset.of(x, np.zeros(1, np.int64), uri="npz:one", classes=3)
        config = section(sigma=0.2, radius=0.15, draws=4000, error=1e-6)
        (sample,) = certify_smooth(pair[0], pair[1], data, config=config).samples
        for k in range(3):
            point = _ascended(weights, x.reshape(-1), k, config, seed, torch)
            assert np.linalg.norm(point - x.reshape(-1)) <= 0.15 + 1e-6
            fresh = np.clip(point + 0.2 * random.normal(size=(20_000, 6)), 0, 1).astype(np.float32)
            answers = [_soft(net.logits(fresh.reshape(-1, 1, 1, 6))) for net in pair]
            found = abs(float((answers[0] - answers[1])[:, k].mean()))
            assert found - 2 * hoeffding(20_000, 1, 1e-9) <= sample.upper


@dataclass
class Mlp:
    """One hidden layer, three classes."""

    first: Values
    bias: Values
    second: Values
    provider: str = "NumPy"

    @property
    def sha256(self) -> str:
        return sha256(self.first.tobytes() + self.second.tobytes())

    def logits(
        self, x: NDArray[np.float32], batch: int = 1, *, indices: object = None
    ) -> NDArray[np.float32]:
        flat = x.reshape(len(x), -1).astype(np.float64)
        hidden = np.maximum(0.0, (flat - 0.5) @ self.first.T + self.bias)
        return np.asarray(hidden @ self.second.T, np.float32)


def _soft(z: NDArray[np.float32]) -> Values:
    e = np.exp(z - z.max(1, keepdims=True)).astype(np.float64)
    return np.asarray(e / e.sum(1, keepdims=True))


def _ascended(weights, x, k, config, seed, torch):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)
    z = config.sigma * torch.randn((256, len(x)), generator=generator, dtype=torch.float64)
    start = torch.from_numpy(x.astype(np.float64))
    move = torch.zeros_like(start, requires_grad=True)
    params = [[torch.from_numpy(part) for part in net] for net in weights]
    best, at = -1.0, start
    for sign in (1.0, -1.0):
        move = torch.zeros_like(start, requires_grad=True)
        for _ in range(40):
            noisy = (start + move + z).clamp(0, 1) - 0.5
            soft = [
                torch.relu(noisy @ first.T + bias).matmul(second.T).softmax(1)[:, k].mean()
                for first, bias, second in params
            ]
            value = sign * (soft[0] - soft[1])
            if value.item() > best:
                best, at = value.item(), (start + move).detach()
            (slope,) = torch.autograd.grad(value, move)
            with torch.no_grad():
                stepped = move + 0.05 * slope / (slope.norm() + 1e-12)
                scale = min(1.0, config.radius / (stepped.norm().item() + 1e-12))
            move = (stepped * scale).requires_grad_()
    return at.numpy()


# ── Noise ───────────────────────────────────────────────────────────────────────────────────────


def test_noise_is_normal_on_its_grid_and_clipped() -> None:
    image = np.random.default_rng(0).random((3, 40, 40), dtype=np.float32) * 0.2 + 0.4
    random = noise.generator("a", "b")
    drawn = np.concatenate(list(noise.noisy(image, sigma=0.03, draws=300, random=random)))
    assert drawn.shape == (300, 3, 40, 40)
    assert drawn.dtype == np.float32
    assert (np.rint(drawn / noise.GRID) * noise.GRID == drawn).all()
    assert kstest(((drawn - image) / 0.03).ravel()[::7], "norm").pvalue > 1e-4
    loud = np.concatenate(list(noise.noisy(image, sigma=2.0, draws=50, random=random)))
    assert (loud.min(), loud.max()) == (0.0, 1.0)
    assert np.mean(loud == 0) == pytest.approx(norm.cdf(-0.25), abs=0.01)


def test_noise_does_not_betray_the_image_behind_it() -> None:
    """In float32 the low bits of x + z depend on x; on the grid all images have the same values."""
    images = [np.full((1, 1, 4), v, np.float32) for v in (0.5, 0.5 + 2**-24, 1 / 3)]
    for image in images:
        (drawn,) = noise.noisy(image, sigma=0.1, draws=200, random=noise.generator("x"))
        scaled = drawn.astype(np.float64) * 2**20
        assert (scaled == np.rint(scaled)).all()


def test_noise_follows_from_what_it_is_told() -> None:
    image = np.full((1, 30, 30), 0.5, np.float32)

    def first(*parts: str) -> Values:
        return next(noise.noisy(image, sigma=0.1, draws=3, random=noise.generator(*parts)))  # type: ignore[return-value]

    assert (first("a", "b") == first("a", "b")).all()
    for other in (("a", "c"), ("ab",), ("a\x1fb", "")):
        assert (first("a", "b") != first(*other)).any()


def test_blocks_are_small_where_images_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "LARGEST_BLOCK", 1000)
    image = np.full((1, 20, 20), 0.5, np.float32)
    sizes = [len(b) for b in noise.noisy(image, sigma=1, draws=7, random=noise.generator("x"))]
    assert sizes == [2, 2, 2, 1]


def test_the_slack_is_what_rounding_can_move() -> None:
    assert noise.slack(784, 0.25) == 784 * 2.0**-28
    assert noise.slack(784, 4.0) == 784 * 2.0**-26
    assert noise.slack(3 * 224 * 224, 1.0) < 1e-3


# ── Shares of a population ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("p", "error"), [(0.8, 0.0), (0.8, 0.05), (0.5, 0.2), (0.0, 0.05)])
def test_shares_keep_their_level_where_items_are_found_by_chance(p: float, error: float) -> None:
    """20,000 draws of 100 images, the others found with `error`: wrong in 5 % at most."""
    random, runs, n = np.random.default_rng(1), 20_000, 100
    found = (random.random((runs, n)) < p + (1 - p) * error).sum(1)
    bounds = np.array([intervals.claimed_lower(k, n, error) for k in range(n + 1)])
    assert (bounds[found] > p).sum() <= binom.ppf(1 - 1e-6, runs, 0.05)
    missed = (random.random((runs, n)) < p * (1 - error)).sum(1)
    uppers = np.array([intervals.missed_upper(k, n, error) for k in range(n + 1)])
    assert (uppers[missed] < p).sum() <= binom.ppf(1 - 1e-6, runs, 0.05)


@given(st.integers(0, 100), st.floats(0, 0.99))
def test_chance_only_ever_takes_from_a_share(k: int, error: float) -> None:
    assert intervals.claimed_lower(k, 100, error) <= intervals.lower(k, 100) + 1e-15
    assert intervals.missed_upper(k, 100, error) >= intervals.upper(k, 100)
    assert intervals.claimed_lower(k, 100, 0.0) == intervals.lower(k, 100)
    for wrong in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="error"):
            intervals.claimed_lower(k, 100, wrong)
        with pytest.raises(ValueError, match="error"):
            intervals.missed_upper(k, 100, wrong)
