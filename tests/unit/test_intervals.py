"""Intervals against enumeration, brute force and published examples."""

from fractions import Fraction
from itertools import pairwise, product
from math import comb, lgamma

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mlflow_kdguard import intervals

CONFIDENCES = (0.8, 0.95, 0.99)


def _tail_at_most(k: int, n: int, p: Fraction) -> Fraction:
    """P(X <= k) for X ~ Binomial(n, p), exactly."""
    return sum((comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1)), start=Fraction(0))


# ── Clopper–Pearson ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_clopper_pearson_solves_the_binomial_tail(n: int, confidence: float) -> None:
    alpha = 1 - confidence
    for k in range(n):
        u = Fraction(intervals.upper(k, n, confidence))
        assert float(_tail_at_most(k, n, u)) == pytest.approx(alpha, rel=1e-9)
    for k in range(1, n + 1):
        low = Fraction(intervals.lower(k, n, confidence))
        assert float(1 - _tail_at_most(k - 1, n, low)) == pytest.approx(alpha, rel=1e-9)


@pytest.mark.parametrize("n", [1, 5, 20, 60])
def test_clopper_pearson_covers_at_least_its_confidence(n: int) -> None:
    """Exact coverage: for every p, the outcomes whose bound holds have probability >= 95 %."""
    uppers = np.array([intervals.upper(k, n) for k in range(n + 1)])
    lowers = np.array([intervals.lower(k, n) for k in range(n + 1)])
    # Coverage is smallest just beyond an end point, where one outcome stops being covered.
    for p in np.concatenate(
        [np.linspace(0.001, 0.999, 199), uppers[:-1] + 1e-9, lowers[1:] - 1e-9]
    ):
        mass = np.array([comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])
        assert mass[uppers >= p].sum() >= 0.95 - 1e-8
        assert mass[lowers <= p].sum() >= 0.95 - 1e-8


@given(st.integers(0, 3000), st.integers(0, 3000), st.sampled_from(CONFIDENCES))
def test_clopper_pearson_laws(k: int, n: int, confidence: float) -> None:
    assume(k <= n)
    low, up = intervals.lower(k, n, confidence), intervals.upper(k, n, confidence)
    assert 0 <= low <= up <= 1
    if n:
        assert low <= k / n <= up
    assert up == pytest.approx(1 - intervals.lower(n - k, n, confidence), abs=1e-12)
    assert intervals.upper(k, n, 0.999) >= up
    if k < n:
        assert intervals.upper(k + 1, n, confidence) >= up
        assert intervals.lower(k + 1, n, confidence) >= low


def test_known_values() -> None:
    assert intervals.upper(0, 100) == pytest.approx(1 - 0.05 ** (1 / 100), abs=1e-12)
    assert intervals.lower(100, 100) == pytest.approx(0.05 ** (1 / 100), abs=1e-12)
    # The policy's own example: a share of at least 0.90 among 100 (docs/threat-model.md, 4).
    assert intervals.lower(95, 100) < 0.90 <= intervals.lower(96, 100)


def test_nothing_measured_proves_nothing() -> None:
    assert (intervals.lower(0, 0), intervals.upper(0, 0)) == (0.0, 1.0)
    assert intervals.paired_difference_upper(0, 0, 0, 0) == 1.0
    assert intervals.independent_difference_upper(0, 0, 5, 10) == 1.0
    assert intervals.independent_difference_upper(5, 10, 0, 0) == 1.0


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, -1)])
def test_impossible_counts_are_refused(k: int, n: int) -> None:
    for bound in (intervals.lower, intervals.upper):
        with pytest.raises(ValueError, match="0 <= k <= n"):
            bound(k, n)
    with pytest.raises(ValueError, match="0 <= k <= n"):
        intervals.independent_difference_upper(k, n, 1, 2)
    with pytest.raises(ValueError, match="0 <= k <= n"):
        intervals.paired_difference_upper(5, -1, 1, 1)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -0.1, 95.0, float("nan")])
def test_impossible_confidences_are_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence"):
        intervals.upper(1, 2, confidence)
    with pytest.raises(ValueError, match="confidence"):
        intervals.paired_difference_upper(1, 1, 1, 1, confidence)


# ── Many questions ──────────────────────────────────────────────────────────────────────────────

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=8)


@given(P_VALUES)
def test_holm_is_the_step_down_procedure(p_values: list[float]) -> None:
    """Adjusted p <= alpha exactly where Holm's procedure at level alpha rejects."""
    adjusted = intervals.holm(p_values)
    for alpha in (0.01, 0.05, 0.2, 0.5):
        rejected: set[int] = set()
        order = sorted(range(len(p_values)), key=lambda i: p_values[i])
        for rank, i in enumerate(order):
            if (len(p_values) - rank) * p_values[i] > alpha:
                break
            rejected.add(i)
        assert {i for i, p in enumerate(adjusted) if p <= alpha} == rejected


@given(P_VALUES, st.randoms())
def test_holm_laws(p_values: list[float], random: object) -> None:
    adjusted = intervals.holm(p_values)
    for raw, p in zip(p_values, adjusted, strict=True):
        assert raw <= p <= min(1.0, len(p_values) * raw)  # never stricter than Bonferroni
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    assert all(adjusted[a] <= adjusted[b] for a, b in pairwise(order))
    shuffled = list(range(len(p_values)))
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again = intervals.holm([p_values[i] for i in shuffled])
    assert [again[shuffled.index(i)] for i in range(len(p_values))] == list(adjusted)


def test_holm_of_nothing() -> None:
    assert intervals.holm([]) == ()


@given(st.floats(0.5, 0.999), st.integers(1, 1000))
def test_bonferroni_splits_the_error(confidence: float, questions: int) -> None:
    each = intervals.bonferroni(confidence, questions)
    assert confidence <= each < 1
    assert questions * (1 - each) == pytest.approx(1 - confidence, rel=1e-9)


def test_bonferroni_needs_a_question() -> None:
    with pytest.raises(ValueError, match="at least one"):
        intervals.bonferroni(0.95, 0)


# ── Differences ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("k1", "n1", "k2", "n2", "low", "up"),
    [  # Newcombe, Statistics in Medicine 17 (1998) 873, table II, method 10
        (56, 70, 48, 80, 0.0524, 0.3339),
        (9, 10, 3, 10, 0.1705, 0.8090),
        (6, 7, 2, 7, 0.0582, 0.8062),
        (5, 56, 0, 29, -0.0381, 0.1926),
        (0, 10, 0, 20, -0.1611, 0.2775),
        (0, 10, 0, 10, -0.2775, 0.2775),
        (10, 10, 0, 20, 0.6791, 1.0),
        (10, 10, 0, 10, 0.6075, 1.0),
    ],
)
def test_independent_difference_published(
    k1: int, n1: int, k2: int, n2: int, low: float, up: float
) -> None:
    """A two-sided 95 % interval is two one-sided bounds at 97.5 %."""
    bound = intervals.independent_difference_upper
    assert bound(k1, n1, k2, n2, 0.975) == pytest.approx(up, abs=6e-5)
    assert -bound(k2, n2, k1, n1, 0.975) == pytest.approx(low, abs=6e-5)


@pytest.mark.parametrize(
    ("cells", "low", "up", "digits"),
    [
        # Newcombe, Statistics in Medicine 17 (1998) 2635, method 10
        ((36, 12, 2, 0), 0.0569, 0.3404, 4),
        # Fagerland, Lydersen, Laake, Statistics in Medicine 33 (2014) 2850: airway reactivity
        ((1, 1, 7, 12), -0.507, -0.026, 3),
    ],
)
def test_paired_difference_published(
    cells: tuple[int, int, int, int], low: float, up: float, digits: int
) -> None:
    a, b, c, d = cells
    assert round(intervals.paired_difference_upper(a, b, c, d, 0.975), digits) == up
    assert round(-intervals.paired_difference_upper(a, c, b, d, 0.975), digits) == low


CELLS = st.tuples(*[st.integers(0, 200)] * 4)


@given(CELLS, st.sampled_from(CONFIDENCES))
def test_paired_difference_laws(cells: tuple[int, int, int, int], confidence: float) -> None:
    a, b, c, d = cells
    assume(a + b + c + d > 0)
    up = intervals.paired_difference_upper(a, b, c, d, confidence)
    difference = (b - c) / (a + b + c + d)
    assert difference <= up <= 1
    # Counting the second net's failures against the first's asks the same question.
    assert up == pytest.approx(intervals.paired_difference_upper(d, b, c, a, confidence), abs=1e-9)
    assert intervals.paired_difference_upper(a, b, c, d, 0.999) >= up - 1e-12


def test_more_images_of_the_same_kind_tighten_the_bound() -> None:
    bounds = [
        intervals.paired_difference_upper(90 * m, 4 * m, 1 * m, 5 * m) for m in (1, 3, 10, 30)
    ]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] - 0.03 < 0.01


def _coverages(n: int, worlds: list[tuple[float, float, float]]) -> list[float]:
    """Exact coverage of the paired bound: all tables of n items, under each (p1, p2, overlap)."""
    tables = [(a, b, c, n - a - b - c) for a, b, c in product(range(n + 1), repeat=3)
              if a + b + c <= n]  # fmt: skip
    bounds = np.array([intervals.paired_difference_upper(*table) for table in tables])
    cells = np.array(tables, dtype=float)
    ways = np.array([lgamma(n + 1) - sum(lgamma(x + 1) for x in table) for table in tables])
    answers = []
    for p1, p2, overlap in worlds:
        both = max(0.0, p1 + p2 - 1) + overlap * (min(p1, p2) - max(0.0, p1 + p2 - 1))
        p = np.clip([both, p1 - both, p2 - both, 1 - p1 - p2 + both], 1e-300, 1)
        mass = np.exp(ways + cells @ np.log(p))
        answers.append(float(mass[bounds >= p1 - p2 - 1e-12].sum()))
    return answers


def test_paired_difference_coverage_where_it_is_used() -> None:
    """Teacher 80 to 98 %, drop up to 10 points, any overlap of mistakes: never below 93 %.

    The interval is approximate. With ten items it covers 92.96 % at worst in this region, and
    90.5 % far outside it (rates of 0.65 against 0.35); with 20 items or more it holds here.
    """
    worlds = [
        (p1, p1 - drop, overlap)
        for p1 in (0.80, 0.85, 0.90, 0.95, 0.98)
        for drop in (0.0, 0.02, 0.05, 0.10)
        for overlap in (0.0, 0.3, 0.6, 0.9, 0.99)
    ]
    for n in (20, 32):
        coverages = _coverages(n, worlds)
        assert min(coverages) >= 0.93
        assert 0.95 <= float(np.mean(coverages)) <= 0.995


def test_wilson_contains_the_rate_and_meets_the_score_equation() -> None:
    for k, n, z in [(0, 10, 1.96), (3, 10, 1.64), (10, 10, 2.5), (480, 500, 1.96)]:
        low, up = intervals.wilson(k, n, z)
        assert 0 <= low <= k / n <= up <= 1
        for end in (low, up):
            if 0 < end < 1:
                assert abs(k / n - end) == pytest.approx(z * (end * (1 - end) / n) ** 0.5, rel=1e-9)
