"""Trees of gaps: which part of the margins every node speaks of, and what bounds it.

Beside switches, a node may divide intervals: the band of the higher confidence (column `width` of
the networks' switches), that of the lower one (`width` + 1), or margin j of the lower one
(`width` + 2 + j). A division is at most as wide as what it divides, so that any middle is sound.
"""

from dataclasses import dataclass

import numpy as np

from mlflow_kdguard.errors import CertificateError
from mlflow_kdguard.proof import confidence
from mlflow_kdguard.proof.arithmetic import Array, Indices, down, up
from mlflow_kdguard.proof.confidence import Part
from mlflow_kdguard.proof.document import Gaps
from mlflow_kdguard.proof.passes import ROWS, Fixed, Known, highest
from mlflow_kdguard.proof.trees import decoded

Apart = tuple[Array, Array]


@dataclass(frozen=True, slots=True, eq=False)
class Class:
    """Margins of both networks to one class (one part each), and of reference - student (1×m)."""

    reference: Part
    student: Part
    difference: Apart

    def direction(self, number: int) -> tuple[Part, Part, Array, Array]:
        """Of tree `number`: margins of the higher and the lower confidence, and least and largest
        difference, higher - lower."""
        lo, hi = self.difference
        if number % 2 == 0:
            return self.student, self.reference, -hi, -lo
        return self.reference, self.student, lo, hi


def folded(k: int, classes: int) -> Array:
    """logit j - logit k for every other class j, ascending: (K - 1)×K."""
    rows = np.delete(np.eye(classes), k, axis=0)
    rows[:, k] = -1.0
    return rows


@dataclass(frozen=True, slots=True, eq=False)
class Search:
    """The trees of gaps, of classes whose margins are known."""

    known: Known
    gaps: Gaps
    classes: dict[int, Class]

    def values(self) -> tuple[Array, Array, Indices]:
        """Bounds of all evaluations, what bounds every node anyway, and the parents of all."""
        trees, net = self.gaps.trees, self.known.net
        if not len(trees.number):
            return np.zeros(0), np.zeros(0), np.zeros(0, dtype=np.int64)
        m, count = net.classes - 1, len(trees.at)
        shapes = (self.gaps.where.shape, self.gaps.weights.shape, self.gaps.steep.shape)
        if shapes != ((count, m), (count, m), (count,)):
            raise CertificateError("the proof's multipliers do not fit its trees.")
        grown = trees.grown()
        nodes = _divided(self, grown.parent)
        place, values = trees.place, [np.zeros(0)]
        for start in range(0, count, ROWS):
            which = np.arange(start, min(start + ROWS, count))
            at = place[which]
            fixed = decoded(trees, self.known, grown.phases(at, net.width), which)
            values.append(self._evaluated(which, fixed, nodes.high.take(at), nodes.low.take(at)))
        return np.concatenate(values), nodes.plain(), grown.parent

    def _evaluated(self, which: Indices, fixed: Fixed, high: Part, low: Part) -> Array:
        """Upper bounds of p_H - p_L in some nodes: float64 N."""
        gaps, net = self.gaps, self.known.net
        number = gaps.trees.number[gaps.trees.owner[which]]
        steep = np.clip(gaps.steep[which], confidence.FLATTEST, confidence.STEEPEST)
        upper, constant = confidence.upper_plane(high, gaps.where[which] / 65535.0, steep)
        weights = np.maximum(gaps.weights[which], confidence.LIGHTEST)
        constant = constant + confidence.lower_constant(low, weights)
        slack = confidence.margin(high, upper) + confidence.margin(low, weights)
        student_high = (number % 2 == 0)[:, None]
        tables = np.stack([folded(k, net.classes) for k in range(net.classes)])[number // 2]
        seeds: dict[int, Array] = {}
        for output, chosen in (
            (net.student, np.where(student_high, upper, weights)),
            (net.reference, np.where(student_high, weights, upper)),
        ):
            rows = (chosen[:, None] @ tables)[:, 0]
            seeds[output] = seeds[output] + rows if output in seeds else rows
        empty = constant == -np.inf
        value = highest(self.known, seeds, fixed) + np.where(empty, 0.0, constant) + slack
        value = np.where(np.isnan(value), np.inf, up(value))
        return np.where(empty, -np.inf, np.minimum(value, 1.0))


@dataclass(frozen=True, slots=True, eq=False)
class _Nodes:
    """Parts of all nodes, filled in from the roots downwards; `least`, `most`: N×m, the difference
    of the margins."""

    high: Part
    low: Part
    least: Array
    most: Array

    def plain(self) -> Array:
        """What boxes, bands and differences say of every node: float64 N."""
        linked = confidence.linked_gap(self.high, self.low, self.least)
        gap = np.minimum(confidence.plain_gap(self.high, self.low), linked)
        gap = np.minimum(gap, confidence.band_gap(self.high, self.low))
        # Boxes that cross in rounding say nothing here.
        crossed = self.high.empty | self.low.empty | np.isnan(gap)
        return np.where(crossed, np.inf, up(gap))

    def inherit(self, child: Indices, parent: Indices) -> None:
        """Both children are as their parent is."""
        for side in (0, 1):
            self.high.put(child + side, self.high.take(parent))
            self.low.put(child + side, self.low.take(parent))

    def halve_band(self, child: Indices, parent: Indices, middle: Array, *, high: bool) -> None:
        """The band below `middle`, and the band above it."""
        self.inherit(child, parent)
        part = self.high if high else self.low
        whole = part.take(parent)
        lower = Part(whole.lo, whole.hi, whole.least, np.minimum(whole.most, middle))
        upper = Part(whole.lo, whole.hi, np.maximum(whole.least, middle), whole.most)
        for side, half in enumerate((lower, upper)):
            part.put(child + side, half.tightened().tightened())

    def halve_margin(self, child: Indices, parent: Indices, middle: Array, j: Indices) -> None:
        """Low margin `j` below `middle`, and above it; the high margins follow."""
        each = np.arange(len(child))
        for side in (0, 1):
            low, high = self.low.take(parent), self.high.take(parent)
            if side == 0:
                low.hi[each, j] = np.minimum(low.hi[each, j], middle)
            else:
                low.lo[each, j] = np.maximum(low.lo[each, j], middle)
            low = low.tightened()
            lo = np.maximum(high.lo, down(low.lo + self.least[parent]))
            hi = np.minimum(high.hi, up(low.hi + self.most[parent]))
            self.low.put(child + side, low)
            self.high.put(child + side, Part(lo, hi, high.least, high.most).tightened())


def _divided(search: Search, parent: Indices) -> _Nodes:
    """All nodes, from the roots downwards, level by level."""
    trees, width = search.gaps.trees, search.known.net.width
    roots = [search.classes[n // 2].direction(n) for n in trees.number.tolist()]
    start, count = trees.offsets[:-1], len(parent)
    sizes = np.diff(trees.offsets)
    nodes = _Nodes(
        Part.empty_of(count, roots[0][2].shape[1]), Part.empty_of(count, roots[0][2].shape[1]),
        np.repeat(np.concatenate([r[2] for r in roots]), sizes, axis=0),
        np.repeat(np.concatenate([r[3] for r in roots]), sizes, axis=0),
    )  # fmt: skip
    for at, (high, low, _, _) in zip(start.tolist(), roots, strict=True):
        nodes.high.put(np.array([at]), high.tightened())
        nodes.low.put(np.array([at]), low.tightened())
    first = np.cumsum(trees.splits) - trees.splits
    turn = np.arange(len(trees.node)) - np.repeat(first, trees.splits)
    child = np.repeat(start, trees.splits) + 2 * turn + 1
    for level in _levels(parent, child):
        column, at = trees.column[level] - width, child[level]
        for kind in np.unique(np.clip(column, -1, 2)).tolist():
            which = np.clip(column, -1, 2) == kind
            some, value = at[which], trees.value[level][which]
            if kind < 0:
                nodes.inherit(some, parent[some])
            elif kind < 2:
                nodes.halve_band(some, parent[some], value, high=kind == 0)
            else:
                nodes.halve_margin(some, parent[some], value, column[which] - 2)
    return nodes


def _levels(parent: Indices, child: Indices) -> list[Indices]:
    """Splits (by number) grouped by depth, the roots' first; parents come before their children."""
    depth = np.zeros(len(parent), dtype=np.int64)
    for at, above in enumerate(parent.tolist()):
        if above >= 0:
            depth[at] = depth[above] + 1
    levels = depth[child]
    return [np.flatnonzero(levels == n) for n in range(1, int(levels.max(initial=0)) + 1)]
