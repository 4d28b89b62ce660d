"""What a graph computes, in NumPy and float64: small, and meant to be obviously right.

The checker and the tests use it as the word of truth, so it shares no code with the bounds.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from mlflow_kdguard.errors import ModelError
from mlflow_kdguard.graph import layers
from mlflow_kdguard.graph.layers import INPUT, Array, Graph, Layer

_ROWS = 256
"""Images that go through the graph together, to bound memory."""


def evaluate(graph: Graph, x: Array) -> Array:
    """Logits N×K (float64) of images N×C×H×W. Raises ModelError where the shape does not fit."""
    x = np.asarray(x, dtype=np.float64)
    if x.shape[1:] != graph.input_shape or x.ndim != 1 + len(graph.input_shape):
        raise ModelError(
            f"images of shape {x.shape} do not fit the graph's input N×{graph.input_shape}.",
            remedy="Give images of the shape that the graph was exported for.",
        )
    parts = [_run(graph, x[start : start + _ROWS]) for start in range(0, len(x), _ROWS)]
    return np.concatenate(parts) if parts else np.zeros((0, graph.classes))


def _run(graph: Graph, x: Array) -> Array:
    values = {INPUT: x}
    for layer in graph.layers:
        operands = [values[name] for name in layer.inputs]
        values[layer.name] = apply(layer, *operands)
    return values[graph.output]


def apply(layer: Layer, *operands: Array) -> Array:
    """One layer on a batch of each of its inputs."""
    result: Array = _RULES[type(layer)](layer, *operands)
    return result


def _affine(layer: layers.Affine, x: Array) -> Array:
    return x @ layer.weight.T + layer.bias


def _conv(layer: layers.Conv, x: Array) -> Array:
    """Sum over the kernel's places of a matrix product with the shifted image, group by group."""
    out_channels, in_channels, height, width = layer.weight.shape
    x = _padded(x, layer.pads, 0.0)
    share = out_channels // layer.groups
    out = np.zeros((len(x), *layer.shape))
    for group in range(layer.groups):
        inside = x[:, group * in_channels : (group + 1) * in_channels]
        outside = slice(group * share, (group + 1) * share)
        for i in range(height):
            for j in range(width):
                offset = (i * layer.dilations[0], j * layer.dilations[1])
                seen = _seen(inside, offset, layer.strides, layer.shape)
                out[:, outside] += np.einsum(
                    "oc,nchw->nohw", layer.weight[outside, :, i, j], seen, optimize=True
                )
    return out + layer.bias[:, None, None]


def _padded(x: Array, pads: tuple[int, int, int, int], value: float) -> Array:
    top, left, bottom, right = pads
    sides = ((0, 0), (0, 0), (top, bottom), (left, right))
    return np.pad(x, sides, constant_values=value)


def _seen(
    x: Array, offset: tuple[int, int], strides: tuple[int, int], shape: tuple[int, ...]
) -> Array:
    """What one place of the window sees as the window slides: N×C×out height×out width."""
    rows = offset[0] + strides[0] * np.arange(shape[1])
    columns = offset[1] + strides[1] * np.arange(shape[2])
    return x[:, :, rows[:, None], columns[None, :]]


def _windows(layer: layers.MaxPool | layers.AveragePool, x: Array, value: float) -> list[Array]:
    x = _padded(x, layer.pads, value)
    height, width = layer.kernel
    return [
        _seen(x, (i, j), layer.strides, layer.shape) for i in range(height) for j in range(width)
    ]


def _max_pool(layer: layers.MaxPool, x: Array) -> Array:
    largest: Array = np.max(_windows(layer, x, -np.inf), axis=0)
    return largest


def _average_pool(layer: layers.AveragePool, x: Array) -> Array:
    total: Array = np.sum(_windows(layer, x, 0.0), axis=0)
    if layer.count_padding:
        return total / (layer.kernel[0] * layer.kernel[1])
    count: Array = np.sum(_windows(layer, np.ones((1, 1, *x.shape[2:])), 0.0), axis=0)
    return total / count


_RULES: dict[type[Layer], Callable[..., Any]] = {
    layers.Affine: _affine,
    layers.Conv: _conv,
    layers.Scale: lambda layer, x: layer.factor * x + layer.offset,
    layers.Relu: lambda _, x: np.maximum(x, 0.0),
    layers.Clip: lambda layer, x: np.minimum(np.maximum(x, layer.low), layer.high),
    layers.Add: lambda _, x, y: x + y,
    layers.Sub: lambda _, x, y: x - y,
    layers.Maximum: lambda _, x, y: np.maximum(x, y),
    layers.Minimum: lambda _, x, y: np.minimum(x, y),
    layers.MaxPool: _max_pool,
    layers.AveragePool: _average_pool,
    layers.Reshape: lambda layer, x: x.reshape(len(x), *layer.shape),
}
