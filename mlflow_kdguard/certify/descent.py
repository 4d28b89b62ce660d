"""Gradient descent on the slopes and multipliers of some nodes, and what their splits concern.

In float32 and with derivatives written out (`quick`, `conjugate`); what is believed is
`setting.verified`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlflow_kdguard.certify import conjugate
from mlflow_kdguard.certify.adam import Adam
from mlflow_kdguard.certify.confidence import Band, probability
from mlflow_kdguard.certify.joint import Index
from mlflow_kdguard.certify.margins import Items
from mlflow_kdguard.certify.nodes import Nodes
from mlflow_kdguard.certify.parallel import go_on
from mlflow_kdguard.certify.setting import STEEPEST, Setting

PUSH_RATE = 0.05
"""Of multipliers of fixed switches, in units of the largest coefficient."""
LEAST = 0.25, 0.1
"""Of a band's secant: what the multipliers of the higher and of the lower confidence are at least.

A node whose best bound is what its bands say by themselves would let all multipliers vanish. From
there no descent finds back, and nothing says what to split: every loss is in units of multipliers.
"""
DEAD = 0.1
"""Weights that sum to less than this share of the least are no guide to where it belongs."""
FASTER, SLOWER, SLOWEST, FASTEST = 1.5, 0.7, 0.25, 50.0
"""Steps of the confidences' multipliers grow while the bound falls, and shrink where it does not:
in a narrow band they may have a long way to go."""
AVERAGED = 2
"""Steps after which points are averaged."""
BANDS, MARGINS = 0.12, 0.25
"""How much of a band's and of a margin's score counts beside that of a switch."""


@dataclass(frozen=True, slots=True)
class Rates:
    """First steps of lower slopes, of the tangent's place, and of the steepness and the low
    multipliers, both as log(1 + k / K)."""

    slope: float
    where: float
    steep: float
    low: float


@dataclass(frozen=True, slots=True, eq=False)
class Descended:
    """Nodes with their best parameters, bounds and scores; gaps (N) found at points (N×d)."""

    nodes: Nodes
    gap: Tensor
    point: Tensor


class Descent:
    """The parameters of some nodes while they are optimised."""

    def __init__(self, setting: Setting, nodes: Nodes, rates: Rates) -> None:
        joint = setting.relaxed.joint
        self.setting, self.nodes = setting, nodes
        self.items = Items(nodes.image, nodes.klass)
        self.outputs = joint.student, joint.reference
        self.passes = setting.passes(nodes.image, nodes.phase, self.outputs)
        self.high = conjugate.High(nodes.high, nodes.high_band)
        self.low = conjugate.Low(nodes.low, nodes.low_band)
        # Multipliers of confidences are of the size of their derivatives.
        largest = torch.maximum(_derivative(nodes.high_band), _derivative(nodes.low_band))
        self.size = largest.clamp(min=1e-12).float()
        steep, low = nodes.steep, nodes.weights
        self.theta = nodes.theta.clone()
        self.where = nodes.where.clone()
        self.steep = (steep / self.size).log1p()
        self.weights = (low / self.size[:, None]).log1p()
        # Multipliers of fixed switches are of the size of the other coefficients there.
        unit = nodes.coef.abs().amax(1) if nodes.coef.shape[1] else self.size
        push = (unit.clamp(min=1e-9) * PUSH_RATE)[:, None]
        self.open = self.passes.lines.open_
        slopes = torch.where(self.open, rates.slope, push)
        secants = secant(nodes.high_band).float(), secant(nodes.low_band).float()
        self.least = LEAST[0] * secants[0], LEAST[1] * secants[1]
        self.share = torch.softmax((nodes.low_lo + nodes.low_hi) / 2, -1).float()
        self._lift()
        self.pace = nodes.pace.clone()
        self.base = rates.steep, rates.low
        self.adam = Adam([slopes, rates.where, *self._paced()])

    def rescaled(self, factors: tuple[float, ...]) -> None:
        """Begin with both multipliers times the factor that bounds each row best."""
        best, _ = self.bound()
        starts = [value.clone() for value in (self.steep, self.weights)]
        kept = [value.clone() for value in starts]
        for factor in factors:
            for value, known in zip((self.steep, self.weights), starts, strict=True):
                value.copy_((known.expm1() * factor).log1p())
            self._lift()
            found, _ = self.bound()
            better = found < best
            best = torch.where(better, found, best)
            kept[0] = torch.where(better, self.steep, kept[0])
            kept[1] = torch.where(better[:, None], self.weights, kept[1])
        self.steep, self.weights = kept

    def renewed(self) -> None:
        """Begin with the low multipliers shared out anew where that bounds a row better.

        From parent to child they can gather in a class that says little, and short descents leave
        them there: the bound is then what the bands say, in all descendants.
        """
        best, _ = self.bound()
        known = self.weights
        total = known.expm1().sum(1) * self.size
        self.weights = (total[:, None] * self.share / self.size[:, None]).log1p()
        found, _ = self.bound()
        self.weights = torch.where((found < best)[:, None], self.weights, known)

    def run(self, steps: int) -> Descended:
        """Descend, and score."""
        nodes = self.nodes
        best = torch.full_like(self.size, torch.inf)
        kept, coef = [value.clone() for value in self.values], torch.zeros_like(self.theta)
        average: Tensor | None = None
        for step in range(steps):
            go_on()
            value, point = self.bound()
            better = value < best
            best = torch.where(better, value, best)
            if step:
                self.pace *= torch.where(better, FASTER, SLOWER)
                self.pace.clamp_(SLOWEST, FASTEST)
                self.adam.rates[2:] = self._paced()
            for old, new in zip(kept, self.values, strict=True):
                mask = better if old.dim() == 1 else better[:, None]
                torch.where(mask, new, old, out=old)
            torch.where(better[:, None], self.passes.coef, coef, out=coef)
            share = 1.0 if step < AVERAGED else 1.0 / (step - AVERAGED + 2)
            average = point if average is None else average.lerp(point, share)
            if step < steps - 1:
                self.improve(point)
        assert average is not None
        # Corners swing between the optima of the relaxation. Their mean is close to the point that
        # attains it: a switch that some of them turn on and others off is far from its lines there.
        score, gap = self.scores(average)
        _, there = self.scores(point)
        found = torch.where((there > gap)[:, None], point, average)
        gap = torch.maximum(gap, there)
        theta, where, steep, weights = kept
        nodes = replace(
            nodes,
            theta=theta,
            coef=coef,
            where=where,
            pace=self.pace,
            steep=(steep.expm1() * self.size).clamp(1e-12, STEEPEST),
            weights=(weights.expm1() * self.size[:, None]).clamp(min=1e-15),
            bound=torch.minimum(torch.where(best.isnan(), 1.0, best).double(), nodes.plain),
            score=score,
        )
        return Descended(nodes, gap, found)

    def _paced(self) -> list[Tensor | float]:
        return [self.base[0] * self.pace, (self.base[1] * self.pace)[:, None]]

    def _lift(self) -> None:
        """Bring multipliers that have become too small up to the least."""
        high, low = self.least
        torch.maximum(self.steep, (high / self.size).log1p(), out=self.steep)
        weights = self.weights.expm1() * self.size[:, None]
        total = weights.sum(1)
        known = (total > DEAD * low)[:, None]
        share = torch.where(known, weights / total.clamp(min=1e-30)[:, None], self.share)
        lack = (low - total).clamp(min=0.0)[:, None]
        self.weights.copy_(((weights + lack * share) / self.size[:, None]).log1p())

    @property
    def values(self) -> list[Tensor]:
        """The parameters."""
        return [self.theta, self.where, self.steep, self.weights]

    def bound(self) -> tuple[Tensor, Tensor]:
        """The bound with the present parameters (N), and the point at which it is attained."""
        slope = (self.steep.expm1() * self.size).clamp(1e-12, STEEPEST)
        self.mu = (self.weights.expm1() * self.size[:, None]).clamp(min=1e-15)
        self.lam, self.constant_high = self.high.plane(self.where, slope)
        self.constant_low, self.b = self.low.worst(self.mu)
        value, point = self.passes.down(self._seeds(), self.theta)
        return value + self.constant_high + self.constant_low, point

    def _seeds(self) -> dict[Index, Tensor]:
        joint, high = self.setting.joint, self.nodes.student_high
        weights = torch.where(high, self.lam, self.mu), torch.where(high, self.mu, self.lam)
        seeds = dict[Index, Tensor]()
        for output, chosen in zip(self.outputs, weights, strict=True):
            coef = self.items.unfold(chosen, joint.classes)
            seeds[output] = seeds[output] + coef if output in seeds else coef
        return seeds

    def _folded(self, values: dict[Index, Tensor]) -> tuple[Tensor, Tensor]:
        """Margins of the high and of the low network (N×m each)."""
        others, own = self.items.others(self.setting.joint.classes), self.items.klass[:, None]
        logits = (values[output] for output in self.outputs)
        student, reference = (z.gather(1, others) - z.gather(1, own) for z in logits)
        high = self.nodes.student_high
        return torch.where(high, student, reference), torch.where(high, reference, student)

    def improve(self, point: Tensor) -> None:
        """One step of descent, and back to where the parameters may lie."""
        gradient, values = self.passes.up(point)
        a, b = self._folded(values)
        where, steep = self.high.gradients(a)
        scale = 1.0 / self.size
        gradients = [
            gradient * scale[:, None],
            where * scale[:, None],
            steep * self.steep.exp(),  # dk/du = K + k, over K
            (b - self.b) * self.weights.exp(),
        ]
        for value in gradients:
            value.nan_to_num_(0.0, 0.0, 0.0)
        self.adam.step(self.values, gradients)
        self.theta.clamp_(min=0.0)
        torch.where(self.open, self.theta.clamp(max=1.0), self.theta, out=self.theta)
        self.where.clamp_(0.0, 1.0)
        self.weights.clamp_(min=1e-9)
        self._lift()

    def scores(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Differences of bound and truth at a point (N×(M+2+m)), and the gap there (N)."""
        z, values = self.passes.real(point)
        loss = self.passes.losses(z, self.theta)
        a, b = self._folded(values)
        p, q = probability(a), probability(b)
        at_high = torch.linalg.vecdot(self.lam, a) + self.constant_high - p
        at_low = torch.linalg.vecdot(self.mu, b) + self.constant_low + q
        outputs = (
            torch.minimum(at_high, _cap(self.nodes.high_band)),
            torch.minimum(at_low, _cap(self.nodes.low_band)),
        )
        score = torch.cat((loss, torch.stack(outputs, 1).float(), self._margins(b, at_low)), 1)
        return score.nan_to_num(0.0).clamp(min=0.0), (p - q).nan_to_num(-1.0)

    def _margins(self, b: Tensor, loss: Tensor) -> Tensor:
        """What each margin of the low network may account for of the output's loss: N×m.

        Its constant is attained at ends of the box, where several classes take turns in being the
        second one; within a narrow band, too, margins between the ends lie far from all of them.
        """
        ends = torch.minimum(b - self.nodes.low_lo, self.nodes.low_hi - b).float()
        held = self.mu * ends.clamp(min=0.0)
        return MARGINS * torch.minimum(held, loss.float()[:, None])


def _derivative(band: Band) -> Tensor:
    """The largest derivative of the confidence in its log-odds, over a band: N."""
    nearest = torch.zeros_like(band.lo).clamp(band.lo, band.hi)
    return torch.sigmoid(nearest) * torch.sigmoid(-nearest)


def secant(band: Band) -> Tensor:
    """How steep the confidence is on average over a band: N."""
    rise = torch.sigmoid(band.hi) - torch.sigmoid(band.lo)
    # Ends that are both infinite differ by no number.
    return (rise / (band.hi - band.lo).clamp(min=1e-9)).nan_to_num(0.0).clamp(1e-12, 0.25)


def _cap(band: Band) -> Tensor:
    """How much halving a band can bring: the worst point does not respect it, and without a cap
    the same band would be halved for ever."""
    ends = torch.sigmoid(band.lo), torch.sigmoid(band.hi)
    bend = torch.sigmoid(band.middle) - (ends[0] + ends[1]) / 2
    return BANDS * (bend.abs() + 0.05 * (ends[1] - ends[0]))
