"""What a search leaves behind for a proof: splits and parameters, as they come.

A `Kept` travels with the relaxation (`Relaxed.kept`) where proofs are asked for. Nodes of a tree
are numbered as `mlflow_kdguard.proof.trees` does: split t makes nodes 2t + 1 and 2t + 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from mlflow_kdguard.certify.nodes import Nodes
    from mlflow_kdguard.certify.setting import Setting
    from mlflow_kdguard.certify.split import Rows

Ints = NDArray[np.int64]

_TREE = 1 << 32
"""A node's name: number of its tree times this, plus its number in the tree."""
_LARGEST = float(np.finfo(np.float16).max)


def encoded(theta: Tensor, phase: Tensor) -> NDArray[np.uint16]:
    """Slopes of open switches in units of 1/65535, multipliers of fixed ones as float16."""
    value, held = theta.double().cpu().numpy(), phase.cpu().numpy() != 0
    slopes = np.rint(np.clip(value, 0.0, 1.0) * 65535.0).astype(np.uint16)
    pushes = np.clip(value, 0.0, _LARGEST).astype(np.float16).view(np.uint16)
    chosen: NDArray[np.uint16] = np.where(held, pushes, slopes)
    return chosen


@dataclass(slots=True, eq=False)
class Splits:
    """Divisions of R trees in the order in which they were made: tree, node, column, where."""

    count: Ints
    rows: list[tuple[Ints, Ints, Ints, NDArray[np.float64]]] = field(default_factory=list)

    def divide(self, tree: Ints, node: Ints, column: Ints, value: NDArray[np.float64]) -> Ints:
        """Note divisions; the numbers of the lower children."""
        turn = np.empty_like(tree)
        for place, owner in enumerate(tree.tolist()):
            turn[place] = self.count[owner]
            self.count[owner] += 1
        self.rows.append((tree, node, column, value))
        return 2 * turn + 1

    def columns(self) -> tuple[Ints, Ints, Ints, NDArray[np.float64]]:
        """All divisions, tree by tree, each tree's in order."""
        empty = np.zeros(0, dtype=np.int64)
        parts = [(empty, empty, empty, np.zeros(0)), *self.rows]
        tree, node, column, value = (np.concatenate(p) for p in zip(*parts, strict=True))
        order = np.argsort(tree, kind="stable")
        return tree[order], node[order], column[order], value[order]


@dataclass(slots=True, eq=False)
class Grown:
    """Trees of one operation's functionals (int64 R: image and number of each; -1: of none)."""

    setting: "Setting"
    index: int
    image: Ints
    number: Ints
    splits: Splits
    tree: list[Ints] = field(default_factory=list)
    at: list[Ints] = field(default_factory=list)
    theta: list[NDArray[np.uint16]] = field(default_factory=list)
    extra: list[tuple[NDArray[Any], ...]] = field(default_factory=list)

    @classmethod
    def of(cls, setting: "Setting", index: int, image: Tensor, number: Tensor) -> "Grown":
        """Trees without a split."""
        count = np.zeros(len(image), dtype=np.int64)
        return cls(setting, index, numpy(image), numpy(number), Splits(count))

    def keep(self, images: Tensor) -> None:
        """Leave only the trees of these images (bool B)."""
        self.image = np.where(numpy(images)[self.image], self.image, -1)

    def note(self, tree: Ints, at: Ints, theta: Tensor, phase: Tensor) -> None:
        """Evaluations of some nodes, with what they hold."""
        self.tree.append(tree)
        self.at.append(at)
        self.theta.append(encoded(theta, phase))


@dataclass(slots=True, eq=False)
class Kept:
    """Trees of hidden switches and of margins, and of the gaps themselves."""

    hidden: list[Grown] = field(default_factory=list)
    margins: list[Grown] = field(default_factory=list)
    gaps: list[Grown] = field(default_factory=list)

    def search(self, setting: "Setting", roots: "Nodes") -> "Searching":
        """Begin to note a search from these roots."""
        number = 2 * roots.klass + (~roots.student_high[:, 0]).long()
        grown = Grown.of(setting, 0, roots.image, number)
        self.gaps.append(grown)
        return Searching(grown)


@dataclass(frozen=True, slots=True, eq=False)
class Searching:
    """Notes of one search."""

    grown: Grown

    def name(self, roots: "Nodes") -> None:
        """Give the roots their names, and note what they begin with."""
        roots.name.copy_(torch.arange(len(roots), device=roots.name.device) * _TREE)
        self.evaluated(roots)

    def divide(self, parents: "Nodes", chosen: Tensor, children: "Nodes") -> None:
        """Name the children of `parents` (all lower halves first), split along `chosen`."""
        name, column = numpy(parents.name), numpy(chosen)
        width = parents.phase.shape[1]
        high, low = (numpy(b.middle) for b in (parents.high_band, parents.low_band))
        margin = numpy((parents.low_lo + parents.low_hi) / 2)
        j = np.clip(column - width - 2, 0, None)
        value = margin[np.arange(len(column)), j]
        value = np.select(
            [column < width, column == width, column == width + 1], [0.0, high, low], value
        )
        lower = self.grown.splits.divide(name // _TREE, name % _TREE, column, value)
        names = np.concatenate((lower, lower + 1)) + np.tile(name // _TREE * _TREE, 2)
        children.name.copy_(torch.from_numpy(names))

    def evaluated(self, nodes: "Nodes") -> None:
        """Note the parameters of nodes that are part of the bound."""
        # A parent may be named for both children.
        _, first = np.unique(numpy(nodes.name), return_index=True)
        nodes = nodes.take(torch.from_numpy(first).to(nodes.name.device))
        name = numpy(nodes.name)
        self.grown.note(name // _TREE, name % _TREE, nodes.theta, nodes.phase)
        where = np.rint(np.clip(numpy(nodes.where.double()), 0.0, 1.0) * 65535.0)
        self.grown.extra.append((where.astype(np.uint16), numpy(nodes.steep), numpy(nodes.weights)))


def numpy(tensor: Tensor) -> Any:
    """The tensor's numbers on the CPU."""
    return tensor.detach().cpu().numpy()


class Halving:
    """Notes of joint CROWN: rows whose low margins are halved, each part with slopes of its own."""

    def __init__(self, kept: Kept, setting: "Setting", rows: "Rows") -> None:
        self.setting = setting
        number = 2 * rows.items.klass + (~rows.student_high[:, 0]).long()
        self.grown = Grown.of(setting, 0, rows.items.image, number)
        kept.gaps.append(self.grown)

    def halve(self, name: Tensor, chosen: Tensor, middle: Tensor) -> Tensor:
        """Names of the parts (all lower ones first) of `name`, halved along margins `chosen`."""
        node, column = numpy(name), numpy(chosen) + self.setting.columns.width + 2
        lower = self.grown.splits.divide(node // _TREE, node % _TREE, column, numpy(middle))
        names = np.concatenate((lower, lower + 1)) + np.tile(node // _TREE * _TREE, 2)
        return torch.from_numpy(names).to(name.device)

    def evaluated(
        self, name: Tensor, parameters: Sequence[Tensor], slopes: dict[int, Tensor] | None = None
    ) -> None:
        """Note what bounds the nodes `name` (int64 N); `slopes`: those below, by operation."""
        node, (where, steep, weights) = numpy(name), parameters
        images = torch.from_numpy(self.grown.image[node // _TREE])
        theta = self.setting.exact.low[images.to(name.device)]
        for index, slope in (slopes or {}).items():
            if index in self.setting.columns.place:
                theta[:, self.setting.columns.place[index]] = slope.detach().flatten(1)
        self.grown.note(node // _TREE, node % _TREE, theta, torch.zeros_like(theta))
        place = np.rint(numpy(torch.sigmoid(where)) * 65535.0).astype(np.uint16)
        steepest = numpy(steep.exp().clamp(1e-12, 0.25).float())
        self.grown.extra.append((place, steepest, numpy(weights.exp().float())))


def names(which: Tensor) -> Tensor:
    """Names of the roots of the trees at `which` (int64)."""
    return which * _TREE
