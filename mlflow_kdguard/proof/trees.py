"""Trees of splits: which parts of a question there are, and what every part is bounded with.

A tree begins as one node, 0, that fixes nothing. Its split number t divides an undivided node
into nodes 2t + 1 (a switch off, or the lower part of an interval) and 2t + 2 (the switch on, or
the upper part). So every tree that can be written covers everything: a leaf cannot be left out. A
node is *evaluated* with slopes and multipliers of its own; what bounds a node bounds its
descendants, and a tree's bound is the largest of its leaves'.

Trees in files are written twice: as splits, and as what each leaf fixes (`leaves`). Where the two
differ, or anything but a leaf is evaluated, something was altered (`unaltered`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.errors import CertificateError
from mlflow_kdguard.proof.arithmetic import Array, Indices
from mlflow_kdguard.proof.net import Bend, Net
from mlflow_kdguard.proof.passes import ROWS, Fixed, Known, highest

LARGEST = 1 << 20
"""Splits, evaluations or trees of one group."""
LARGEST_CELLS = 1 << 24
"""Margins of all nodes of one group."""
LARGEST_DEPTH = 4096
"""Splits above a node."""
LARGEST_LEAVES = 1 << 22
"""What all leaves of one group fix."""

Rows = Callable[[Indices], dict[int, Array]]


@dataclass(frozen=True, slots=True, eq=False)
class Trees:
    """T trees, flat. `number` (T): which question each answers.

    Splits, tree by tree: `splits` (T) how many, `node` and `column` what is divided, `value` where
    (for an interval). Evaluations: `evaluations` (T) how many, `at` the node of each, `theta`
    (E×F, uint16) slopes and multipliers of the switches in columns `free` (F). `fixed`: the leaves
    once more, see `leaves`.
    """

    number: Indices
    splits: Indices
    node: Indices
    column: Indices
    value: Array
    evaluations: Indices
    at: Indices
    free: Indices
    theta: NDArray[np.uint16]
    fixed: Indices

    @property
    def owner(self) -> Indices:
        """The tree of each evaluation: int64 E."""
        return np.repeat(np.arange(len(self.number)), self.evaluations)

    @property
    def sizes(self) -> Indices:
        """How many nodes each tree has: int64 T."""
        return 2 * self.splits + 1

    @property
    def offsets(self) -> Indices:
        """The first node of each tree in a list of all nodes, and the end: int64 T + 1."""
        return np.concatenate(([0], np.cumsum(self.sizes)))

    @property
    def place(self) -> Indices:
        """The node of each evaluation in a list of all nodes: int64 E."""
        return self.offsets[:-1][self.owner] + self.at

    def take(self, tree: NDArray[np.bool_]) -> "Trees":
        """Some of the trees (bool T)."""
        split, each = np.repeat(tree, self.splits), np.repeat(tree, self.evaluations)
        taken = replace(
            self,
            number=self.number[tree],
            splits=self.splits[tree],
            node=self.node[split],
            column=self.column[split],
            value=self.value[split],
            evaluations=self.evaluations[tree],
            at=self.at[each],
            theta=self.theta[each],
        )
        return taken.told()

    def told(self) -> "Trees":
        """These trees, with what their leaves fix."""
        return replace(self, fixed=self.leaves())

    def checked(self, net: Net, intervals: int) -> "Trees":
        """These trees; CertificateError where they are no trees, or divide what cannot be.

        Columns from the number of switches on are `intervals` intervals, which may be divided again
        and again.
        """
        nodes = 2 * self.splits + 1
        ok = (
            max(len(self.node), len(self.at), len(self.number)) <= LARGEST
            and int(nodes.sum()) * (intervals + 1) <= LARGEST_CELLS
            and int(self.splits.sum()) == len(self.node) == len(self.column) == len(self.value)
            and int(self.evaluations.sum()) == len(self.at) == len(self.theta)
            and len(np.unique(self.number)) == len(self.number) == len(self.splits)
            and len(self.splits) == len(self.evaluations)
            and self.theta.shape[1] == len(self.free)
            and bool((np.diff(self.free) > 0).all())
            and bool((self.free < net.width).all())
            and bool((self.at < np.repeat(nodes, self.evaluations)).all())
            and bool((self.column < net.width + intervals).all())
            and bool(splitting(net)[self.column[self.column < net.width]].all())
            and not bool(self.value[self.column < net.width].any())
        )
        if not ok:
            raise CertificateError("the proof's trees do not fit together.")
        return self

    def unaltered(self, width: int) -> None:
        """CertificateError where the leaves are not those that `fixed` tells, where a switch (a
        column below `width`) is divided again, or anything but each leaf once is evaluated."""
        grown = self.grown()
        divided = grown.parent[grown.parent >= 0]
        same = np.diff(self.owner, prepend=-1) == 0
        if bool(np.isin(self.place, divided).any()) or bool(
            (np.diff(self.at)[same[1:]] <= 0).any()
        ):
            raise CertificateError("the proof evaluates what is no leaf, or a leaf twice.")
        if not np.array_equal(self.fixed, self.leaves(width)):
            raise CertificateError("the proof's leaves fix something else than their splits say.")

    def leaves(self, width: int = 0) -> Indices:
        """Of each leaf, in order: its tree's number, and 2·column + side of each split above it,
        from the root down (side 1: on, or the upper part)."""
        parents, steps = (v.tolist() for v in (self.grown().parent, self.grown().step))
        told: list[int] = []
        inner = set(parents)
        starts, numbers = self.offsets.tolist(), self.number.tolist()
        for number, start, end in zip(numbers, starts[:-1], starts[1:], strict=True):
            for leaf in range(start, end):
                if leaf in inner:
                    continue
                path, at = [], leaf
                while parents[at] >= 0:
                    path.append(steps[at])
                    at = parents[at]
                switches = [step // 2 for step in path if step // 2 < width]
                if len(set(switches)) < len(switches):
                    raise CertificateError("the proof divides the same switch twice.")
                told += (number, *reversed(path))
                if len(path) > LARGEST_DEPTH or len(told) > LARGEST_LEAVES:
                    raise CertificateError("the proof's trees are too deep.")
        return np.array(told, dtype=np.int64)

    def grown(self) -> "Grown":
        """All nodes; CertificateError for a split of what is not there, or is divided already."""
        total = int(self.offsets[-1])
        parent, step = (np.full(total, -1, dtype=np.int64) for _ in range(2))
        first = np.cumsum(self.splits) - self.splits
        turn = np.arange(len(self.node)) - np.repeat(first, self.splits)
        start = np.repeat(self.offsets[:-1], self.splits)
        if bool((self.node > 2 * turn).any()):
            raise CertificateError("the proof divides a node that there is not yet.")
        above, lower = start + self.node, start + 2 * turn + 1
        if len(np.unique(above)) < len(above):
            raise CertificateError("the proof divides the same node twice.")
        for side in (0, 1):
            parent[lower + side], step[lower + side] = above, 2 * self.column + side
        return Grown(parent, step)

    def bounds(
        self, values: Array, parent: Indices | None = None, known: Array | None = None
    ) -> Array:
        """Upper bounds of the trees from those of all evaluations (E): float64 T.

        `known`: what bounds every node anyway. CertificateError for a leaf that nothing bounds.
        """
        parent = self.grown().parent if parent is None else parent
        best = np.full(len(parent), np.inf) if known is None else known.copy()
        np.minimum.at(best, self.place, values)
        for at, above in enumerate(parent.tolist()):
            if above >= 0 and best[above] < best[at]:
                best[at] = best[above]
        leaf = np.ones(len(parent), dtype=bool)
        leaf[parent[parent >= 0]] = False
        if not (best[leaf] < np.inf).all():
            raise CertificateError("the proof holds a leaf that nothing bounds.")
        best[~leaf] = -np.inf
        return np.maximum.reduceat(best, self.offsets[:-1]) if len(self.number) else np.zeros(0)


@dataclass(frozen=True, slots=True, eq=False)
class Grown:
    """All N nodes of some trees: `parent` (places, -1 of a root) and `step`, 2·column + side of the
    split that made a node (-1 of a root); int64 N each."""

    parent: Indices
    step: Indices

    def phases(self, place: Indices, width: int) -> NDArray[np.int8]:
        """What the nodes at `place` (R) fix: int8 R×width, -1 off, 1 on, 0 open."""
        phase, at = np.zeros((len(place), width), dtype=np.int8), place
        rows = np.arange(len(place))
        for _ in range(LARGEST_DEPTH):
            step = self.step[at]
            here = (step >= 0) & (step < 2 * width)
            phase[rows[here], step[here] // 2] = 2 * (step[here] % 2) - 1
            rows, at = rows[step >= 0], self.parent[at][step >= 0]
            if not len(at):
                return phase
        raise CertificateError("the proof's trees are too deep.")


def splitting(net: Net) -> NDArray[np.bool_]:
    """Which switches a phase makes linear: bool width."""
    parts = [np.full(op.size, op.splits) for op in net.ops if isinstance(op, Bend)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)


def decoded(trees: Trees, known: Known, phase: NDArray[np.int8], which: Indices) -> Fixed:
    """Slopes and multipliers of some evaluations, with their phases.

    Open: theta / 65535. Fixed: the float16 whose bits theta is.
    """
    lows = [known.lines[index].below for index in known.net.columns if index in known.lines]
    value = np.zeros((len(which), known.net.width))
    if lows:
        flat = np.concatenate(lows)
        value[:, : len(flat)] = flat
    stored = trees.theta[which]
    push = stored.view(np.float16).astype(np.float64)
    held = phase[:, trees.free] != 0
    value[:, trees.free] = np.where(held, push, stored / 65535.0)
    # A switch that is fixed and has no multiplier stored takes none.
    bare = np.ones(known.net.width, dtype=bool)
    bare[trees.free] = False
    value[:, bare] = np.where(phase[:, bare] != 0, 0.0, value[:, bare])
    if not np.isfinite(value).all():
        raise CertificateError("the proof holds a multiplier that is not finite.")
    return Fixed(phase, value)


def evaluated(known: Known, trees: Trees, rows: Rows) -> Array:
    """Upper bounds of linear functionals in the nodes of all evaluations: float64 E.

    `rows(which)`: the functionals of some evaluations.
    """
    grown, place, parts = trees.grown(), trees.place, [np.zeros(0)]
    for start in range(0, len(place), ROWS):
        which = np.arange(start, min(start + ROWS, len(place)))
        fixed = decoded(trees, known, grown.phases(place[which], known.net.width), which)
        parts.append(highest(known, rows(which), fixed))
    return np.concatenate(parts)
