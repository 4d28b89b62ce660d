"""Two lines around min(max(z, low), high) on an interval, rounded outwards.

Any slope will do once the intercept covers both ends and both breakpoints, between which the
function is linear; so only intercepts are rounded.
"""

from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.proof.arithmetic import UNIT, Array


@dataclass(frozen=True, slots=True, eq=False)
class Lines:
    """below·z + below_shift <= f(z) <= above·z + above_shift, flat.

    `open`: where a Relu bends; its slope below is then free in [0, 1], and a phase makes it linear.
    `size`: largest |z| of the switch, plus largest |f|.
    """

    above: Array
    above_shift: Array
    below: Array
    below_shift: Array
    open: NDArray[np.bool_]

    @property
    def identity(self) -> bool:
        """Whether f(z) = z on every interval."""
        return bool((self.above == 1.0).all() and (self.below == 1.0).all()) and not bool(
            self.above_shift.any() or self.below_shift.any()
        )


def around(lo: Array, hi: Array, low: float, high: float) -> Lines:
    """Chords, and below a Relu the better of 0 and 1."""
    inside, flat = (lo >= low) & (hi <= high), (hi <= low) | (lo >= high)
    rise = np.clip(hi, low, high) - np.clip(lo, low, high)
    first, last = (lo < low) & ~flat, (hi > high) & ~flat
    # The chord to the end of the rising part that a line must not cut.
    above = _ratio(rise, np.minimum(hi, high) - lo)
    below = _ratio(rise, hi - np.maximum(lo, low))
    below = np.where(first & ~last, (hi - low > low - lo).astype(np.float64), below)
    above = np.where(last & ~first, (high - lo > hi - high).astype(np.float64), above)
    above, below = (np.where(inside, 1.0, np.where(flat, 0.0, s)) for s in (above, below))
    points = (lo, hi, np.clip(low, lo, hi), np.clip(high, lo, hi))
    above_shift = _most(points, above, low, high, 1.0)
    below_shift = -_most(points, below, low, high, -1.0)
    if low == 0.0 and high == inf:
        # 0 and any slope in [0, 1] meet the Relu at 0 and stay below it.
        below_shift = np.zeros_like(below_shift)
    bends = first & ~inside if (low, high) == (0.0, inf) else np.zeros(lo.shape, dtype=bool)
    return Lines(above, above_shift, below, below_shift, bends)


def _ratio(rise: Array, run: Array) -> Array:
    return np.clip(rise / np.maximum(run, 1e-300), 0.0, 1.0)


def _most(points: tuple[Array, ...], slope: Array, low: float, high: float, side: float) -> Array:
    """Largest side·(f(p) - slope p), rounded up; exact where the two are the same number."""
    gaps = []
    for p in points:
        value, line = np.clip(p, low, high), slope * p
        gap = side * (value - line) + 8.0 * UNIT * (np.abs(value) + np.abs(line))
        gaps.append(np.where(value == line, 0.0, gap))
    most: Array = np.max(gaps, axis=0)
    return most
