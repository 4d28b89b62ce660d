"""The images around an image: an l_inf or l2 ball intersected with the pixel range [0, 1]."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mlflow_kdguard.certify.rounding import next_down, next_up

Norm = Literal["linf", "l2"]


@dataclass(frozen=True, slots=True, eq=False)
class Ball:
    """Balls of one radius around B images.

    `centre`, `lo`, `hi`: float64 B×C×H×W. [lo, hi] contains the ball's part of [0, 1]^d (rounded
    outwards); for l2 it is the ball's bounding box.
    """

    centre: Tensor
    lo: Tensor
    hi: Tensor
    eps: float
    norm: Norm

    @classmethod
    def around(cls, x: Tensor, *, eps: float, norm: Norm = "linf") -> "Ball":
        """The ball of radius `eps` (pixel units) around each image of x (B×C×H×W in [0, 1])."""
        centre = x.double()
        lo = next_down(centre - eps).clamp(0.0, 1.0)
        hi = next_up(centre + eps).clamp(0.0, 1.0)
        return cls(centre, lo, hi, eps, norm)

    def inner(self) -> tuple[Tensor, Tensor]:
        """Ends of the box rounded inwards: no point between them leaves the l_inf ball."""
        lo = next_up(self.centre - self.eps).clamp(0.0, 1.0)
        hi = next_down(self.centre + self.eps).clamp(0.0, 1.0)
        return torch.minimum(lo, self.centre), torch.maximum(hi, self.centre)

    def contains(self, points: Tensor) -> Tensor:
        """Whether each of B float64 points lies in its ball and in [0, 1], for certain: bool B.

        Doubt is a no: l_inf asks for the inner box, l2 for a length below eps by more than the
        error of measuring it.
        """
        offset = (points - self.centre).flatten(1)
        inside = ((points >= 0.0) & (points <= 1.0)).flatten(1).all(1)
        if self.norm == "l2":
            inside &= torch.linalg.vector_norm(offset, dim=1) <= self.eps * (1.0 - 1e-10)
            return inside
        lo, hi = self.inner()
        inside &= ((points >= lo) & (points <= hi)).flatten(1).all(1)
        return inside

    def nearest(self, points: Tensor) -> Tensor:
        """Points (any dtype, B×C×H×W) moved into their balls, in float64."""
        moved = points.double()
        if self.norm == "l2":
            offset = moved - self.centre
            length = torch.linalg.vector_norm(offset.flatten(1), dim=1).clamp(min=1e-300)
            shrink = (self.eps * (1.0 - 1e-9) / length).clamp(max=1.0)
            lo, hi = torch.zeros_like(moved), torch.ones_like(moved)
            moved = self.centre + offset * shrink.view(-1, 1, 1, 1)
        else:
            lo, hi = self.inner()
        return torch.minimum(torch.maximum(moved, lo), hi)
