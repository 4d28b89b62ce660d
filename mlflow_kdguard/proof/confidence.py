"""The confidence p = 1 / (1 + Σ exp a_j) of a class in its m margins a_j = z_j - z_k.

For λ <= 0 and μ >= 0: max p(a) - p(b) <= max [λ·a + μ·b] + sup {p(a) - λ·a} + sup {-p(b) - μ·b},
where the suprema range over boxes of the margins and bands of the log-odds t = -log Σ exp a_j.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.proof.arithmetic import (
    HUGE_EXPONENT,
    Array,
    exp,
    gamma,
    logsumexp,
    sigmoid,
)

Pair = tuple[Array, Array]

RELAXED = 1e-11
"""How far sums of exponentials are moved outwards: thousands of times what they can be wrong."""
LEAST = 1e-290
"""Sums of exponentials below are not told from none, nor from this: what float64 rounds to nothing
is no limit, and what it holds with few digits is none either."""
ENDS = 5
"""Classes whose ends are enumerated in `lower_constant`."""
STEEPEST, FLATTEST, LIGHTEST = 1e3, 1e-12, 1e-15
"""Slopes of lines over the log-odds, and weights, are cut to these."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """N parts of one network's margins: box lo, hi (N×m), and band (`least`, `most`, N)."""

    lo: Array
    hi: Array
    least: Array
    most: Array

    @classmethod
    def of(cls, lo: Array, hi: Array) -> "Part":
        """A box, and the band that follows from it."""
        return cls(lo, hi, below(-logsumexp(hi)), above(-logsumexp(lo)))

    @classmethod
    def empty_of(cls, count: int, m: int) -> "Part":
        """Room for `count` parts."""
        return cls(np.zeros((count, m)), np.zeros((count, m)), np.zeros(count), np.zeros(count))

    def put(self, at: NDArray[np.int64], part: "Part") -> None:
        """Write some of the parts."""
        self.lo[at], self.hi[at] = part.lo, part.hi
        self.least[at], self.most[at] = part.least, part.most

    @property
    def empty(self) -> NDArray[np.bool_]:
        """Where nothing is left."""
        gone: NDArray[np.bool_] = (self.lo > self.hi).any(1) | (self.least > self.most)
        return gone

    def take(self, which: NDArray[np.int64]) -> "Part":
        """Some of the parts."""
        return Part(self.lo[which], self.hi[which], self.least[which], self.most[which])

    def masses(self) -> tuple[Array, Array]:
        """Least and largest Σ exp of the margins that the band allows, relaxed outwards: N each."""
        fewest, most = exp(-self.most) * (1.0 - RELAXED), exp(-self.least) * (1.0 + RELAXED)
        fewest = np.where(fewest > LEAST, fewest, 0.0)
        # Beyond, the mass is cut off: no limit at all.
        return fewest, np.where(self.least > -HUGE_EXPONENT, np.maximum(most, LEAST), np.inf)

    def tightened(self) -> "Part":
        """Box and band, each cut to what the other leaves of it."""
        fewest, most = self.masses()
        others = 1.0 - np.eye(self.lo.shape[1])
        room = most[:, None] - (exp(self.lo) @ others) * (1.0 - RELAXED)
        need = fewest[:, None] - (exp(self.hi) @ others) * (1.0 + RELAXED)
        with np.errstate(divide="ignore"):
            high = above(np.log(np.maximum(room, 0.0)))
            low = below(np.log(np.maximum(need, 0.0)))
        lo, hi = np.maximum(self.lo, low), np.minimum(self.hi, high)
        own = Part.of(np.minimum(lo, hi), np.maximum(lo, hi))
        least, most = np.maximum(self.least, own.least), np.minimum(self.most, own.most)
        return Part(lo, hi, least, most)


def below(x: Array) -> Array:
    """`x`, moved down by far more than it can be wrong."""
    moved: Array = x - RELAXED * (1.0 + np.where(np.isinf(x), 0.0, np.abs(x)))
    return moved


def above(x: Array) -> Array:
    """`x`, moved up by far more than it can be wrong."""
    return -below(-x)


def margin(part: Part, weights: Array) -> Array:
    """A-priori rounding error of a constant with multipliers `weights`: N.

    exp, log and division are taken to be right within 4 units in the last place. The log-odds are
    sums of products of margins, within log(m + 1) of one of them.
    """
    m = weights.shape[1]
    size = np.maximum(np.abs(part.lo), np.abs(part.hi)).max(1) + np.log(m + 1.0) + 1.0
    margin_: Array = gamma(64 + 8 * m) * (8.0 + 2.0 * (1.0 + np.abs(weights).sum(1)) * size)
    return margin_


def upper_plane(part: Part, where: Array, steep: Array) -> tuple[Array, Array]:
    """p(a) <= λ·a + c in each part: λ <= 0 (N×m) and c (N), -inf where nothing is left.

    log Σ exp is convex: t <= τ = -(its tangent at a point of the box). p = sigmoid(t) <= sigmoid(τ)
    and p <= sigmoid(most), and τ >= t >= least. c = sup {min(...) - steep τ}, attained at an end of
    τ's interval or where sigmoid' = steep on the concave side; beyond `most` it only falls.
    """
    at = part.lo + where * (part.hi - part.lo)
    share = np.exp(at - logsumexp(at)[:, None])
    share = share / share.sum(1, keepdims=True)
    base = logsumexp(at) - (share * at).sum(1)
    first = np.maximum(-(base + (share * part.hi).sum(1)), part.least)
    last = -(base + (share * part.lo).sum(1))
    empty = first > above(last)
    last = np.maximum(np.minimum(last, part.most), first)
    root = np.sqrt(np.maximum(1.0 - 4.0 * steep, 0.0))
    turn = np.clip(np.log((1.0 + root) ** 2 / (4.0 * steep)), first, last)
    cap = sigmoid(part.most)
    gaps = [np.minimum(sigmoid(t), cap) - steep * t for t in (first, last, turn)]
    constant = np.max(gaps, axis=0) - steep * base
    return -steep[:, None] * share, np.where(empty | part.empty, -np.inf, constant)


def lower_constant(part: Part, weights: Array) -> Array:
    """sup {-p(b) - μ·b} in each part, for μ = `weights` > 0 (N×m): N, -inf where nothing is left.

    With y = exp b: -μ·log y is convex, and p depends on Σ y alone; so for every Σ y all coordinates
    but one are at ends of the box. Ends are enumerated for the classes with the largest ends; the
    others enter through the tangent of the concave -1/(1 + Σ y), where ends are enough as well.
    Σ y is nowhere less than the band's least: below, the tangent there stands for -1/(1 + Σ y).
    """
    order = np.argsort(-part.hi, axis=1, kind="stable")
    lo, hi, mu = (np.take_along_axis(v, order, 1) for v in (part.lo, part.hi, weights))
    top = min(lo.shape[1], ENDS)
    fewest, most = part.masses()
    bent = (1.0 + np.maximum(exp(lo).sum(1) * (1.0 - RELAXED), fewest))[:, None]
    rate = bent[:, 0] ** -2.0
    y_lo, y_hi = exp(lo[:, top:]), exp(hi[:, top:])
    rest_lo, rest_hi = y_lo.sum(1), y_hi.sum(1)
    rest = np.maximum(
        -mu[:, top:] * lo[:, top:], rate[:, None] * (y_hi - y_lo) - mu[:, top:] * hi[:, top:]
    ).sum(1)
    best = np.full(len(lo), -np.inf)
    for free in range(top):
        ends, masses = _corners(lo[:, :top], hi[:, :top], mu[:, :top], free)
        found = _free(
            (lo[:, free, None], hi[:, free, None]), mu[:, free, None],
            1.0 + masses + rest_lo[:, None],
            (
                fewest[:, None] - masses * (1.0 + RELAXED) - rest_hi[:, None] * (1.0 + RELAXED),
                most[:, None] - (masses + rest_lo[:, None]) * (1.0 - RELAXED),
            ),
            bent,
        )  # fmt: skip
        best = np.maximum(best, (found - ends).max(1))
    plain = -sigmoid(part.least) - (weights * part.lo).sum(1)
    return np.where(part.empty, -np.inf, np.minimum(best + rest, plain))


def _corners(lo: Array, hi: Array, mu: Array, free: int) -> tuple[Array, Array]:
    """Σ μ b and Σ exp b over all ends of all coordinates but one: N×2^(m - 1) each."""
    others = [j for j in range(lo.shape[1]) if j != free]
    corners = list(product((0.0, 1.0), repeat=len(others)))
    choice = np.array(corners).reshape(len(corners), len(others))
    linear = (mu * lo)[:, others] @ (1.0 - choice.T) + (mu * hi)[:, others] @ choice.T
    masses = exp(lo)[:, others] @ (1.0 - choice.T) + exp(hi)[:, others] @ choice.T
    return linear, masses


def _free(ends: Pair, mu: Array, c: Array, mass: Pair, bent: Array) -> Array:
    """sup {-1 / (c + exp b) - μ b} over lo <= b <= hi with exp b between both ends of `mass`.

    Where c + exp b is less than `bent`, the tangent at `bent` stands for -1 / (c + exp b); it is
    linear in exp b, so that the ends are still enough there.
    """
    with np.errstate(divide="ignore"):
        first = np.maximum(ends[0], below(np.log(np.maximum(mass[0], 0.0))))
        last = np.minimum(ends[1], above(np.log(np.maximum(mass[1], 0.0))))
        steep = np.minimum(c * mu, 1e200)
        root = (1.0 + np.sqrt(np.maximum(1.0 - 4.0 * steep, 0.0))) / 2.0
        turn = np.log(c) + np.log(root * root / np.maximum(steep, 1e-300))
    empty = first > above(last)
    last = np.maximum(first, last)
    turn = np.clip(turn, first, last)
    values = [_fallen(c + exp(b), bent) - mu * b for b in (first, last, turn)]
    return np.where(empty, -np.inf, np.max(values, axis=0))


def _fallen(total: Array, bent: Array) -> Array:
    """-1 / total, and its tangent at `bent` below it."""
    tangent = (total - bent) / bent / bent - 1.0 / bent
    fallen: Array = np.where(total < bent, tangent, -1.0 / total)
    return fallen


def plain_gap(high: Part, low: Part) -> Array:
    """Upper bound of p(a) - p(b) from the boxes alone: N."""
    return sigmoid(-logsumexp(high.lo)) - sigmoid(-logsumexp(low.hi))


def band_gap(high: Part, low: Part) -> Array:
    """Upper bound of p(a) - p(b) from the bands alone: N."""
    return sigmoid(high.most) - sigmoid(low.least)


def linked_gap(high: Part, low: Part, least: Array) -> Array:
    """Upper bound of p(a) - p(b) where a - b >= `least` (N×m): N.

    The log-odds differ by at most D = max -least, and sigmoid(t + D) - sigmoid(t) is largest at
    t = -D/2, or at the nearest t that the boxes allow.
    """
    rise = np.maximum((-least).max(1), 0.0)
    first = np.maximum(-logsumexp(low.hi), -logsumexp(high.hi) - rise)
    last = np.maximum(-logsumexp(low.lo), first)
    t = np.clip(-rise / 2.0, below(first), above(last))
    # t + rise may cancel.
    gap: Array = sigmoid(t + rise) - sigmoid(t) + gamma(64) * (2.0 + rise)
    return gap
