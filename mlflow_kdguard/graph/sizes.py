"""Arithmetic on shapes, as older exporters write it for x.view(x.size(0), -1).

A size is a list of integers known beforehand, except that the batch size is unknown (None).
Reshape is the only operator that may use one.
"""

from dataclasses import dataclass

import numpy as np
import onnx

from mlflow_kdguard.graph.walk import Activation, Size, Walk


@dataclass(frozen=True, slots=True)
class _Given:
    """A size or a constant, alike."""

    sides: tuple[int | None, ...]
    scalar: bool


def shape(walk: Walk, node: onnx.NodeProto) -> None:
    """Shape of an activation, with the batch size unknown."""
    options = walk.attributes(node, start=0, end=None)
    sides = (None, *walk.activation(node, 0).shape)
    walk.values[node.output[0]] = Size(sides[options["start"] : options["end"]])


def gather(walk: Walk, node: onnx.NodeProto) -> None:
    """Gather of entries of a size."""
    source, index = walk.value(node, 0), walk.value(node, 1)
    if walk.attributes(node, axis=0)["axis"] != 0 or not isinstance(source, Size):
        raise walk.refuse(node, "only gathers from the shape of an activation")
    if not isinstance(index, np.ndarray) or index.dtype.kind != "i" or index.ndim > 1:
        raise walk.refuse(node, "its indices are not constant")
    picked = tuple(source.sides[int(place)] for place in index.reshape(-1))
    walk.values[node.output[0]] = Size(picked, scalar=index.ndim == 0)


def unsqueeze(walk: Walk, node: onnx.NodeProto, source: Size) -> None:
    """Unsqueeze of a single number into a list."""
    if not source.scalar or walk.integers(node, 1) not in ([0], [-1]):
        raise walk.refuse(node, "a size is a list of one axis")
    walk.values[node.output[0]] = Size(source.sides)


def concat(walk: Walk, node: onnx.NodeProto) -> None:
    """Concat of sizes and constant lists."""
    if walk.attributes(node, axis=0)["axis"] not in (0, -1):
        raise walk.refuse(node, "only sizes can be concatenated")
    parts = [_given(walk, node, place) for place in range(len(node.input))]
    if any(part.scalar for part in parts):
        raise walk.refuse(node, "only lists can be concatenated")
    walk.values[node.output[0]] = Size(tuple(side for part in parts for side in part.sides))


def _given(walk: Walk, node: onnx.NodeProto, place: int) -> _Given:
    value = walk.value(node, place)
    if isinstance(value, Size):
        return _Given(value.sides, value.scalar)
    if isinstance(value, Activation) or value.dtype.kind != "i" or value.ndim > 1:
        raise walk.refuse(node, "only sizes can be concatenated")
    return _Given(tuple(int(side) for side in value.reshape(-1)), value.ndim == 0)
