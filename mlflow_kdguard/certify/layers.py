"""From draws under noise to bounds on a mean around the image: counts above thresholds.

w is a function of images with values in [0, 1], of which `n` noisy values were seen. Its mean
under noise at a point x' with |x' - x|₂ <= r is ∫₀¹ P_x'(w > t) dt, and Neyman and Pearson's lemma
bounds every one of these probabilities by that at x (Cohen et al., arXiv 1902.02918; the integral:
Kumar et al., arXiv 2009.08061):

    P_x'(w > t) <= Φ(Φ⁻¹(P_x(w > t)) + r/σ).

P_x(w > t) is bounded from above at each of a few fixed thresholds (Clopper–Pearson, the error
divided among them); between two thresholds it is at most what it is at the lower one. Given the
distribution of w at x, no smaller bound exists; by Jensen's inequality it is below the one that
knows the mean of w only, and far below 2Φ(Φ⁻¹(h) + r/σ) - 1 with h = (p_S - p_T + 1)/2, which is
0.68 at r = σ for two equal networks.
"""

from dataclasses import dataclass
from math import log, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtr, ndtri

Values = NDArray[np.float64]

THRESHOLDS: Values = np.concatenate([[0.0], np.geomspace(0.01, 1.0, 13)[:-1]])
"""Where counts are taken: measured on training images, more than twelve hardly tighten."""
_OUTWARD = 1e-9
"""Relative error that is granted to betaincinv, ndtri and ndtr (theirs is below 1e-12)."""


@dataclass(frozen=True, slots=True, eq=False)
class Layers:
    """How many of `n` values of w exceeded each threshold; `slack` is granted to each share.

    Every bound of `upper`, whatever the distance, holds at once with probability 1 - `error`.
    """

    counts: NDArray[np.int64]
    n: int
    error: float
    slack: float = 0.0

    def exceeding(self) -> Values:
        """Upper bounds of P(w > t), a threshold each."""
        n, k = self.n, self.counts.astype(np.float64)
        level = 1.0 - self.error / len(THRESHOLDS)
        bound = np.ones(len(k))
        open_ = k < n
        bound[open_] = betaincinv(k[open_] + 1.0, n - k[open_], level)
        return np.asarray(np.minimum(1.0, bound * (1.0 + _OUTWARD) + self.slack))

    def upper(self, shifts: float | Values) -> Any:
        """What the mean of w is at most wherever x' is within `shifts` (r/σ, any shape) of x."""
        shift = np.asarray(shifts, np.float64)[..., None]
        there = ndtr(ndtri(self.exceeding()) + shift) * (1.0 + _OUTWARD)
        widths = np.diff(THRESHOLDS, append=1.0)
        return np.minimum(1.0, (np.minimum(1.0, there) * widths).sum(-1))


def counts(values: Values) -> NDArray[np.int64]:
    """How many of some values of w (N) exceed each threshold."""
    return np.asarray((values[:, None] > THRESHOLDS).sum(0), np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Sums and sums of squares (K each) of `n` vectors with values in an interval of width 2."""

    n: int
    total: Values
    squares: Values

    @property
    def mean(self) -> Values:
        """Their mean (K)."""
        return self.total / self.n

    def radius(self, error: float) -> Values:
        """Half widths (K) of intervals for the means that hold together: empirical Bernstein.

        Maurer and Pontil (arXiv 0907.3740, theorem 4), two-sided, the error divided among them.
        """
        if self.n < 2:
            return np.full(len(self.total), 2.0)
        variance = np.maximum(0.0, self.squares - self.total**2 / self.n) / (self.n - 1)
        told = log(4.0 * len(self.total) / error)
        return np.sqrt(2.0 * variance * told / self.n) + 2.0 * 7.0 * told / (3.0 * (self.n - 1))


def hoeffding(n: int, means: int, error: float) -> float:
    """Half width of intervals for `means` means of values in [0, 1], from n draws (Hoeffding)."""
    return min(1.0, sqrt(log(2.0 * means / error) / (2.0 * n)))
