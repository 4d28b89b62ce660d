"""Branch and bound on the confidence gap: phases of switches, and bands of the output.

Follows β-CROWN (arXiv 2103.06624) for the networks and the Lagrangian split of `confidence` for
the output. A node's bound is one joint backward pass whose slopes, multipliers of fixed switches
and multipliers of both confidences are chosen by a few steps of gradient descent; any values are
sound. At the image where the bound's plane is highest, the difference between bound and truth
telescopes over switches and outputs, all in units of confidence: what accounts for most of it is
split next. The bound of an image is the largest over all nodes, split no further or not at all, so
that the search can end at any time; what it finds from below only decides when to end.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mlflow_kdguard.certify import gap, margins
from mlflow_kdguard.certify.backward import Relaxed, backward
from mlflow_kdguard.certify.confidence import Band, Margins
from mlflow_kdguard.certify.descent import Descent
from mlflow_kdguard.certify.forms import Form
from mlflow_kdguard.certify.joint import Index
from mlflow_kdguard.certify.margins import Items
from mlflow_kdguard.certify.nodes import Nodes, Switches

STEPS = 8
"""Steps of Adam in a node, which begins with its parent's parameters."""
ROOT_STEPS = 30
"""And in a root."""
WIDTH = 16
"""Nodes of each image that are split at a time."""
RELATIVE, ABSOLUTE = 0.02, 1e-3
"""A node whose bound exceeds the largest gap found by no more than that is left alone."""
MARGINS = 4
"""Margins of a network that are bounded anew where one of its switches was fixed."""
_ROWS = 2048
_CHUNK_BYTES = 256 << 20
_COPIES = 14


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to search: nodes an image, not seconds, so that a search repeats itself exactly."""

    nodes: int


@dataclass(frozen=True, slots=True, eq=False)
class Searched:
    """Upper bounds (float64 B) before rounding errors of exponentials, nodes looked at in all,
    and the point of the largest gap found for each image (B×C×H×W)."""

    upper: Tensor
    nodes: int
    best: Tensor


def search(relaxed: Relaxed, start: gap.Directions, floor: Tensor, budget: Budget) -> Searched:
    """Search all rows of `start` together; what is at most `floor` (B) is not looked at."""
    return _Search(relaxed, start, floor, budget).run()


def bounds(relaxed: Relaxed, classes: Tensor | None, budget: Budget) -> tuple[Tensor, int, Tensor]:
    """Upper bounds (float64 B in [0, 1]) of the gap of one class, or of all (None).

    All classes: the reference's class first; then, together, whatever else can exceed its bound.
    Also the number of nodes an image, and the points of the largest gaps found (B×C×H×W).
    """
    centre = relaxed.ball.centre
    if not bool(Switches.of(relaxed).open_.any()):
        plain = gap.bounded(relaxed, classes, gap.by_planes)
        return plain.upper, 1, centre if plain.worst is None else plain.worst
    images = torch.arange(len(centre), device=centre.device)
    nothing = torch.zeros(len(centre), dtype=torch.float64, device=centre.device)
    one = classes if classes is not None else relaxed.joint.logits(centre)[0].argmax(1)
    top = Items(images, one)
    start = gap.directions(relaxed, top, refining=False)
    found = search(relaxed, start, nothing, budget)
    upper = gap.sound(found.upper, relaxed)
    if classes is not None:
        return upper, found.nodes // len(centre), found.best
    caps = torch.maximum(margins.caps(start.reference, top), margins.caps(start.student, top))
    image, klass = (~(caps <= upper[:, None])).nonzero(as_tuple=True)
    if len(image) == 0:
        return upper, found.nodes // len(centre), found.best
    more = search(
        relaxed, gap.directions(relaxed, Items(image, klass), refining=False), upper, budget
    )
    best = torch.where((more.upper > upper).view(-1, 1, 1, 1), more.best, found.best)
    upper = torch.maximum(upper, gap.sound(more.upper, relaxed))
    return upper, (found.nodes + more.nodes) // len(centre), best


class _Search:
    def __init__(
        self, relaxed: Relaxed, start: gap.Directions, floor: Tensor, budget: Budget
    ) -> None:
        self.relaxed, self.budget = relaxed, budget
        self.switches = Switches.of(relaxed)
        self.images = len(relaxed.ball.centre)
        self.floor = floor.clone()
        self.best = relaxed.ball.centre.clone()
        self.spent = 0
        self.nodes = self._roots(start)
        self.used = len(self.nodes)

    def run(self) -> Searched:
        """Split the worst nodes of every image, round by round."""
        roots = (self.nodes.bound > self._enough()[self.nodes.image]).nonzero()[:, 0]
        if len(roots):
            self.nodes.put(roots, self._evaluated(self.nodes.take(roots), ROOT_STEPS))
        while self.spent < self.budget.nodes * self.images:
            which = self._worst()
            if len(which) == 0:
                break
            parents = self.nodes.take(which)
            first, second = (
                self._bounded(self._sharpened(parents, child)) for child in parents.split()
            )
            self.nodes.put(which, first)
            self._append(second)
        used = slice(0, self.used)
        upper = torch.zeros_like(self.floor)
        upper = upper.scatter_reduce(0, self.nodes.image[used], self.nodes.bound[used], "amax")
        return Searched(upper, self.spent, self.best)

    def _enough(self) -> Tensor:
        return torch.maximum(self.floor * (1.0 + RELATIVE), self.floor + ABSOLUTE)

    def _worst(self) -> Tensor:
        """The WIDTH open nodes of the largest bounds of each image."""
        used = slice(0, self.used)
        bound, image = self.nodes.bound[used], self.nodes.image[used]
        splits = self.nodes.score[used].amax(1) > 0.0
        which = (splits & (bound > self._enough()[image])).nonzero()[:, 0]
        order = which[bound[which].argsort(descending=True)]
        order = order[image[order].argsort(stable=True)]
        counts = torch.bincount(image[order], minlength=self.images)
        rank = torch.arange(len(order), device=order.device)
        rank = rank - (counts.cumsum(0) - counts)[image[order]]
        return order[rank < WIDTH]

    def _append(self, more: Nodes) -> None:
        need = self.used + len(more)
        if need > len(self.nodes):
            room = torch.zeros(max(need, 2 * self.used) - len(self.nodes), dtype=torch.int64)
            self.nodes = self.nodes.joined(self.nodes.take(room.to(more.image.device)))
        places = torch.arange(self.used, need, device=more.image.device)
        self.nodes.put(places, more)
        self.used = need

    def _sharpened(self, parents: Nodes, children: Nodes) -> Nodes:
        """Children with the margins that follow from a switch that was fixed."""
        chosen, joint = parents.chosen, self.relaxed.joint
        alive = children.bound > self._enough()[children.image]
        boxes = {}
        for output in (joint.reference, joint.student):
            feeds = torch.nn.functional.pad(self.switches.feeds[output], (0, 2))
            which = (feeds[chosen] & alive).nonzero()[:, 0]
            student = children.student_high == (output == joint.student)
            box = Margins(
                torch.where(student, children.high_lo, children.low_lo),
                torch.where(student, children.high_hi, children.low_hi),
            )
            boxes[output] = self._margins(children, which, output, box)
        a, b, student = boxes[joint.student], boxes[joint.reference], children.student_high
        high = Margins(torch.where(student, a.lo, b.lo), torch.where(student, a.hi, b.hi))
        low = Margins(torch.where(student, b.lo, a.lo), torch.where(student, b.hi, a.hi))
        return children.within(high, low)

    def _margins(self, nodes: Nodes, which: Tensor, output: Index, box: Margins) -> Margins:
        """The largest margins of one network in the nodes at `which`, bounded anew."""
        lo, hi = box.lo.clone(), box.hi.clone()
        if len(which) == 0:
            return box
        joint, ball = self.relaxed.joint, self.relaxed.ball
        some = nodes.take(which)
        top = hi[which].topk(min(MARGINS, hi.shape[1]), 1).indices
        n, count = top.shape
        rows = torch.zeros((n, count, joint.classes), dtype=torch.float64, device=lo.device)
        others = Items(some.image, some.klass).others(joint.classes)
        rows.scatter_(2, others.gather(1, top)[..., None], 1.0)
        rows.scatter_(2, some.klass[:, None, None].expand(n, count, 1), -1.0)
        rows = torch.stack((rows, -rows), 1).view(-1, joint.classes)
        each = torch.arange(n, device=lo.device).repeat_interleave(2 * count)
        lines = self.switches.lines(some, self.switches.lower_slope[some.image])
        bounds = []
        for part in torch.split(torch.arange(len(rows), device=lo.device), _ROWS):
            relaxed = Relaxed(joint, ball, [], self.relaxed.scales, lines, each=each[part])
            plane = backward(relaxed, [(output, Form(rows[part]))], some.image[each[part]])
            bounds.append(plane.highest(ball))
        above = torch.cat(bounds).view(n, 2, count)
        hi[which] = hi[which].scatter_reduce(1, top, above[:, 0], "amin")
        lo[which] = lo[which].scatter_reduce(1, top, -above[:, 1], "amax")
        return Margins(lo, hi)

    def _bounded(self, children: Nodes) -> Nodes:
        """Children with bounds of their own, never above their parent's."""
        alive = (children.bound > self._enough()[children.image]).nonzero()[:, 0]
        self.spent += len(children)
        if len(alive):
            known = children.take(alive)
            found = self._evaluated(known, STEPS)
            found.bound.copy_(torch.minimum(found.bound, known.bound))
            children.put(alive, found)
        return children

    def _roots(self, start: gap.Directions) -> Nodes:
        rows, n = start.rows, len(start.upper)
        image = rows.items.image
        where, steep, weights = (value.clone() for value in start.parameters)
        high, low = Band.of(rows.high), Band.of(rows.low)
        m = self.switches.open_.shape[1]
        return Nodes(
            image, rows.items.klass, rows.student_high,
            rows.high.lo, rows.high.hi, rows.low.lo, rows.low.hi,
            high.lo, high.hi, low.lo, low.hi,
            image.new_zeros((n, m), dtype=torch.int8),
            self.switches.lower_slope[image].float(),
            where.new_zeros((n, m), dtype=torch.float32),
            where.new_ones(n, dtype=torch.float32),
            where, steep, weights,
            start.upper.clone(),
            where.new_zeros((n, m + 2), dtype=torch.float32),
        )  # fmt: skip

    def _evaluated(self, nodes: Nodes, steps: int) -> Nodes:
        width = max(1, self.switches.open_.shape[1] + self.best[0].numel())
        size = max(8, _CHUNK_BYTES // (8 * _COPIES * width))
        parts = [
            self._descended(nodes.take(which), steps)
            for which in torch.split(torch.arange(len(nodes), device=nodes.image.device), size)
        ]
        joined = parts[0]
        for part in parts[1:]:
            joined = joined.joined(part)
        return joined

    def _descended(self, nodes: Nodes, steps: int) -> Nodes:
        """The least bound in a few steps of descent, the last parameters, and scores."""
        descent = Descent(self.relaxed, self.switches, nodes)
        best, score = nodes.bound, torch.zeros_like(nodes.score)
        for step in range(steps):
            value, plane = descent.bound()
            best = torch.minimum(best, value)
            if step >= steps - 2:
                score += self._explained(descent, nodes, plane.corner(self.relaxed.ball))
            if step < steps - 1:
                descent.improve()
        return descent.finished(nodes, best, score)

    def _explained(self, descent: Descent, nodes: Nodes, corner: Tensor) -> Tensor:
        """What each split would concern (N×(M+2)); takes note of the gaps at `corner`."""
        z, reference, student = self.switches.at(self.relaxed.joint, corner)
        score, gaps = descent.scores(nodes, z, reference, student)
        gaps = torch.where(gaps.isnan(), -1.0, gaps)
        top = self.floor.scatter_reduce(0, nodes.image, gaps, "amax")
        raised = (gaps > self.floor[nodes.image]) & (gaps >= top[nodes.image])
        self.best[nodes.image[raised]] = corner[raised]
        # A little less than what was seen: it was seen in rounded arithmetic.
        self.floor = torch.maximum(self.floor, top - 1e-9)
        return score
