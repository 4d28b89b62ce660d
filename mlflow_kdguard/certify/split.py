"""The Lagrangian split: multipliers that join both networks before the ball is looked at.

Any multipliers give a sound bound, so they are chosen by a few steps of Adam in which the network
part is replaced by the planes already known above each margin: a small matrix product instead of
a pass through both networks. What is chosen is then bounded by a real pass.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlflow_kdguard.certify import confidence
from mlflow_kdguard.certify.backward import Plane, Relaxed, backward
from mlflow_kdguard.certify.ball import Ball
from mlflow_kdguard.certify.confidence import Margins
from mlflow_kdguard.certify.forms import Form
from mlflow_kdguard.certify.margins import Items
from mlflow_kdguard.certify.rounding import down, gamma, up

STEPS = 24
"""Steps of Adam on the multipliers alone."""

Parameters = list[Tensor]
"""Tangent point (logit of its place in the box), log of the slope, logs of the low multipliers."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """N items with a direction each: p_H - p_L, where H is the student if `student_high` (N×1).

    `planes`: above -a_j of H and above b_j of L (N×m×d coefficients, N×m shifts).
    """

    items: Items
    student_high: Tensor
    high: Margins
    low: Margins
    difference: Margins
    planes: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]

    def halves(self) -> "Rows":
        """Each row twice: the lower and the upper half of the low margin that matters most.

        What is known of the difference of the margins narrows the high network's box as well.
        """
        low = self.low
        chosen, at = self.halving()
        both = self.take(torch.arange(len(at), device=at.device).repeat(2))
        upper_half = Margins(low.lo.scatter(1, chosen, at), low.hi)
        lower_half = Margins(low.lo, low.hi.scatter(1, chosen, at))
        lo, hi = (
            torch.cat((getattr(lower_half, end), getattr(upper_half, end))) for end in ("lo", "hi")
        )
        high = Margins(
            torch.maximum(both.high.lo, down(lo + both.difference.lo)),
            torch.minimum(both.high.hi, up(hi + both.difference.hi)),
        )
        return replace(both, low=Margins(lo, hi), high=high)

    def halving(self) -> tuple[Tensor, Tensor]:
        """Which low margin `halves` divides, and where (N×1 each)."""
        low = self.low
        middle = (low.lo + low.hi) / 2
        share = torch.softmax(middle, -1) * (low.hi - low.lo)
        chosen = share.argmax(-1, keepdim=True)
        return chosen, middle.gather(1, chosen)

    def without_planes(self) -> "Rows":
        """The rows for the real pass, which needs no planes of single margins."""
        nothing = self.high.lo.new_zeros((len(self.high.lo), 0))
        return replace(self, planes=((nothing, nothing), (nothing, nothing)))

    def joined(self, other: "Rows") -> "Rows":
        """These rows, then the others."""
        (a, b), (c, d) = self.planes
        (e, f), (g, h) = other.planes
        return Rows(
            Items(
                torch.cat((self.items.image, other.items.image)),
                torch.cat((self.items.klass, other.items.klass)),
            ),
            torch.cat((self.student_high, other.student_high)),
            self.high.joined(other.high),
            self.low.joined(other.low),
            self.difference.joined(other.difference),
            ((torch.cat((a, e)), torch.cat((b, f))), (torch.cat((c, g)), torch.cat((d, h)))),
        )

    def take(self, which: Tensor) -> "Rows":
        """The rows at `which` (int64)."""
        (a, b), (c, d) = self.planes
        return Rows(
            Items(self.items.image[which], self.items.klass[which]),
            self.student_high[which],
            Margins(self.high.lo[which], self.high.hi[which]),
            Margins(self.low.lo[which], self.low.hi[which]),
            Margins(self.difference.lo[which], self.difference.hi[which]),
            ((a[which], b[which]), (c[which], d[which])),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Multipliers:
    """λ of the high network, μ of the low one (N×m each), and both constants together (N)."""

    high: Tensor
    low: Tensor
    constant: Tensor


def multipliers(parameters: Parameters, rows: Rows) -> Multipliers:
    """What the parameters stand for; sound for any values."""
    where, slope, low = parameters
    at = rows.high.lo + torch.sigmoid(where) * (rows.high.hi - rows.high.lo)
    upper = confidence.upper_plane(rows.high, at, slope.exp().clamp(1e-12, 0.25))
    weights = low.exp()
    constant = upper.constant + confidence.lower_constant(rows.low, weights)
    return Multipliers(upper.weights, weights, constant)


def joint_bound(relaxed: Relaxed, rows: Rows, chosen: Multipliers) -> tuple[Tensor, Plane]:
    """Upper bound of p_H - p_L (N) by one backward pass through both networks, and its plane."""
    joint, image = relaxed.joint, rows.items.image
    student = torch.where(rows.student_high, chosen.high, chosen.low)
    reference = torch.where(rows.student_high, chosen.low, chosen.high)
    seeds, slack = [], chosen.constant
    for output, weights in ((joint.student, student), (joint.reference, reference)):
        seeds.append((output, Form(rows.items.unfold(weights, joint.classes))))
        size = weights.abs().sum(1) * relaxed.scales[output][image]
        slack = slack + gamma(joint.classes) * size
    for weights, box in ((chosen.high, rows.high), (chosen.low, rows.low)):
        slack = slack + confidence.margin(joint.classes, weights, box)
    plane = backward(relaxed, seeds, image)
    return up(plane.highest(relaxed.ball) + slack), plane


def start(rows: Rows) -> Parameters:
    """Tangents at the boxes' midpoints, with the slope of the secant of the confidence."""
    middle = (rows.low.lo + rows.low.hi) / 2
    low = _secant(rows.low)[:, None] * torch.softmax(middle, -1)
    return [torch.zeros_like(middle), _secant(rows.high).log(), low.clamp(min=1e-12).log()]


def _secant(box: Margins) -> Tensor:
    t_lo, t_hi = -torch.logsumexp(box.hi, -1), -torch.logsumexp(box.lo, -1)
    run = (t_hi - t_lo).clamp(min=1e-9)
    return ((torch.sigmoid(t_hi) - torch.sigmoid(t_lo)) / run).clamp(1e-12, 0.25)


def search(rows: Rows, ball: Ball) -> Parameters:
    """Better parameters, judged by the known planes of the single margins."""
    x_lo, x_hi = (end[rows.items.image].flatten(1) for end in (ball.lo, ball.hi))
    high, low = rows.planes

    def estimate(parameters: Parameters) -> Tensor:
        chosen = multipliers(parameters, rows)
        coef = (-chosen.high[:, None] @ high[0] + chosen.low[:, None] @ low[0])[:, 0]
        shift = (-chosen.high * high[1] + chosen.low * low[1]).sum(1)
        top = (coef.clamp(min=0.0) * x_hi + coef.clamp(max=0.0) * x_lo).sum(1)
        return top + shift + chosen.constant

    begin = start(rows)
    kept = begin
    best = torch.full((len(x_lo),), torch.inf, dtype=torch.float64, device=x_lo.device)
    parameters = [value.clone().requires_grad_() for value in begin]
    optimiser = torch.optim.Adam(parameters, lr=0.15, betas=(0.9, 0.9))
    for _ in range(STEPS):
        with torch.enable_grad():
            value = estimate(parameters)
        best, kept = _keep(best, kept, value, parameters)
        descend(optimiser, value)
    return kept


def _keep(
    best: Tensor, kept: Parameters, value: Tensor, parameters: Parameters
) -> tuple[Tensor, Parameters]:
    better = value.detach() < best
    chosen = [
        torch.where(better if old.dim() == 1 else better[:, None], new.detach(), old)
        for old, new in zip(kept, parameters, strict=True)
    ]
    return torch.where(better, value.detach(), best), chosen


def descend(optimiser: torch.optim.Optimizer, value: Tensor) -> None:
    """One step that lowers every row's value."""
    optimiser.zero_grad()
    torch.autograd.backward([value], [torch.ones_like(value)])
    optimiser.step()
