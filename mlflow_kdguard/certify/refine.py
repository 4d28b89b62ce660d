"""Tightening where a bound is not small already: halved boxes, and slopes chosen by gradient.

The output non-linearity costs as much as all Relus together, and splitting the box of the low
network's margins costs no new bounds of hidden layers. So each row is halved a few times, and each
part chooses its multipliers and its own lower slopes (α-CROWN, arXiv 2011.13824). The bound of a
row is the largest of its parts.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlflow_kdguard.certify import confidence
from mlflow_kdguard.certify.backward import Relaxed
from mlflow_kdguard.certify.ball import Ball
from mlflow_kdguard.certify.joint import Index
from mlflow_kdguard.certify.keep import Halving
from mlflow_kdguard.certify.margins import Items
from mlflow_kdguard.certify.split import Parameters, Rows, descend, joint_bound, multipliers

SMALL = 0.02
"""Bounds below this are left alone: a gap of two points of confidence matters to nobody."""
STEPS = 8
"""Steps of Adam on multipliers and slopes."""
ROUNDS = 6
"""Halvings of the worst part of each row, in a network of up to 2,000 bent neurons."""
LEAST_ROUNDS = 2
"""And in one of 6,000 or more, where a pass costs much and the hidden layers dominate the gap."""
_CHUNK_BYTES = 128 << 20
_COPIES = 12
"""Tensors that a differentiated pass keeps for each neuron."""


Notes = tuple[Halving, Tensor] | None
"""Where a proof's parts are noted, and what the rows are called there (int64 N)."""


def refined(
    relaxed: Relaxed, rows: Rows, begin: Parameters, kept: Notes = None
) -> tuple[Tensor, Tensor]:
    """Bounds (N), and where the largest part's plane is highest (N×C×H×W)."""
    notes = None if kept is None else kept[0]
    leaves = _Leaves.roots(rows, begin)
    leaves = _evaluated(relaxed, leaves if kept is None else replace(leaves, name=kept[1]), notes)
    n = len(begin[1])
    for _ in range(_rounds(relaxed)):
        worst = leaves.worst(n)
        worst = worst[leaves.bound[worst] > SMALL]
        if len(worst) == 0:
            break
        parents = leaves.take(worst)
        children = parents.halves()
        if notes is not None:
            chosen, middle = parents.rows.halving()
            named = notes.halve(parents.name, chosen[:, 0], middle[:, 0])
            children = replace(children, name=named)
        known = children.bound
        children = _evaluated(relaxed, children, notes)
        children = replace(children, bound=torch.minimum(known, children.bound))
        leaves = leaves.replaced(worst, children)
    worst = leaves.worst(n)
    return leaves.bound[worst], leaves.corner[worst]


@dataclass(frozen=True, slots=True, eq=False)
class _Leaves:
    """Parts of all rows: whose they are, their boxes, parameters, bound and worst point, and what a
    proof calls them."""

    owner: Tensor
    rows: Rows
    parameters: Parameters
    bound: Tensor
    corner: Tensor
    name: Tensor

    @classmethod
    def roots(cls, rows: Rows, begin: Parameters) -> "_Leaves":
        """Every row whole."""
        owner = torch.arange(len(begin[1]), device=begin[1].device)
        rows = rows.without_planes()
        return cls(owner, rows, begin, torch.ones_like(begin[1]), begin[1], owner)

    def worst(self, n: int) -> Tensor:
        """The leaf of the largest bound of each of the `n` rows: int64 n."""
        order = self.bound.argsort()
        # Sorted by bound, then (stably) by owner: the last of each owner is its worst.
        order = order[self.owner[order].argsort(stable=True)]
        ends = torch.bincount(self.owner, minlength=n).cumsum(0) - 1
        return order[ends]

    def take(self, which: Tensor) -> "_Leaves":
        """The leaves at `which` (int64)."""
        return _Leaves(
            self.owner[which],
            self.rows.take(which),
            [value[which] for value in self.parameters],
            self.bound[which],
            self.corner[which],
            self.name[which],
        )

    def halves(self) -> "_Leaves":
        """Both halves of every leaf, with what the whole knows."""
        both = torch.arange(len(self.owner), device=self.owner.device).repeat(2)
        return replace(self.take(both), rows=self.rows.halves())

    def replaced(self, gone: Tensor, new: "_Leaves") -> "_Leaves":
        """These leaves without those at `gone`, and the new ones."""
        stays = torch.ones_like(self.owner, dtype=torch.bool)
        stays[gone] = False
        old = self.take(stays.nonzero()[:, 0])
        return _Leaves(
            torch.cat((old.owner, new.owner)),
            old.rows.joined(new.rows),
            [torch.cat(pair) for pair in zip(old.parameters, new.parameters, strict=True)],
            torch.cat((old.bound, new.bound)),
            torch.cat((old.corner, new.corner)),
            torch.cat((old.name, new.name)),
        )


def _evaluated(relaxed: Relaxed, leaves: _Leaves, notes: Halving | None) -> _Leaves:
    """The leaves with bounds, worst points, and the parameters that they ended with."""
    size = max(8, _CHUNK_BYTES // (8 * _COPIES * _neurons(relaxed)))
    each = torch.arange(len(leaves.owner), device=leaves.owner.device)
    found = [_bound(relaxed, leaves.take(which), notes) for which in torch.split(each, size)]
    return replace(
        leaves,
        bound=torch.cat([part[0] for part in found]),
        corner=torch.cat([part[1] for part in found]),
        parameters=[torch.cat(values) for values in zip(*(p[2] for p in found), strict=True)],
    )


def _neurons(relaxed: Relaxed) -> int:
    return max(1, sum(lines.upper_slope[0].numel() for lines in relaxed.lines.values()))


def _rounds(relaxed: Relaxed) -> int:
    """Fewer rounds for larger networks; counted in neurons, not in time, so that they repeat."""
    return max(min(ROUNDS, LEAST_ROUNDS), min(ROUNDS, 2_000 * ROUNDS // _neurons(relaxed)))


def _bound(
    relaxed: Relaxed, leaves: _Leaves, notes: Halving | None
) -> tuple[Tensor, Tensor, Parameters]:
    """The least bound seen in a few steps, where it is attained, and the last parameters."""
    rows, begin = leaves.rows, leaves.parameters
    own = Own.of(relaxed, rows)
    parameters = [value.clone().requires_grad_() for value in begin]
    optimiser = torch.optim.Adam(
        [
            {"params": parameters, "lr": 0.1},
            {"params": list(own.slopes.values()), "lr": 0.15},
        ],
        betas=(0.9, 0.9),
    )
    best = torch.minimum(
        confidence.interval_gap(rows.high, rows.low),
        confidence.linked_gap(rows.high, rows.low, rows.difference),
    )
    best = torch.where(best.isnan(), 1.0, best)
    worst = own.relaxed.ball.centre
    found = Found.of(parameters, own)
    for _ in range(STEPS):
        with torch.enable_grad():
            own.install()
            value, plane = joint_bound(own.relaxed, own.rows, multipliers(parameters, own.rows))
        closer = value.detach() < best
        corner = plane.corner(own.relaxed.ball)
        worst = torch.where(closer.view(-1, 1, 1, 1), corner, worst)
        best = torch.where(closer, value.detach(), best)
        if notes is not None:
            found = found.closer(closer, parameters, own)
        descend(optimiser, value)
        for slope in own.slopes.values():
            slope.data.clamp_(0.0, 1.0)
    if notes is not None:
        notes.evaluated(leaves.name, found.parameters, found.slopes)
    return best, worst, [value.detach() for value in parameters]


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Parameters and slopes of the least bound so far."""

    parameters: Parameters
    slopes: dict[Index, Tensor]

    @classmethod
    def of(cls, parameters: Parameters, own: "Own") -> "Found":
        """The present ones."""
        slopes = {i: own.relaxed.lines[i].lower_slope.detach() for i in own.slopes}
        return cls([value.detach().clone() for value in parameters], slopes)

    def closer(self, rows: Tensor, parameters: Parameters, own: "Own") -> "Found":
        """The present ones in `rows` (bool N), these elsewhere."""
        new = Found.of(parameters, own)

        def chosen(now: Tensor, before: Tensor) -> Tensor:
            return torch.where(rows.view(-1, *[1] * (now.dim() - 1)), now, before)

        both = zip(new.parameters, self.parameters, strict=True)
        slopes = {i: chosen(new.slopes[i], self.slopes[i]) for i in self.slopes}
        return Found([chosen(now, before) for now, before in both], slopes)


@dataclass(frozen=True, slots=True, eq=False)
class Own:
    """A relaxation with one image a row, so that each row has its own slopes.

    `slopes`: free lower slopes of bent operations, `open_`: where they apply.
    """

    relaxed: Relaxed
    rows: Rows
    slopes: dict[Index, Tensor]
    open_: dict[Index, Tensor]
    fixed: dict[Index, Tensor]

    @classmethod
    def of(cls, relaxed: Relaxed, rows: Rows) -> "Own":
        """Every row its own image, with slopes to start with."""
        image, ball = rows.items.image, relaxed.ball
        lines = {index: value.rows(image) for index, value in relaxed.lines.items()}
        alone = Relaxed(
            relaxed.joint,
            Ball(ball.centre[image], ball.lo[image], ball.hi[image], ball.eps, ball.norm),
            [],
            [scale[image] for scale in relaxed.scales],
            lines,
        )
        each = torch.arange(len(image), device=image.device)
        # Lines with an intercept below (Clip within a network) are fitted to their slope: kept.
        open_ = {
            i: (v.upper_slope > 0.0) & (v.upper_slope < 1.0)
            for i, v in lines.items()
            if v.lower_shift is None
        }
        fixed = {i: lines[i].lower_slope for i, free in open_.items() if bool(free.any())}
        slopes = {i: value.clone().requires_grad_() for i, value in fixed.items()}
        return cls(alone, replace(rows, items=Items(each, rows.items.klass)), slopes, open_, fixed)

    def install(self) -> None:
        """Put the present slopes into the lines."""
        for index, slope in self.slopes.items():
            chosen = torch.where(self.open_[index], slope, self.fixed[index])
            self.relaxed.lines[index] = replace(self.relaxed.lines[index], lower_slope=chosen)
