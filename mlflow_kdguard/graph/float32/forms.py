"""Real values as affine forms of the pixels: what keeps ranges short behind the first layer.

y(x) = centre + Σ_p coefficient_p s_p + r with s in [-1, 1], one s for each pixel, and |r| <= slack.
An undecided Relu is the middle of its two parallel lines (DeepZ, Singh et al., NeurIPS 2018), with
the distance in the slack. Only ranges come from forms; whatever is chosen, they hold.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.graph.float32.convolving import convolved, of_pixels
from mlflow_kdguard.graph.float32.rounding import absolute, own, terms_of, without_offset
from mlflow_kdguard.graph.interpreter import apply
from mlflow_kdguard.graph.layers import Affine, Array, Conv, Layer, Scale

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Form:
    """B values of a shape: `centre`, `slack` B×shape, `coefficients` B×d×shape.

    While every value depends on one pixel alone (`single`), coefficients are B×shape: one each, in
    the order of the pixels.
    """

    centre: Array
    coefficients: Array
    slack: Array
    single: bool

    @cached_property
    def reach(self) -> Array:
        """How far the value can be from the centre: B×shape."""
        size = np.abs(self.coefficients)
        total: Array = (size if self.single else size.sum(1)) + self.slack
        rounded = 1.0 if self.single else 1.0 + own(self.coefficients.shape[1])
        return total * rounded + own(1) * np.abs(self.centre)

    def scaled(self, factor: Array, centre: Array, slack: Array) -> "Form":
        """The coefficients times `factor` (B×shape), with a new centre and slack."""
        wide = factor if self.single else factor[:, None]
        return Form(centre, self.coefficients * wide, slack, self.single)


def begun(lo: Array, hi: Array) -> Form:
    """The pixels themselves."""
    middle = (lo + hi) / 2.0
    radius = np.maximum(hi - middle, middle - lo)
    return Form(middle, radius, own(1) * (np.abs(lo) + np.abs(hi)), single=True)


def linear(layer: Any, x: Form) -> Form:
    """W x + b."""
    bare, sizes = without_offset(layer), without_offset(absolute(layer))
    width = x.reach + np.abs(x.centre)
    lost = own(4 * terms_of(layer)) * apply(absolute(layer), width)
    coefficients, single = _mapped(layer, bare, x)
    return Form(apply(layer, x.centre), coefficients, apply(sizes, x.slack) + lost, single)


def _mapped(layer: Any, bare: Any, x: Form) -> tuple[Array, bool]:
    if not x.single:
        return _each(bare, x.coefficients), False
    if isinstance(layer, Scale):
        return apply(bare, x.coefficients), True
    if isinstance(layer, Affine) and x.centre.ndim == 2:
        return x.coefficients[:, :, None] * layer.weight.T[None], False
    if isinstance(layer, Conv):
        return of_pixels(layer, x.coefficients), False
    return _each(bare, spread(x)), False


def spread(x: Form) -> Array:
    """Coefficients B×d×shape of a form that has one each."""
    count = x.coefficients[0].size
    rows = x.coefficients.reshape(len(x.coefficients), count)
    wide = np.zeros((len(rows), count, count))
    wide[:, np.arange(count), np.arange(count)] = rows
    return wide.reshape(len(rows), count, *x.centre.shape[1:])


def _each(layer: Layer, coefficients: Array) -> Array:
    """The layer on every coefficient by itself."""
    rows = coefficients.reshape(-1, *coefficients.shape[2:])
    mapped = convolved(layer, rows) if isinstance(layer, Conv) else apply(layer, rows)
    return mapped.reshape(*coefficients.shape[:2], *layer.shape)


def total(x: Form, y: Form, sign: float) -> Form:
    """x ± y."""
    if not (x.single and y.single):
        x, y = (Form(f.centre, spread(f), f.slack, False) if f.single else f for f in (x, y))
    lost = own(1) * (x.reach + y.reach + np.abs(x.centre) + np.abs(y.centre))
    return Form(
        x.centre + sign * y.centre,
        x.coefficients + sign * y.coefficients,
        x.slack + y.slack + lost,
        x.single,
    )


def cut(low: float, high: float, x: Form, lo: Array, hi: Array) -> Form:
    """min(max(x, low), high) of x in [lo, hi]: itself, a constant, parallel lines, or a box."""
    inside, below = (lo >= low) & (hi <= high), (lo < low) & (low < hi) & (hi <= high)
    width = np.where(below, hi - lo, 1.0)
    slope = np.where(inside, 1.0, np.where(below, (hi - low) / width, 0.0))
    # Between slope (x - low) and slope (x - lo), both above `low`.
    half = np.where(below, slope * (low - lo) / 2.0, 0.0)
    ends = np.clip(lo, low, high), np.clip(hi, low, high)
    flat = ~inside & ~below
    centre = np.where(flat, (ends[0] + ends[1]) / 2.0, slope * x.centre + half)
    centre = np.where(below, centre + (1.0 - slope) * (low if np.isfinite(low) else 0.0), centre)
    size = np.abs(lo) + np.abs(hi) + np.abs(centre) + x.reach + np.abs(x.centre)
    slack = np.where(flat, (ends[1] - ends[0]) / 2.0, slope * x.slack + half) + own(8) * size
    return x.scaled(slope, centre, np.where(inside, x.slack, slack))


def boxed(lo: Array, hi: Array, like: Form) -> Form:
    """A value of which nothing but its range is known."""
    middle = (lo + hi) / 2.0
    slack = np.maximum(hi - middle, middle - lo) + own(1) * (np.abs(lo) + np.abs(hi))
    pixels = like.coefficients[0].size if like.single else like.coefficients.shape[1]
    return Form(middle, np.zeros((len(lo), pixels, *lo.shape[1:])), slack, single=False)


def chosen(first: Form, second: Form, which: Mask, rise: Array) -> Form:
    """The form of `first` or `second` (`which`: the first), shifted by what lies in [0, rise]
    (or [rise, 0])."""
    a, b = (Form(f.centre, spread(f), f.slack, False) if f.single else f for f in (first, second))
    centre = np.where(which, a.centre, b.centre) + rise / 2.0
    slack = np.where(which, a.slack, b.slack) + np.abs(rise) / 2.0
    lost = own(4) * (np.abs(centre) + np.abs(rise))
    coefficients = np.where(which[:, None], a.coefficients, b.coefficients)
    return Form(centre, coefficients, slack + lost, single=False)
