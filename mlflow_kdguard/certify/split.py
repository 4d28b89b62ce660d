"""The Lagrangian split: multipliers that join both networks before the ball is looked at.

Any multipliers and any lower slopes give a sound bound, so they are chosen by a few steps of Adam.
First the multipliers, with the network part replaced by the planes already known above each
margin (a small matrix product instead of a pass through both networks); then, where the bound is
not small already, multipliers and slopes together on the real pass (α-CROWN, arXiv 2011.13824).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlflow_kdguard.certify import softmax
from mlflow_kdguard.certify.backward import Plane, Relaxed, backward
from mlflow_kdguard.certify.ball import Ball
from mlflow_kdguard.certify.forms import Form
from mlflow_kdguard.certify.margins import Items
from mlflow_kdguard.certify.rounding import gamma, up
from mlflow_kdguard.certify.softmax import Margins

CHEAP_STEPS = 24
SLOPE_STEPS = 12
SMALL = 0.02
"""Bounds below this are not refined: a gap of two points of confidence matters to nobody."""

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
    planes: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]

    def take(self, which: Tensor) -> "Rows":
        """The rows at `which` (int64)."""
        (a, b), (c, d) = self.planes
        return Rows(
            Items(self.items.image[which], self.items.klass[which]),
            self.student_high[which],
            Margins(self.high.lo[which], self.high.hi[which]),
            Margins(self.low.lo[which], self.low.hi[which]),
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
    upper = softmax.upper_plane(rows.high, at, slope.exp().clamp(1e-12, 0.25))
    weights = low.exp()
    constant = upper.constant + softmax.lower_constant(rows.low, weights)
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
        slack = slack + softmax.margin(joint.classes, weights, box)
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
    for _ in range(CHEAP_STEPS):
        with torch.enable_grad():
            value = estimate(parameters)
        best, kept = _keep(best, kept, value, parameters)
        _descend(optimiser, value)
    return kept


def refine(relaxed: Relaxed, rows: Rows, begin: Parameters) -> tuple[Tensor, Tensor]:
    """Best bound of a few steps on multipliers and lower slopes: N, and where it is attained."""
    own = _by_row(relaxed, rows.items.image)
    each = torch.arange(len(begin[1]), device=begin[1].device)
    alone = replace(rows, items=Items(each, rows.items.klass))
    free = {
        index: (lines.upper_slope > 0.0) & (lines.upper_slope < 1.0)
        for index, lines in own.lines.items()
    }
    parameters = [value.clone().requires_grad_() for value in begin]
    slopes = {i: own.lines[i].lower_slope.clone().requires_grad_() for i, f in free.items() if f.any()}
    optimiser = torch.optim.Adam(
        [
            {"params": parameters, "lr": 0.1},
            {"params": list(slopes.values()), "lr": 0.15},
        ],
        betas=(0.9, 0.9),
    )
    best = torch.full((len(begin[1]),), torch.inf, dtype=torch.float64, device=begin[1].device)
    worst = own.ball.centre
    for _ in range(SLOPE_STEPS):
        with torch.enable_grad():
            for index, slope in slopes.items():
                lines = relaxed.lines[index]
                fixed = lines.lower_slope[rows.items.image]
                own.lines[index] = replace(
                    own.lines[index], lower_slope=torch.where(free[index], slope, fixed)
                )
            value, plane = joint_bound(own, alone, multipliers(parameters, alone))
        corner = plane.corner(own.ball)
        worst = torch.where((value.detach() < best).view(-1, 1, 1, 1), corner, worst)
        best = torch.minimum(best, torch.where(value.isnan(), torch.inf, value).detach())
        _descend(optimiser, value)
        for slope in slopes.values():
            slope.data.clamp_(0.0, 1.0)
    return best, worst


def _by_row(relaxed: Relaxed, image: Tensor) -> Relaxed:
    """The same relaxation with one image a row, so that each row can have its own slopes."""
    ball = relaxed.ball
    lines = {index: value.rows(image) for index, value in relaxed.lines.items()}
    scales = [scale[image] for scale in relaxed.scales]
    own = Ball(ball.centre[image], ball.lo[image], ball.hi[image], ball.eps, ball.norm)
    return Relaxed(relaxed.joint, own, [], scales, lines)


def _keep(
    best: Tensor, kept: Parameters, value: Tensor, parameters: Parameters
) -> tuple[Tensor, Parameters]:
    better = value.detach() < best
    chosen = [
        torch.where(better if old.dim() == 1 else better[:, None], new.detach(), old)
        for old, new in zip(kept, parameters, strict=True)
    ]
    return torch.where(better, value.detach(), best), chosen


def _descend(optimiser: torch.optim.Optimizer, value: Tensor) -> None:
    optimiser.zero_grad()
    value.backward(torch.ones_like(value))
    optimiser.step()
