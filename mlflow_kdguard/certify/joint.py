"""Reference and student as one graph over a shared image.

Equal operations on equal inputs become one operation (value numbering), so that whatever the two
networks share, frozen layers or all of them, cancels in their difference as a variable, not as a
comparison of files.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlflow_kdguard.certify import ops
from mlflow_kdguard.errors import ModelError
from mlflow_kdguard.graph import layers as canonical

Index = int
Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Joint:
    """Operations in topological order (0 is the image) and where the two networks' logits are."""

    ops: tuple[ops.Op, ...]
    reference: Index
    student: Index
    input_shape: tuple[int, ...]
    classes: int

    @property
    def terms(self) -> int:
        """At least the length of every sum of products in any pass over the graph."""
        sums = (op.terms for op in self.ops if isinstance(op, ops.Linear))
        return max(len(self.ops), *sums, *(prod(op.shape) for op in self.ops))

    def cast(self, dtype: torch.dtype, device: torch.device) -> "Joint":
        """The same graph with constants of another dtype."""
        moved = tuple(op.cast(dtype, device) for op in self.ops)
        return Joint(moved, self.reference, self.student, self.input_shape, self.classes)

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of reference and student, N×K each, at images x (N×C×H×W)."""
        values: list[Tensor] = [x]
        for op in self.ops[1:]:
            values.append(op.value(*(values[i] for i in op.inputs)))
        return values[self.reference], values[self.student]


def join(reference: canonical.Graph, student: canonical.Graph, *, device: torch.device) -> Joint:
    """Lower two canonical graphs into one float64 graph on `device`.

    Raises ModelError where they do not take the same images or give the same number of logits.
    """
    if reference.input_shape != student.input_shape or reference.classes != student.classes:
        raise ModelError(
            f"the reference maps {reference.input_shape} to {reference.classes} logits, the "
            f"student {student.input_shape} to {student.classes}: there is no gap to bound.",
            remedy="Certify a student against the reference that it was distilled from.",
        )
    builder = _Builder(reference.input_shape)
    ends = builder.lower(reference), builder.lower(student)
    graph = Joint(tuple(builder.ops), *ends, reference.input_shape, reference.classes)
    return graph.cast(torch.float64, device)


class _Builder:
    def __init__(self, input_shape: tuple[int, ...]) -> None:
        self.ops: list[ops.Op] = [ops.Input((), input_shape)]
        self._known: dict[object, Index] = {}

    def lower(self, graph: canonical.Graph) -> Index:
        """Append a graph's operations; the index of its output."""
        place = {canonical.INPUT: 0}
        for layer in graph.layers:
            lower = _LOWER.get(type(layer))
            if lower is None:
                raise ModelError(f"no bound is known for the layer {type(layer).__name__}.")
            place[layer.name] = lower(self, layer, tuple(place[name] for name in layer.inputs))
        return place[graph.output]

    def add(self, op: ops.Op) -> Index:
        """The index of an operation, an earlier one where it is the same."""
        key = (type(op), *(_key(getattr(op, item.name)) for item in fields(op)))
        if key not in self._known:
            self._known[key] = len(self.ops)
            self.ops.append(op)
        return self._known[key]


def _key(value: object) -> object:
    return (value.shape, value.numpy().tobytes()) if isinstance(value, Tensor) else value


def _tensor(array: canonical.Array) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float64))


def _affine(builder: _Builder, layer: canonical.Affine, at: tuple[Index, ...]) -> Index:
    return builder.add(ops.Affine(at, layer.shape, _tensor(layer.weight), _tensor(layer.bias)))


def _conv(builder: _Builder, layer: canonical.Conv, at: tuple[Index, ...]) -> Index:
    source = builder.ops[at[0]].shape
    weight, bias = _tensor(layer.weight), _tensor(layer.bias)
    how = (layer.strides, layer.pads, layer.dilations, layer.groups)
    return builder.add(ops.Conv(at, layer.shape, weight, bias, *how, source))


def _scale(builder: _Builder, layer: canonical.Scale, at: tuple[Index, ...]) -> Index:
    factor, shift = (
        _tensor(np.broadcast_to(array, layer.shape))[None] for array in (layer.factor, layer.offset)
    )
    return builder.add(ops.Scale(at, layer.shape, factor, shift))


def _relu(builder: _Builder, layer: canonical.Relu, at: tuple[Index, ...]) -> Index:
    return builder.add(ops.Clip(at, layer.shape, 0.0, float("inf")))


def _clip(builder: _Builder, layer: canonical.Clip, at: tuple[Index, ...]) -> Index:
    return builder.add(ops.Clip(at, layer.shape, float(layer.low), float(layer.high)))


def _add(builder: _Builder, layer: canonical.Add, at: tuple[Index, ...]) -> Index:
    return builder.add(ops.Sum(at, layer.shape, 1.0))


def _sub(builder: _Builder, layer: canonical.Sub, at: tuple[Index, ...]) -> Index:
    return builder.add(ops.Sum(at, layer.shape, -1.0))


def _maximum(builder: _Builder, layer: canonical.Maximum, at: tuple[Index, ...]) -> Index:
    return builder.add(ops.Extreme(at, layer.shape, True))


def _minimum(builder: _Builder, layer: canonical.Minimum, at: tuple[Index, ...]) -> Index:
    return builder.add(ops.Extreme(at, layer.shape, False))


def _reshape(builder: _Builder, layer: canonical.Reshape, at: tuple[Index, ...]) -> Index:
    return builder.add(ops.Reshape(at, layer.shape, builder.ops[at[0]].shape))


def _average_pool(builder: _Builder, layer: canonical.AveragePool, at: tuple[Index, ...]) -> Index:
    """A depthwise convolution; where padding does not count, scaled by the share that does."""
    source = builder.ops[at[0]].shape
    channels, (kh, kw) = source[0], layer.kernel
    weight = torch.full((channels, 1, kh, kw), 1.0 / (kh * kw), dtype=torch.float64)
    bias = torch.zeros(channels, dtype=torch.float64)
    how = (layer.strides, layer.pads, (1, 1), channels)
    mean = builder.add(ops.Conv(at, layer.shape, weight, bias, *how, source))
    if layer.count_padding or not any(layer.pads):
        return mean
    counted = [_window_counts(layer, source, axis) for axis in (0, 1)]
    share = kh * kw / np.outer(*counted)
    factor = _tensor(np.broadcast_to(share, layer.shape))[None]
    return builder.add(ops.Scale((mean,), layer.shape, factor, torch.zeros_like(factor)))


def _window_rows(
    layer: canonical.AveragePool | canonical.MaxPool, source: tuple[int, ...], axis: int
) -> Rows:
    """Input rows (axis 0) or columns (axis 1) that each window covers, padding included."""
    starts = np.arange(layer.shape[1 + axis]) * layer.strides[axis] - layer.pads[axis]
    rows: Rows = starts[:, None] + np.arange(layer.kernel[axis])
    return rows


def _window_counts(
    layer: canonical.AveragePool, source: tuple[int, ...], axis: int
) -> canonical.Array:
    rows = _window_rows(layer, source, axis)
    counts: canonical.Array = ((rows >= 0) & (rows < source[1 + axis])).sum(1).astype(np.float64)
    return counts


def _max_pool(builder: _Builder, layer: canonical.MaxPool, at: tuple[Index, ...]) -> Index:
    """A tree of maxima over the window's places; padding repeats a pixel of the same window."""
    source = builder.ops[at[0]].shape
    rows = _window_rows(layer, source, 0).clip(0, source[1] - 1)
    columns = _window_rows(layer, source, 1).clip(0, source[2] - 1)
    places = []
    for i in range(layer.kernel[0]):
        for j in range(layer.kernel[1]):
            index = np.add.outer(rows[:, i] * source[2], columns[:, j]).reshape(-1)
            chosen = torch.from_numpy(index.astype(np.int64))
            places.append(builder.add(ops.Select(at, layer.shape, chosen, source)))
    while len(places) > 1:
        pairs = zip(places[::2], places[1::2], strict=False)
        joined = [builder.add(ops.Extreme(pair, layer.shape, True)) for pair in pairs]
        places = joined + places[len(joined) * 2 :]
    return places[0]


_LOWER: dict[type[canonical.Layer], Callable[..., Index]] = {
    canonical.Affine: _affine,
    canonical.Conv: _conv,
    canonical.Scale: _scale,
    canonical.Relu: _relu,
    canonical.Clip: _clip,
    canonical.Add: _add,
    canonical.Sub: _sub,
    canonical.Maximum: _maximum,
    canonical.Minimum: _minimum,
    canonical.MaxPool: _max_pool,
    canonical.AveragePool: _average_pool,
    canonical.Reshape: _reshape,
}
