"""The open nodes of a search, in memory that is used again.

A search takes a few hundred of its open nodes at a time and puts their children back. To write all
the others anew each time would cost more, the longer it runs.
"""

from collections.abc import Iterator
from dataclasses import fields

import torch
from torch import Tensor

from mlflow_kdguard.certify.nodes import Nodes
from mlflow_kdguard.certify.setting import chunks

_GROWTH = 0.5
"""Room for so many more nodes, as a share of those that there is room for."""


class Pool:
    """Nodes in the order in which they were put in."""

    def __init__(self, nodes: Nodes) -> None:
        everything = torch.arange(len(nodes), device=nodes.image.device)
        # A copy: rows are overwritten.
        self._rows = nodes.take(everything)
        self._order = everything
        self._free = everything[:0]

    def __len__(self) -> int:
        return len(self._order)

    @property
    def bound(self) -> Tensor:
        """Bounds of all nodes: float64 N."""
        return self._rows.bound[self._order]

    @property
    def image(self) -> Tensor:
        """Whose they are: int64 N."""
        return self._rows.image[self._order]

    def pop(self, which: Tensor) -> Nodes:
        """Take out the nodes at `which` (bool N)."""
        taken, self._order = self._order[which], self._order[~which]
        self._free = torch.cat((self._free, taken))
        return self._rows.take(taken)

    def push(self, nodes: Nodes) -> None:
        """Put nodes behind all others."""
        lack = len(nodes) - len(self._free)
        if lack > 0:
            self._grow(max(lack, int(_GROWTH * len(self._rows))))
        rows, self._free = self._free[: len(nodes)], self._free[len(nodes) :]
        for item in fields(nodes):
            getattr(self._rows, item.name)[rows] = getattr(nodes, item.name)
        self._order = torch.cat((self._order, rows))

    def parts(self, size: int) -> Iterator[Nodes]:
        """All nodes, at most `size` at a time."""
        for which in chunks(len(self), size, self._order.device):
            yield self._rows.take(self._order[which])

    def _grow(self, count: int) -> None:
        old = len(self._rows)
        room = {}
        for item in fields(self._rows):
            known = getattr(self._rows, item.name)
            room[item.name] = torch.cat((known, known.new_empty((count, *known.shape[1:]))))
        self._rows = Nodes(**room)
        new = torch.arange(old, old + count, device=self._free.device)
        self._free = torch.cat((self._free, new))
