"""Exact and score intervals for rates, and corrections for asking many questions.

Everything that is gated on is a rate of k among n. It is compared with its limit through a
one-sided bound, never as a point.
"""

from collections.abc import Sequence
from math import hypot, prod, sqrt

from scipy.special import betaincinv, ndtri

CONFIDENCE = 0.95
"""Default one-sided confidence of every gated bound."""


def _checked(k: int, n: int, confidence: float) -> None:
    if not (0 <= k <= n):
        raise ValueError(f"a rate needs 0 <= k <= n, not k={k}, n={n}")
    if not (0.0 < confidence < 1.0):
        raise ValueError(f"a confidence lies strictly between 0 and 1, not {confidence}")


def lower(k: int, n: int, confidence: float = CONFIDENCE) -> float:
    """One-sided Clopper–Pearson lower bound for k successes among n (0 if n is 0)."""
    _checked(k, n, confidence)
    return 0.0 if k == 0 else float(betaincinv(k, n - k + 1, 1.0 - confidence))


def upper(k: int, n: int, confidence: float = CONFIDENCE) -> float:
    """One-sided Clopper–Pearson upper bound for k successes among n (1 if n is 0)."""
    _checked(k, n, confidence)
    return 1.0 if k == n else float(betaincinv(k + 1, n - k, confidence))


def claimed_lower(k: int, n: int, error: float, confidence: float = CONFIDENCE) -> float:
    """Lower bound of a share of which each of n items was found with a test that may err.

    k items were found; an item that does not belong is found with probability `error` at most, by
    randomness of its own. Where the share is p, an item is found with p + (1 - p)·error at most;
    so with q the Clopper–Pearson lower bound of what is found, p >= (q - error) / (1 - error). All
    errors are in that: they take nothing from `confidence`, and need not be divided among items.
    """
    if not 0.0 <= error < 1.0:
        raise ValueError(f"an error lies in [0, 1), not {error}")
    return max(0.0, (lower(k, n, confidence) - error) / (1.0 - error))


def missed_upper(k: int, n: int, error: float, confidence: float = CONFIDENCE) -> float:
    """Upper bound of a share whose items are missed with probability `error` at most each."""
    if not 0.0 <= error < 1.0:
        raise ValueError(f"an error lies in [0, 1), not {error}")
    return min(1.0, upper(k, n, confidence) / (1.0 - error))


def bonferroni(confidence: float, questions: int) -> float:
    """Confidence at which each of `questions` bounds is taken so that all hold together."""
    if questions < 1:
        raise ValueError(f"at least one question is asked, not {questions}")
    return 1.0 - (1.0 - confidence) / questions


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down adjusted p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return tuple(adjusted)


def wilson(k: int, n: int, z: float) -> tuple[float, float]:
    """Wilson score interval of a rate at `z` standard errors."""
    p, z2 = k / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * sqrt((p * (1 - p) + z2 / (4 * n)) / n) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference_upper(
    both: int, only_first: int, only_second: int, neither: int, confidence: float = CONFIDENCE
) -> float:
    """One-sided upper bound of rate₁ - rate₂ measured on the same items.

    Newcombe's square-and-add score interval for paired proportions (Statistics in Medicine
    17, 1998, 2635, method 10, with its continuity-corrected phi). The four counts are items on
    which both, only the first, only the second, or neither succeeded. Returns 1 without items.
    """
    n = both + only_first + only_second + neither
    for cell in (both, only_first, only_second, neither):
        _checked(cell, n, confidence)
    if n == 0:
        return 1.0
    z = float(ndtri(confidence))
    k1, k2 = both + only_first, both + only_second
    p1, p2 = k1 / n, k2 / n
    upper1, lower2 = wilson(k1, n, z)[1], wilson(k2, n, z)[0]
    phi = _newcombe_phi(both, only_first, only_second, neither)
    d1, d2 = upper1 - p1, p2 - lower2
    return min(1.0, p1 - p2 + sqrt(max(0.0, d1 * d1 - 2 * phi * d1 * d2 + d2 * d2)))


def independent_difference_upper(
    k1: int, n1: int, k2: int, n2: int, confidence: float = CONFIDENCE
) -> float:
    """One-sided upper bound of rate₁ - rate₂ on different items.

    Newcombe's square-and-add score interval (Statistics in Medicine 17, 1998, 873, method 10).
    Returns 1 when either rate was never measured.
    """
    _checked(k1, n1, confidence)
    _checked(k2, n2, confidence)
    if n1 == 0 or n2 == 0:
        return 1.0
    z = float(ndtri(confidence))
    p1, p2 = k1 / n1, k2 / n2
    up, down = wilson(k1, n1, z)[1] - p1, p2 - wilson(k2, n2, z)[0]
    return min(1.0, p1 - p2 + hypot(up, down))


def _newcombe_phi(both: int, only_first: int, only_second: int, neither: int) -> float:
    n = both + only_first + only_second + neither
    margins = (both + only_first, only_second + neither, both + only_second, only_first + neither)
    if 0 in margins:
        return 0.0
    determinant = float(both * neither - only_first * only_second)
    if determinant > 0:
        determinant = max(0.0, determinant - n / 2)
    return determinant / prod(sqrt(margin) for margin in margins)
