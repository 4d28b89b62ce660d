"""Gradient descent on the multipliers and slopes of some nodes, and what their splits concern."""

from dataclasses import replace

import torch
from torch import Tensor

from mlflow_kdguard.certify import confidence
from mlflow_kdguard.certify.backward import Plane, Relaxed
from mlflow_kdguard.certify.confidence import Band, probability
from mlflow_kdguard.certify.joint import Index
from mlflow_kdguard.certify.margins import Items
from mlflow_kdguard.certify.nodes import Nodes, Switches
from mlflow_kdguard.certify.split import Multipliers, Rows, descend, joint_bound

ELSEWHERE = 0.05
"""Share of what a switch can be off anywhere that counts beside what it is off at the point."""
PUSH_RATE = 0.05
STEEPEST = 1e3
"""A steeper line than any derivative of the confidence is what keeps a point inside a band."""
RATES = 0.02, 0.01
"""Of the steepness and of the low multipliers, as log(1 + k / K)."""
DEAD = 1e-2
"""Multipliers of a confidence below this share of the largest derivative hold nothing."""
_DECAY = 0.96


class Descent:
    """The parameters of some nodes while they are optimised."""

    def __init__(self, relaxed: Relaxed, switches: Switches, nodes: Nodes) -> None:
        self.switches, self.nodes = switches, nodes
        joint, ball, image = relaxed.joint, relaxed.ball, nodes.image
        self.slope = nodes.slope.double().requires_grad_()
        # Multipliers of confidences are of the size of their derivatives.
        ends = (nodes.high_from, nodes.high_to, nodes.low_from, nodes.low_to)
        derivatives = [torch.sigmoid(end) * torch.sigmoid(-end) for end in ends]
        self.steepest = torch.stack(derivatives).amax(0).clamp(min=1e-12)
        steep, low = _revived(nodes, self.steepest)
        self.where = nodes.where.clone().requires_grad_()
        self.steep = (steep / self.steepest).log1p().requires_grad_()
        self.low = (low / self.steepest[:, None]).log1p().requires_grad_()
        empty = nodes.where.new_zeros((len(image), 0))
        self.rows = Rows(
            Items(image, nodes.klass), nodes.student_high, nodes.high, nodes.low,
            nodes.high, ((empty, empty), (empty, empty)),
        )  # fmt: skip
        each = torch.arange(len(image), device=image.device)
        self.relaxed = Relaxed(joint, ball, [], relaxed.scales, {}, each=each)
        # Multipliers of fixed switches are of the size of the other coefficients there.
        self.size = nodes.unit.double().clamp(min=1e-9)[:, None]
        self.push = (nodes.push.double() / self.size).requires_grad_()
        self.optimiser = torch.optim.Adam(
            [
                {"params": [self.where], "lr": 0.1},
                {"params": [self.steep], "lr": RATES[0]},
                {"params": [self.low], "lr": RATES[1]},
                {"params": [self.slope], "lr": 0.15},
                {"params": [self.push], "lr": PUSH_RATE},
            ],
            betas=(0.9, 0.9),
            eps=1e-18,  # gradients are as small as confidences are certain
        )
        self.multipliers: Multipliers | None = None
        self.value: Tensor | None = None

    def bound(self) -> tuple[Tensor, Plane]:
        """The bound with the present parameters (N), and its plane."""
        nodes, trace = self.nodes, dict[Index, Tensor]()
        with torch.enable_grad():
            lines = self.switches.lines(nodes, self.slope)
            pushes = self.switches.cut(self.push * nodes.phase.double() * self.size)
            self.relaxed = replace(self.relaxed, lines=lines, pushes=pushes, trace=trace)
            box = nodes.high
            at = box.lo + torch.sigmoid(self.where) * (box.hi - box.lo)
            slope = (self.steep.expm1() * self.steepest).clamp(1e-12, STEEPEST)
            upper = confidence.upper_plane(box, at, slope, nodes.high_band)
            weights = self.low.expm1() * self.steepest[:, None]
            lower = confidence.lower_constant(nodes.low, weights, nodes.low_band)
            constant = upper.constant + lower
            self.multipliers = Multipliers(upper.weights, weights, constant)
            self.constants = upper.constant.detach(), lower.detach()
            value, plane = joint_bound(self.relaxed, self.rows, self.multipliers)
            self.value = torch.where(value.isfinite(), value, 0.0)
        found = value.detach()
        return torch.where(found.isnan(), 1.0, found), plane

    def improve(self) -> None:
        """One step of descent, and back to where the parameters may lie."""
        assert self.value is not None
        descend(self.optimiser, self.value)
        for group in self.optimiser.param_groups:
            group["lr"] *= _DECAY
        self.slope.data.clamp_(0.0, 1.0)
        self.push.data.clamp_(min=0.0)
        self.steep.data.clamp_(min=1e-6)
        self.low.data.clamp_(min=1e-9)

    def scores(
        self, nodes: Nodes, z: Tensor, reference: Tensor, student: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Differences of bound and truth at a point, and the gap there (N)."""
        assert self.multipliers is not None
        assert self.relaxed.trace is not None
        v = self.switches.join(self.relaxed.trace, len(nodes))
        image, switches = nodes.image, self.switches
        real = z.clamp(min=0.0)
        above = switches.upper_slope[image] * z + switches.upper_shift[image] - real
        below = self.slope.detach() * z - real
        open_ = switches.open_[image] & (nodes.phase == 0)
        loss = v.clamp(min=0.0) * above + v.clamp(max=0.0) * below
        # At a corner a switch is often at an end of its interval, where its lines are exact; a
        # share of what they can be off in between stands for the other optima.
        slack, rate, slope = switches.upper_shift[image], switches.upper_slope[image], self.slope
        ends = slack / (1.0 - rate).clamp(min=1e-9), slack / rate.clamp(min=1e-9)
        reach = torch.maximum((1.0 - slope.detach()) * ends[0], slope.detach() * ends[1])
        loss = loss + ELSEWHERE * torch.where(v > 0.0, v * slack, -v * reach)
        loss = loss.masked_fill(~open_, 0.0)
        own = nodes.klass[:, None]
        others = self.rows.items.others(reference.shape[1])
        folded = [z_.gather(1, others) - z_.gather(1, own) for z_ in (student, reference)]
        a = torch.where(nodes.student_high, folded[0], folded[1])
        b = torch.where(nodes.student_high, folded[1], folded[0])
        high, low = self.multipliers.high.detach(), self.multipliers.low.detach()
        p, q = probability(a), probability(b)
        at_high = (high * a).sum(1) + self.constants[0] - p
        at_low = (low * b).sum(1) + self.constants[1] + q
        outputs = (
            torch.minimum(at_high, _cap(nodes.high_band)),
            torch.minimum(at_low, _cap(nodes.low_band)),
        )
        score = torch.cat((loss, torch.stack(outputs, 1)), 1).nan_to_num(0.0)
        return score.clamp(min=0.0).float(), p - q

    def finished(self, nodes: Nodes, bound: Tensor, score: Tensor) -> Nodes:
        """The nodes with what was found."""
        assert self.relaxed.trace is not None
        unit = self.switches.join(self.relaxed.trace, len(nodes)).abs().amax(1)
        return replace(
            nodes,
            slope=self.slope.detach().float().clamp(0.0, 1.0),
            push=(self.push.detach().clamp(min=0.0) * self.size).float(),
            unit=unit.float(),
            where=self.where.detach(),
            steep=(self.steep.detach().expm1() * self.steepest).log(),
            low_weights=(self.low.detach().expm1() * self.steepest[:, None]).log(),
            bound=bound.clone(),
            score=score,
        )


def _revived(nodes: Nodes, steepest: Tensor) -> tuple[Tensor, Tensor]:
    """The multipliers of both confidences; where one side's died, that of the band's secant.

    At nothing the bound has a kink: it falls only where both sides grow together, which no single
    derivative says.
    """
    steep, low = nodes.steep.exp(), nodes.low_weights.exp()
    held = steep >= DEAD * steepest, low.sum(1, keepdim=True) >= DEAD * steepest[:, None]
    share = torch.softmax((nodes.low_lo + nodes.low_hi) / 2, -1)
    fresh = _secant(nodes.low_band)[:, None] * share
    return (
        torch.where(held[0], steep, _secant(nodes.high_band)),
        torch.where(held[1], low, fresh),
    )


def _secant(band: Band) -> Tensor:
    rise = torch.sigmoid(band.hi) - torch.sigmoid(band.lo)
    return (rise / (band.hi - band.lo).clamp(min=1e-9)).clamp(1e-12, 0.25)


def _cap(band: Band) -> Tensor:
    """How much halving a band can bring: the worst point does not respect it, and without a cap
    the same band would be halved for ever."""
    ends = torch.sigmoid(band.lo), torch.sigmoid(band.hi)
    bend = torch.sigmoid(band.middle) - (ends[0] + ends[1]) / 2
    return bend.abs() + 0.05 * (ends[1] - ends[0])
