"""Branch and bound on the confidence gap: phases of switches, bands and margins of the output.

Follows β-CROWN (arXiv 2103.06624) for the networks and the Lagrangian split of `confidence` for
the output. A node's bound is one joint backward pass whose slopes, multipliers of fixed switches
and multipliers of both confidences are chosen by a few steps of gradient descent in float32; what
they bound is computed anew in float64 when the node is closed. At the image where the bound's plane
is highest, the difference between bound and truth telescopes over switches and outputs, all in
units of confidence: what accounts for most of it is split next. The bound of an image is the
largest over all nodes, split no further or not at all, so that the search can end at any time;
what it finds from below only decides when to end.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlflow_kdguard.certify import gap, trees
from mlflow_kdguard.certify.backward import Relaxed
from mlflow_kdguard.certify.budget import AIM, Aim, Limit, nothing_ends
from mlflow_kdguard.certify.confidence import Band
from mlflow_kdguard.certify.descent import Descended, Descent, Rates
from mlflow_kdguard.certify.margins import Items
from mlflow_kdguard.certify.nodes import Nodes
from mlflow_kdguard.certify.parallel import go_on
from mlflow_kdguard.certify.pool import Pool
from mlflow_kdguard.certify.setting import Setting, at_once, chunks, verified

STEPS, RATES = 8, Rates(slope=0.1, where=0.03, steep=0.02, low=0.02)
"""Steps of Adam in a node, which begins with its parent's parameters."""
ROOT_STEPS, ROOT_RATES = 60, Rates(slope=0.15, where=0.03, steep=0.05, low=0.03)
"""And in a root."""
FACTORS = 0.5, 0.25, 0.1, 0.03
"""Shares of the first multipliers that a root may begin with."""
HIDDEN_ROUNDS, MARGIN_ROUNDS = (12, 50), (40, 20)
"""Splits for each open switch, and for each margin, before the search: at least so many, and one
for so many nodes of the search. Half of the time in boxes is worth more than all of it in nodes."""
WIDTH = 32
"""Nodes that are split at a time, for each image that is open."""
FEWEST, MOST = 4, 256
"""And of one of them: in proportion to the root of what its bound exceeds its largest gap by."""
LITTLE = 2e-4
"""No image's bound counts as closer to the largest gap found than that."""
_ROWS = 1200
"""Nodes that go through a descent together: enough that products take longer than their calls."""


@dataclass(frozen=True, slots=True, eq=False)
class Searched:
    """Of Q questions: upper bounds (float64 Q) before rounding errors of exponentials, and the
    point of the largest value found (Q×C×H×W); nodes looked at in all. `left`: bool Q, whether
    nodes were left that could have been split."""

    upper: Tensor
    nodes: int
    best: Tensor
    left: Tensor


def rounds(nodes: int, given: tuple[int, int]) -> int:
    """Splits of a tree before a search of so many `nodes` an image."""
    least, share = given
    return max(least, nodes // share)


def narrowed(relaxed: Relaxed, items: Items, start: gap.Directions, nodes: int) -> gap.Directions:
    """`start` with the margins of both networks cut to what their trees say, before a search of so
    many `nodes` an image."""
    joint = relaxed.joint
    reference, student = (
        trees.margins(relaxed, items, output, box, rounds(nodes, MARGIN_ROUNDS))
        for output, box in ((joint.reference, start.reference), (joint.student, start.student))
    )
    rows = replace(start.rows, high=student.joined(reference), low=reference.joined(student))
    return replace(start, rows=rows, reference=reference, student=student)


class Search:
    """Branch and bound from `roots`; what `aim` calls enough above the `floor` (Q) of its image is
    left alone.

    With `keep`, the leaves are kept, with their sound bounds. `reached` says at which limit the
    search is, if at any: it ends there, and `stopped` is that limit.
    """

    def __init__(
        self,
        setting: Setting,
        roots: Nodes,
        floor: Tensor,
        *,
        keep: bool = False,
        reached: Callable[[], Limit | None] = nothing_ends,
        aim: Aim = AIM,
    ) -> None:
        self.setting, self.roots, self.aim = setting, roots, aim
        self.rows = at_once(setting, _ROWS)
        self.leaves: list[Nodes] | None = [] if keep else None
        self.floor, self.shape = floor.clone(), setting.relaxed.joint.input_shape
        self.upper = torch.full_like(floor, -torch.inf)
        self.best = floor.new_zeros((len(floor), *self.shape))
        self.best[roots.image] = setting.relaxed.ball.centre[roots.image]
        self.left = torch.zeros_like(floor, dtype=torch.bool)
        self.reached = reached
        self.stopped: Limit | None = None
        self.spent = 0
        kept = setting.relaxed.kept
        self.kept = None if kept is None else kept.search(setting, roots)
        if self.kept is not None:
            self.kept.name(roots)

    def run(self, nodes: int) -> Searched:
        """Split the worst nodes of every question, round by round, up to `nodes` in all."""
        self.spent = len(self.roots)
        pool = Pool(self._settled(self.roots, ROOT_STEPS, ROOT_RATES))
        while self.spent < nodes and len(pool) and not self._ended():
            children, parents = self._branched(pool.pop(self._worst(pool)))
            self.spent += len(children)
            pool.push(self._settled(children, STEPS, RATES, parents))
        self.left[pool.image] = True
        for part in pool.parts(self.rows):
            self._close(part)
        return Searched(self.upper, self.spent, self.best, self.left)

    def _ended(self) -> bool:
        """Whether a limit was reached; then it stays so."""
        if self.stopped is None:
            self.stopped = self.reached()
        return self.stopped is not None

    def _worst(self, pool: Pool) -> Tensor:
        """Which open nodes are among those of the largest bounds of their image (bool N)."""
        order, image = pool.bound.argsort(descending=True, stable=True), pool.image
        order = order[image[order].argsort(stable=True)]
        image = image[order]
        counts = torch.bincount(image, minlength=len(self.floor))
        rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[image]
        chosen = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        worst = self.floor.scatter_reduce(0, pool.image, pool.bound, "amax")
        chosen[order[rank < shares(worst - self.floor, counts > 0)[image]]] = True
        return chosen

    def _branched(self, parents: Nodes) -> tuple[Nodes, Nodes]:
        """All children that are not empty, and the parent of each."""
        rate = self.setting.quick.up[parents.image]
        chosen = parents.score.argmax(1)
        children = parents.split(chosen, rate)
        alive = (children.bound > -torch.inf).nonzero()[:, 0]
        if self.kept is not None:
            self.kept.divide(parents, chosen, children)
            self.kept.evaluated(children.take(children.bound == -torch.inf))
        return children.take(alive), parents.take(alive % len(parents))

    def _settled(
        self, nodes: Nodes, steps: int, rates: Rates, parents: Nodes | None = None
    ) -> Nodes:
        """The nodes with parameters of their own; those that need no more splits are closed."""
        parts = [
            self._one(nodes.take(which), steps, rates)
            for which in chunks(len(nodes), self.rows, nodes.image.device)
        ]
        if not parts:
            return nodes
        found = parts[0].joined(*parts[1:])
        worse = (found.bound > nodes.bound + 1e-6).nonzero()[:, 0]
        if parents is not None and len(worse):
            # What an ancestor's parameters say holds too.
            if self.kept is not None:
                self.kept.evaluated(parents.take(worse))
            found.cap[worse] = torch.minimum(
                found.cap[worse], verified(self.setting, parents.take(worse))
            )
        found = replace(found, bound=torch.minimum(found.bound, nodes.bound))
        over = (found.bound > self.aim.enough(self.floor)[found.image]) & (
            found.score.amax(1) > 0.0
        )
        self._close(found.take(~over))
        return found.take(over)

    def _one(self, nodes: Nodes, steps: int, rates: Rates) -> Nodes:
        """The nodes after their descent; at a limit, as they are."""
        if self._ended():
            self.left[nodes.image[nodes.bound > self.aim.enough(self.floor)[nodes.image]]] = True
            return nodes
        return self._noted(self._descended(nodes, steps, rates))

    def _descended(self, nodes: Nodes, steps: int, rates: Rates) -> Descended:
        go_on()
        descent = Descent(self.setting, nodes, rates)
        if rates is ROOT_RATES:
            descent.rescaled(FACTORS)
        descent.renewed()
        return descent.run(steps)

    def _noted(self, found: Descended) -> Nodes:
        """Take note of the largest values at the points that were looked at."""
        image, gaps = found.nodes.image, found.gap.double()
        top = self.floor.scatter_reduce(0, image, gaps, "amax")
        raised = (gaps > self.floor[image]) & (gaps >= top[image])
        self.best[image[raised]] = found.point[raised].double().view(-1, *self.shape)
        # A little less than what was seen: it was seen in rounded arithmetic.
        self.floor = torch.maximum(self.floor, top - 1e-5)
        return found.nodes

    def _close(self, nodes: Nodes) -> None:
        """What these nodes say, in float64, is part of the bound."""
        for which in chunks(len(nodes), self.rows, nodes.image.device):
            some = nodes.take(which)
            value = torch.minimum(verified(self.setting, some), some.cap)
            self.upper = self.upper.scatter_reduce(0, some.image, value, "amax")
            if self.kept is not None:
                self.kept.evaluated(some)
            if self.leaves is not None:
                self.leaves.append(replace(some, bound=value))


def shares(excess: Tensor, is_open: Tensor) -> Tensor:
    """How many nodes of each image are split in a round (int64 Q), by what its bound exceeds the
    largest gap found by (Q) and whether it has open nodes (bool Q, some).

    A node of an image whose bound is far from the truth is worth more than another.
    """
    weight = excess.clamp(min=LITTLE).sqrt() * is_open
    width = WIDTH * is_open.sum() * weight / weight.sum()
    return width.round().clamp(FEWEST, MOST).long()


def roots_of(setting: Setting, start: gap.Directions) -> Nodes:
    """Both directions of every item as nodes that fix nothing."""
    rows, n = start.rows, len(start.upper)
    image = rows.items.image
    where, steep, weights = start.parameters
    high, low = Band.of(rows.high), Band.of(rows.low)
    m = setting.columns.width
    nothing = where.new_zeros((n, m), dtype=torch.float32)
    return Nodes(
        image, rows.items.klass, rows.student_high,
        rows.high.lo, rows.high.hi, rows.low.lo, rows.low.hi,
        high.lo, high.hi, low.lo, low.hi,
        nothing.to(torch.int8), setting.quick.low[image], nothing,
        torch.ones_like(steep, dtype=torch.float32), torch.sigmoid(where).float(),
        steep.exp().float(), weights.exp().float(),
        start.upper.clone(), start.upper.clone(),
        where.new_zeros((n, m + 2 + where.shape[1]), dtype=torch.float32), torch.zeros_like(image),
    )  # fmt: skip
