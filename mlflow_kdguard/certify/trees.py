"""Tighter boxes before the search: a small branch and bound for each open switch and each margin.

Every linear functional of a layer is a question of its own, and a few splits of the switches before
it say more than any choice of slopes. All functionals of a layer go through their rounds together:
in each, every tree splits its worst leaf. What a tree bounds is computed anew in float64.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mlflow_kdguard.certify.adam import Adam
from mlflow_kdguard.certify.backward import Relaxed, backward
from mlflow_kdguard.certify.confidence import Margins
from mlflow_kdguard.certify.forms import Form
from mlflow_kdguard.certify.joint import Index
from mlflow_kdguard.certify.keep import Grown, numpy
from mlflow_kdguard.certify.lines import around
from mlflow_kdguard.certify.margins import Items
from mlflow_kdguard.certify.nodes import begin
from mlflow_kdguard.certify.ops import Box
from mlflow_kdguard.certify.quick import Columns, one_bend
from mlflow_kdguard.certify.setting import Setting, at_once, chunks

STEPS = 5
"""Steps of Adam in a leaf."""
FIRST_STEPS = 12
"""And in a root."""
SLOPE_RATE, PUSH_RATE = 0.2, 0.05
LITTLE, FEW = 0.005, 40
"""A margin whose exponential may be no more than this share of all has no more rounds than that."""
_TREES = 512
_LEAVES = 1024
_CELLS = 20_000_000
"""Leaves times switches that are kept side by side: a quarter of a GiB."""


@dataclass(frozen=True, slots=True, eq=False)
class Functionals:
    """N linear functionals of one operation's value (`coef`, float64 N×size), around an image each
    (int64 N). `number` (int64 N): what a proof calls them."""

    index: Index
    coef: Tensor
    image: Tensor
    number: Tensor

    def take(self, which: Tensor) -> "Functionals":
        """The functionals at `which`."""
        return Functionals(self.index, self.coef[which], self.image[which], self.number[which])


def highest(
    relaxed: Relaxed, rows: Functionals, *, rounds: int, signs: bool, kept: list[Grown] | None
) -> Tensor:
    """Upper bounds of the functionals: float64 N.

    `signs`: stop where a functional is known not to be positive. `kept`: where trees are noted.
    """
    setting = Setting.of(relaxed, (rows.index,))
    side = max(1, min(_TREES, _CELLS // ((rounds + 1) * max(1, setting.columns.width))))
    parts = [
        _Trees(setting, rows.take(which), rounds, signs, kept).grown()
        for which in chunks(len(rows.image), side, rows.image.device)
    ]
    return torch.cat(parts) if parts else rows.coef.new_zeros(0)


class _Trees:
    """R trees of at most `rounds` + 1 leaves: what each leaf fixes, and its parameters."""

    def __init__(
        self,
        setting: Setting,
        rows: Functionals,
        rounds: int,
        signs: bool,
        kept: list[Grown] | None,
    ) -> None:
        self.setting, self.rows, self.rounds, self.signs = setting, rows, rounds, signs
        self.shape = setting.relaxed.joint.ops[rows.index].shape
        self.leaves = at_once(setting, _LEAVES)
        self.seeds = rows.coef.float()
        r, m = len(rows.image), setting.columns.width
        device = rows.image.device
        self.phase = torch.zeros((r, rounds + 1, m), dtype=torch.int8, device=device)
        self.theta = torch.zeros((r, rounds + 1, m), device=device)
        self.score = torch.zeros((r, rounds + 1, m), device=device)
        self.coef = torch.zeros((r, rounds + 1, m), device=device)
        self.bound = torch.full((r, rounds + 1), -torch.inf, device=device)
        # What a leaf is does not depend on what float32 makes of its bound.
        self.leaf = torch.zeros((r, rounds + 1), dtype=torch.bool, device=device)
        self.all = torch.arange(r, device=device)
        # For a proof: the trees, and what their slots' nodes are called.
        self.kept = None if kept is None else Grown.of(setting, rows.index, rows.image, rows.number)
        if kept is not None and self.kept is not None:
            kept.append(self.kept)
        self.name = torch.zeros((r, rounds + 1), dtype=torch.int64)

    def grown(self) -> Tensor:
        """Sound bounds of all trees after their rounds: float64 R."""
        self.theta[:, 0] = self.setting.quick.low[self.rows.image]
        self.leaf[:, 0] = True
        self.bound[:, 0] = torch.inf
        self._settle(self.all, torch.zeros_like(self.all), FIRST_STEPS)
        for turn in range(1, self.rounds + 1):
            worst, slot = self.bound.max(1)
            score, column = self.score[self.all, slot].max(1)
            go = score > 0.0
            if self.signs:
                go &= worst > 0.0
            tree = go.nonzero()[:, 0]
            if len(tree) == 0:
                break
            self._split(tree, slot[tree], column[tree], turn)
        return self._verified()

    def _split(self, tree: Tensor, slot: Tensor, column: Tensor, turn: int) -> None:
        new = torch.full_like(slot, turn)
        self.leaf[tree, new] = True
        if self.kept is not None:
            self._note(tree.cpu(), slot.cpu(), column.cpu(), turn)
        rate = self.setting.quick.up[self.rows.image[tree], column]
        coef, slope = self.coef[tree, slot, column], self.theta[tree, slot, column]
        for store in (self.phase, self.theta, self.coef, self.bound):
            store[tree, new] = store[tree, slot]
        for leaf, side in ((slot, -1), (new, 1)):
            self.phase[tree, leaf, column] = side
            self.theta[tree, leaf, column] = begin(coef, slope, rate, upper=side > 0)
        self._settle(tree.repeat(2), torch.cat((slot, new)), STEPS)

    def _note(self, tree: Tensor, slot: Tensor, column: Tensor, turn: int) -> None:
        assert self.kept is not None
        at = numpy(self.name[tree, slot])
        lower = self.kept.splits.divide(numpy(tree), at, numpy(column), np.zeros(len(at)))
        self.name[tree, slot] = torch.from_numpy(lower)
        self.name[tree, turn] = torch.from_numpy(lower + 1)

    def _settle(self, tree: Tensor, slot: Tensor, steps: int) -> None:
        for which in chunks(len(tree), self.leaves, tree.device):
            self._descend(tree[which], slot[which], steps)

    def _descend(self, tree: Tensor, slot: Tensor, steps: int) -> None:
        self.setting.relaxed.go_on()
        index, phase = self.rows.index, self.phase[tree, slot]
        passes = self.setting.passes(self.rows.image[tree], phase, (index,))
        theta = self.theta[tree, slot]
        seeds = {index: self.seeds[tree].view(-1, *self.shape)}
        open_ = passes.lines.open_
        push = (self.coef[tree, slot].abs().amax(1) * PUSH_RATE)[:, None]
        adam = Adam([torch.where(open_, SLOPE_RATE, push)])
        best = torch.full_like(push[:, 0], torch.inf)
        kept, coef = theta.clone(), torch.zeros_like(theta)
        average = passes.balls.centre
        for step in range(steps):
            value, point = passes.down(seeds, theta)
            better = value < best
            best = torch.where(better, value, best)
            torch.where(better[:, None], theta, kept, out=kept)
            torch.where(better[:, None], passes.coef, coef, out=coef)
            average = point if step == 0 else average.lerp(point, 1.0 / (step + 1))
            if step < steps - 1:
                gradient, _ = passes.up(point)
                adam.step([theta], [gradient])
                theta.clamp_(min=0.0)
                torch.where(open_, theta.clamp(max=1.0), theta, out=theta)
        z, _ = passes.real(average)
        self.score[tree, slot] = passes.losses(z, theta)
        self.coef[tree, slot] = coef
        self.theta[tree, slot] = kept
        self.bound[tree, slot] = torch.minimum(self.bound[tree, slot], best)

    def _verified(self) -> Tensor:
        tree, slot = self.leaf.nonzero(as_tuple=True)
        if self.kept is not None:
            at = numpy(self.name[tree.cpu(), slot.cpu()])
            self.kept.note(numpy(tree), at, self.theta[tree, slot], self.phase[tree, slot])
        bounds = []
        for which in chunks(len(tree), self.leaves, tree.device):
            self.setting.relaxed.go_on()
            t, s = tree[which], slot[which]
            image = self.rows.image[t]
            relaxed = self.setting.around(image, self.phase[t, s], self.theta[t, s])
            form = Form(self.rows.coef[t].view(-1, *self.shape))
            bounds.append(backward(relaxed, [(self.rows.index, form)], image).highest(relaxed.ball))
        whole = self.rows.coef.new_full((len(self.all),), -torch.inf)
        return whole.scatter_reduce(0, tree, torch.cat(bounds), "amax")


def refined(relaxed: Relaxed, rounds: int, images: Tensor | None = None) -> Relaxed:
    """The same graph with tighter boxes of all switches behind a bent layer, in order.

    `images`: bool B, those that it is about; all where that is None.
    """
    known = replace(relaxed, boxes=list(relaxed.boxes), lines=dict(relaxed.lines))
    for index, lines in relaxed.lines.items():
        op = relaxed.joint.ops[index]
        if lines.identity or len(op.inputs) > 1 or not one_bend(op):
            continue
        source = op.inputs[0]
        if Columns.of(known, (source,)).width:
            known.boxes[source] = _tighter(known, source, rounds, images)
            known.lines[index] = around(known.boxes[source], 0.0, float("inf"))
    return known


def _tighter(relaxed: Relaxed, source: Index, rounds: int, images: Tensor | None) -> Box:
    """Both ends of one operation's values, where their sign is open."""
    box = relaxed.boxes[source]
    lo, hi = box.lo.flatten(1).clone(), box.hi.flatten(1).clone()
    wanted = (lo < 0.0) & (hi > 0.0)
    if images is not None:
        wanted &= images[:, None]
    image, column = wanted.nonzero(as_tuple=True)
    if len(image) == 0:
        return box
    one = torch.nn.functional.one_hot(column, lo.shape[1]).double()
    numbers = torch.cat((2 * column, 2 * column + 1))
    both = Functionals(source, torch.cat((one, -one)), image.repeat(2), numbers)
    kept = None if relaxed.kept is None else relaxed.kept.hidden
    above, below = highest(relaxed, both, rounds=rounds, signs=True, kept=kept).view(2, -1)
    hi[image, column] = torch.minimum(hi[image, column], above)
    lo[image, column] = torch.maximum(lo[image, column], -below)
    return Box(lo.view_as(box.lo), torch.maximum(lo, hi).view_as(box.hi))


def margins(relaxed: Relaxed, items: Items, output: Index, box: Margins, rounds: int) -> Margins:
    """`box` of one network's margins (N×m), cut to what trees say.

    Margins that hold little of the confidence have at most FEW rounds.
    """
    n, m = box.lo.shape
    if not Columns.of(relaxed, (output,)).width:
        return box
    coef = torch.zeros((n, m, m + 1), dtype=torch.float64, device=box.lo.device)
    coef.scatter_(2, items.others(m + 1)[..., None], 1.0)
    coef.scatter_(2, items.klass[:, None, None].expand(n, m, 1), -1.0)
    coef = coef.view(n * m, m + 1)
    image = items.image.repeat_interleave(m).repeat(2)
    number = 2 * (items.klass[:, None] * (m + 1) + items.others(m + 1)).flatten()
    rows = Functionals(output, torch.cat((coef, -coef)), image, torch.cat((number, number + 1)))
    kept = None if relaxed.kept is None else relaxed.kept.margins
    much = (torch.softmax(box.hi, 1) >= LITTLE).flatten().repeat(2)
    found = rows.coef.new_zeros(len(image))
    for which, count in ((much, rounds), (~much, min(rounds, FEW))):
        some = rows.take(which)
        found[which] = highest(relaxed, some, rounds=count, signs=False, kept=kept)
    above, below = found.view(2, n, m)
    lo = torch.maximum(box.lo, -below)
    return Margins(lo, torch.maximum(torch.minimum(box.hi, above), lo))
