"""Nodes of the search: parts of a row's question, with a bound each.

A node fixes the phase of some switches (a Relu on or off), narrows the band of each network's
confidence, and the intervals of the low network's margins. Switches of all layers stand in one axis
of M columns, followed by the two bands and the m margins, so that what is split is one argmax.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from mlflow_kdguard.certify.confidence import Band, Margins, tightened


@dataclass(frozen=True, slots=True, eq=False)
class Nodes:
    """N nodes: whose they are (image, class, direction), what they fix, and multipliers.

    `phase`: int8 N×M, -1 off, 1 on, 0 open; `theta`: float32 N×M, the lower slope of open switches
    and the multiplier of fixed ones; `coef`: float32 N×M, the coefficients of switches in the
    bound, from which a child's multiplier begins; `where` (N×m, the tangent point's place in the
    high box, in [0, 1]), `steep` (N), `weights` (N×m): float32 multipliers of the confidences, and
    `pace` (N), how fast those move; `bound`: float64 N, found in float32, -inf for an empty node;
    `cap`: float64 N, a bound that is sound; `score`: float32 N×(M+2+m), how much of the bound each
    switch, both bands, and the low network's margins account for; `name`: int64 N, whose proof it
    is part of (`keep`).
    """

    image: Tensor
    klass: Tensor
    student_high: Tensor
    high_lo: Tensor
    high_hi: Tensor
    low_lo: Tensor
    low_hi: Tensor
    high_from: Tensor
    high_to: Tensor
    low_from: Tensor
    low_to: Tensor
    phase: Tensor
    theta: Tensor
    coef: Tensor
    pace: Tensor
    where: Tensor
    steep: Tensor
    weights: Tensor
    bound: Tensor
    cap: Tensor
    score: Tensor
    name: Tensor

    def __len__(self) -> int:
        return len(self.image)

    @property
    def high(self) -> Margins:
        """Margins of the network whose confidence is the higher one."""
        return Margins(self.high_lo, self.high_hi)

    @property
    def low(self) -> Margins:
        """Margins of the other network."""
        return Margins(self.low_lo, self.low_hi)

    @property
    def high_band(self) -> Band:
        """Log-odds of the higher confidence."""
        return Band(self.high_from, self.high_to)

    @property
    def low_band(self) -> Band:
        """Log-odds of the lower confidence."""
        return Band(self.low_from, self.low_to)

    @property
    def plain(self) -> Tensor:
        """The largest difference of confidences that the bands allow: float64 N."""
        return torch.sigmoid(self.high_to) - torch.sigmoid(self.low_from)

    def take(self, which: Tensor) -> "Nodes":
        """The nodes at `which` (int64 or bool)."""
        return Nodes(*(getattr(self, item.name)[which] for item in fields(self)))

    def joined(self, *others: "Nodes") -> "Nodes":
        """These nodes, then the others."""
        names = [item.name for item in fields(self)]
        return Nodes(*(torch.cat([getattr(part, n) for part in (self, *others)]) for n in names))

    def split(self, chosen: Tensor, rate: Tensor) -> "Nodes":
        """Both children of every node, first all lower halves, along `chosen` (int64 N): a
        switch's column, M for the high band, M + 1 for the low one, M + 2 + j for the low network's
        j-th margin. `rate` (N×M): slopes of the lines above the switches."""
        halves = (self._phased(chosen, rate, upper=up) for up in (False, True))
        lower, upper = (
            part._narrowed(chosen, upper=up).consistent()
            for part, up in zip(halves, (False, True), strict=True)
        )
        return lower.joined(upper)

    def _phased(self, chosen: Tensor, rate: Tensor, *, upper: bool) -> "Nodes":
        m = self.phase.shape[1]
        if not m:
            return self
        column, switch = chosen[:, None].clamp(max=m - 1), chosen[:, None] < m
        fixed = torch.where(switch, 1 if upper else -1, self.phase.gather(1, column))
        known = self.theta.gather(1, column)
        begun = begin(self.coef.gather(1, column), known, rate.gather(1, column), upper=upper)
        return replace(
            self,
            phase=self.phase.scatter(1, column, fixed.to(torch.int8)),
            theta=self.theta.scatter(1, column, torch.where(switch, begun, known)),
        )

    def _narrowed(self, chosen: Tensor, *, upper: bool) -> "Nodes":
        at = chosen - self.phase.shape[1]
        ends = {}
        for k, (name, band) in enumerate((("high", self.high_band), ("low", self.low_band))):
            middle = band.middle
            ends[f"{name}_from"] = torch.where((at == k) & upper, middle, band.lo)
            ends[f"{name}_to"] = torch.where((at == k) & (not upper), middle, band.hi)
        lo, hi = self.low_lo, self.low_hi
        one = torch.arange(lo.shape[1], device=at.device) == (at - 2)[:, None]
        middle = (lo + hi) / 2
        ends["low_lo"] = torch.where(one & upper, middle, lo)
        ends["low_hi"] = torch.where(one & (not upper), middle, hi)
        return replace(self, bound=self.bound.clone(), **ends)

    def consistent(self) -> "Nodes":
        """Boxes and bands cut to each other; where nothing is left, the bound becomes -inf."""
        node, empty = self, torch.zeros_like(self.bound, dtype=torch.bool)
        for name in ("high", "low"):
            box, band = tightened(getattr(node, name), getattr(node, f"{name}_band"))
            empty |= (box.lo > box.hi).any(1) | (band.lo > band.hi)
            values = {
                f"{name}_lo": torch.minimum(box.lo, box.hi), f"{name}_hi": box.hi,
                f"{name}_from": torch.minimum(band.lo, band.hi), f"{name}_to": band.hi,
            }  # fmt: skip
            node = replace(node, **values)
        node.bound[empty] = -torch.inf
        return node


def begin(coef: Tensor, slope: Tensor, rate: Tensor, *, upper: bool) -> Tensor:
    """The multiplier of a switch that was just fixed with which the bound is no looser than before.

    `coef`: the switch's coefficient in its parent, where its lines had slopes `rate` above and
    `slope` below. A switch that is off and was bounded from above takes none.
    """
    rises, falls = coef.clamp(min=0.0), -coef.clamp(max=0.0)
    if upper:
        return rises * (1.0 - rate) + falls * (1.0 - slope)
    return falls * slope
