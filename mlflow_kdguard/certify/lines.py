"""Two lines around the scalar non-linearities on an interval.

Every switch function is clamp(z, low, high) (Relu: low = 0, high = inf), which is linear between
its breakpoints: a line of *any* slope is a bound once its intercept covers the breakpoints. So the
slopes are free (CROWN, arXiv 1811.00866, takes the chord above and 0 or 1 below), and rounding
matters in the intercepts only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mlflow_kdguard.certify.forms import Form, inner
from mlflow_kdguard.certify.ops import Box
from mlflow_kdguard.certify.rounding import TINY, UNIT


@dataclass(frozen=True, slots=True, eq=False)
class Lines:
    """lower_slope z + lower_shift <= f(z) <= upper_slope z + upper_shift, each B×shape."""

    upper_slope: Tensor
    upper_shift: Tensor
    lower_slope: Tensor
    lower_shift: Tensor | None
    """None where it is zero everywhere."""
    identity: bool = False
    """Whether f(z) = z on every interval: nothing to do on the way back."""

    def rows(self, image: Tensor) -> "Lines":
        """The lines of the images at `image` (int64 N), one a row: N×shape."""
        shift = None if self.lower_shift is None else self.lower_shift[image]
        above, below = self.upper_slope[image], self.lower_slope[image]
        return Lines(above, self.upper_shift[image], below, shift, self.identity)

    def pull(self, form: Form, image: Tensor) -> tuple[Form, Tensor]:
        """A functional of f(z), maximised: functional of z, and the constant (N)."""
        v = form.coef
        if self.identity:
            return form, v.new_zeros(len(v))
        positive = v.clamp(min=0.0)
        shift = inner(positive, form.read(self.upper_shift, image))
        if self.lower_shift is not None:
            negative = v.clamp(max=0.0)
            shift = shift + inner(negative, form.read(self.lower_shift, image))
        above, below = form.read(self.upper_slope, image), form.read(self.lower_slope, image)
        return Form(v * torch.where(v > 0.0, above, below), form.places), shift


def around(switch: Box, low: float, high: float) -> Lines:
    """The usual adaptive lines around clamp(z, low, high) on each interval."""
    lo, hi = switch.lo, switch.hi
    rise = hi.clamp(low, high) - lo.clamp(low, high)
    above = _ratio(rise, hi.clamp(max=high) - lo)
    below = _ratio(rise, hi - lo.clamp(min=low))
    bends_up, bends_down = (lo < low) & (hi > low), (lo < high) & (hi > high)
    inside = (lo >= low) & (hi <= high)
    flat = (hi <= low) | (lo >= high)
    below = torch.where(bends_up & ~bends_down, (hi - low > low - lo).double(), below)
    above = torch.where(bends_down & ~bends_up, (high - lo > hi - high).double(), above)
    above, below = (
        torch.where(inside, 1.0, torch.where(flat, 0.0, slope)) for slope in (above, below)
    )
    points = (lo, hi, lo.clamp(min=low).minimum(hi), hi.clamp(max=high).maximum(lo))
    upper_shift = _intercepts(points, above, low, high, 1.0)
    lower_shift = None
    if low != 0.0 or high != float("inf"):
        lower_shift = -_intercepts(points, below, low, high, -1.0)
    return Lines(above, upper_shift, below, lower_shift, bool(inside.all()))


def _ratio(rise: Tensor, run: Tensor) -> Tensor:
    return (rise / run.clamp(min=TINY)).clamp(0.0, 1.0)


def _intercepts(
    points: tuple[Tensor, ...], slope: Tensor, low: float, high: float, side: float
) -> Tensor:
    """Largest side · (f(p) - slope p) over the points, rounded up; 0 where f(p) = slope p."""
    best: Tensor | None = None
    for p in points:
        value, line = p.clamp(low, high), slope * p
        gap = side * (value - line) + 4 * UNIT * (value.abs() + line.abs())
        gap = torch.where(value == line, 0.0, gap)
        best = gap if best is None else torch.maximum(best, gap)
    assert best is not None
    return best
