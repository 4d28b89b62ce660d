"""Both networks as one list of operations on flat vectors, lowered anew from the canonical layers.

Operation 0 is the image. Equal operations on equal inputs become one, so that what both networks
share cancels. Linear operations know their value, their value on magnitudes, and their transpose;
the others, `Bend`, are functions of one number, their *switch*: the input, or the difference of
two inputs, since max(a, b) = b + relu(a - b) and min(a, b) = a - relu(a - b).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, prod

import numpy as np

from mlflow_kdguard import graph
from mlflow_kdguard.proof.arithmetic import Array

Pull = Callable[[Array], tuple[Array, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """One operation: the numbers of those that it reads, and the shape that it gives."""

    inputs: tuple[int, ...]
    shape: graph.Shape

    @property
    def size(self) -> int:
        """How many numbers it gives."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Linear(Op):
    """y = W x + b. `value(*x)` and `spread(*r)` = |W| r of flat vectors; `pull(rows)` = rows W for
    each input (N×size); `offset`: b, flat; `terms`: the longest sum of products."""

    value: Callable[..., Array]
    spread: Callable[..., Array]
    pull: Pull
    offset: Array | None = None
    terms: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Bend(Op):
    """min(max(z, low), high) of one input, or the `larger` or smaller of two (then low is 0)."""

    low: float
    high: float
    larger: bool | None = None

    @property
    def splits(self) -> bool:
        """Whether a phase makes it linear: one breakpoint, at 0."""
        return self.low == 0.0 and self.high == inf

    def value(self, *x: Array) -> Array:
        """The operation itself."""
        if self.larger is None:
            return np.minimum(np.maximum(x[0], self.low), self.high)
        return np.maximum(*x) if self.larger else np.minimum(*x)


@dataclass(frozen=True, slots=True, eq=False)
class Net:
    """Operations in order, where the logits of reference and student are, and how many there are.

    `columns`: the switches of every bent operation as a slice of one axis, `width` long.
    """

    ops: tuple[Op, ...]
    reference: int
    student: int
    classes: int
    columns: dict[int, slice]
    width: int
    digests: tuple[str, str]

    @property
    def terms(self) -> int:
        """At least the length of every sum of products in a pass."""
        sums = (op.terms for op in self.ops if isinstance(op, Linear))
        return max(len(self.ops), *sums, *(op.size for op in self.ops))

    def behind(self, output: int) -> set[int]:
        """The operations that `output` is computed from, itself included."""
        seen, waiting = set[int](), [output]
        while waiting:
            index = waiting.pop()
            if index not in seen:
                seen.add(index)
                waiting += self.ops[index].inputs
        return seen


@dataclass(slots=True, eq=False)
class Builder:
    """Operations so far; equal ones become one."""

    input_shape: graph.Shape
    ops: list[Op] = field(default_factory=list)
    known: dict[object, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ops.append(Op((), self.input_shape))

    def add(self, key: tuple[object, ...], make: Callable[[], Op]) -> int:
        """The number of the operation that `key` describes, an earlier one where it is known."""
        if key not in self.known:
            self.known[key] = len(self.ops)
            self.ops.append(make())
        return self.known[key]


def key_of(*arrays: Array) -> tuple[object, ...]:
    """What tells arrays apart."""
    return tuple((a.shape, np.ascontiguousarray(a).tobytes()) for a in arrays)
