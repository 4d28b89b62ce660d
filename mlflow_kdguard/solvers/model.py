"""A linear or mixed-integer program, as every adapter takes it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """Maximise cost·v with row_lo <= A v <= row_hi and lo <= v <= hi.

    `matrix`: A, m×n, float64, each entry once; `row_lo`, `row_hi`: m, may be infinite; `cost`,
    `lo`, `hi`: n, finite, which is what makes any multipliers prove something (`dual`); `integer`:
    n, the variables that are 0 or 1.
    """

    cost: Floats
    matrix: csr_array
    row_lo: Floats
    row_hi: Floats
    lo: Floats
    hi: Floats
    integer: Flags

    def __post_init__(self) -> None:
        """A program with a variable that has no finite box is a mistake of its author."""
        if not (np.isfinite(self.lo).all() and np.isfinite(self.hi).all()):
            raise ValueError("every variable needs a finite box")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and variables."""
        return len(self.row_lo), len(self.lo)

    def relaxed(self) -> "Model":
        """The same program without integrality."""
        return replace(self, integer=np.zeros_like(self.integer))


@dataclass(slots=True)
class Builder:
    """Variables and rows in the making; `begin` is a program to go on from."""

    begin: Model | None = None
    _lo: list[Floats] = field(default_factory=list)
    _hi: list[Floats] = field(default_factory=list)
    _integer: list[Flags] = field(default_factory=list)
    _rows: list[NDArray[np.int64]] = field(default_factory=list)
    _columns: list[NDArray[np.int64]] = field(default_factory=list)
    _values: list[Floats] = field(default_factory=list)
    _row_lo: list[Floats] = field(default_factory=list)
    _row_hi: list[Floats] = field(default_factory=list)
    _count: int = 0
    _height: int = 0

    def __post_init__(self) -> None:
        """Numbers of new variables and rows follow those of `begin`."""
        if self.begin is not None:
            self._count = self.begin.shape[1]

    def variables(
        self, lo: Floats | float, hi: Floats | float, *, integer: bool = False
    ) -> NDArray[np.int64]:
        """New variables with these boxes: their numbers."""
        lo, hi = np.atleast_1d(lo).astype(float), np.atleast_1d(hi).astype(float)
        self._lo.append(lo)
        self._hi.append(np.maximum(lo, hi))
        self._integer.append(np.full(len(lo), integer))
        numbers = np.arange(self._count, self._count + len(lo), dtype=np.int64)
        self._count += len(lo)
        return numbers

    def rows(
        self,
        columns: NDArray[np.int64],
        values: Floats,
        lo: Floats | float = -np.inf,
        hi: Floats | float = np.inf,
    ) -> None:
        """R rows lo <= Σ values · v[columns] <= hi (R×t each); column -1 stands for nothing."""
        columns, values = np.broadcast_arrays(np.atleast_2d(columns), np.atleast_2d(values))
        height, width = columns.shape
        kept = (columns >= 0) & (values != 0.0)
        number = np.repeat(np.arange(self._height, self._height + height), width).reshape(-1, width)
        self._rows.append(number[kept])
        self._columns.append(columns[kept])
        self._values.append(values[kept].astype(float))
        self._row_lo.append(np.broadcast_to(np.asarray(lo, dtype=float), (height,)))
        self._row_hi.append(np.broadcast_to(np.asarray(hi, dtype=float), (height,)))
        self._height += height

    def model(self, cost: dict[int, float] | None = None) -> Model:
        """The program; `cost` by variable."""
        old, n = self.begin, self._count
        added = csr_array(
            (_joined(self._values), (_joined(self._rows, int), _joined(self._columns, int))),
            shape=(self._height, n),
        )
        objective = np.zeros(n)
        for column, value in (cost or {}).items():
            objective[column] += value
        rows = _joined(self._row_lo), _joined(self._row_hi)
        boxes = _joined(self._lo), _joined(self._hi)
        integer = _joined(self._integer, bool)
        if old is None:
            return Model(objective, added, *rows, *boxes, integer)
        return Model(
            objective, _stacked(old.matrix, added),
            _joined((old.row_lo, rows[0])), _joined((old.row_hi, rows[1])),
            _joined((old.lo, boxes[0])), _joined((old.hi, boxes[1])),
            _joined((old.integer, integer), bool),
        )  # fmt: skip


def _joined(parts: Sequence[NDArray[Any]], kind: type = float) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype=kind), *parts])


def _stacked(top: csr_array, below: csr_array) -> csr_array:
    """Rows of both; `below` may have more columns."""
    starts = np.concatenate([top.indptr, below.indptr[1:] + top.indptr[-1]])
    return csr_array(
        (
            np.concatenate([top.data, below.data]),
            np.concatenate([top.indices, below.indices]),
            starts,
        ),
        shape=(top.shape[0] + below.shape[0], below.shape[1]),
    )
