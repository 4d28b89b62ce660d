"""Layers that act pixel by pixel, or in windows that slide: lowered for the checker."""

from dataclasses import replace
from math import inf
from typing import Any

import numpy as np

from mlflow_kdguard import graph
from mlflow_kdguard.proof.arithmetic import Array, Indices
from mlflow_kdguard.proof.net import Bend, Builder, Linear, key_of


def conv(build: Builder, layer: graph.Conv, at: tuple[int, ...]) -> int:
    """A 2-d convolution, its value by the reader and its transpose here."""
    source = build.ops[at[0]].shape
    size = replace(layer, weight=np.abs(layer.weight), bias=np.zeros_like(layer.bias))
    how = (layer.strides, layer.pads, layer.dilations, layer.groups)

    def applied(kernel: graph.Conv, x: Array) -> Array:
        return graph.apply(kernel, x.reshape(1, *source)).reshape(-1)

    offset = np.broadcast_to(layer.bias[:, None, None], layer.shape).reshape(-1)
    return build.add(
        ("conv", at, layer.shape, how, *key_of(layer.weight, layer.bias)),
        lambda: Linear(
            at, layer.shape, lambda x: applied(layer, x), lambda r: applied(size, r),
            lambda rows: (_transposed(layer, source, rows),), offset, layer.weight.size,
        ),
    )  # fmt: skip


def _transposed(layer: graph.Conv, source: graph.Shape, rows: Array) -> Array:
    """Rows of a convolution's outputs as rows of its inputs."""
    outs, ins, height, width = layer.weight.shape
    top, left, bottom, right = layer.pads
    padded = np.zeros((len(rows), source[0], source[1] + top + bottom, source[2] + left + right))
    share, (rise, run) = outs // layer.groups, layer.strides
    seen = rows.reshape(len(rows), outs, -1)
    for group in range(layer.groups):
        outside = slice(group * share, (group + 1) * share)
        inside = slice(group * ins, (group + 1) * ins)
        for i in range(height):
            for j in range(width):
                part = layer.weight[outside, :, i, j].T @ seen[:, outside]
                y, x = i * layer.dilations[0], j * layer.dilations[1]
                place = padded[
                    :, inside, y : y + rise * (layer.shape[1] - 1) + 1 : rise,
                    x : x + run * (layer.shape[2] - 1) + 1 : run,
                ]  # fmt: skip
                place += part.reshape(place.shape)
    inner = padded[:, :, top : top + source[1], left : left + source[2]]
    return inner.reshape(len(rows), -1)


def scale(build: Builder, layer: graph.Scale, at: tuple[int, ...]) -> int:
    """y = factor x + offset, element by element."""
    factor, offset = (
        np.broadcast_to(a, layer.shape).reshape(-1).copy() for a in (layer.factor, layer.offset)
    )
    return build.add(
        ("scale", at, layer.shape, *key_of(factor, offset)),
        lambda: Linear(
            at, layer.shape, lambda x: factor * x + offset, lambda r: np.abs(factor) * r,
            lambda rows: (rows * factor,), offset,
        ),
    )  # fmt: skip


def extreme(build: Builder, layer: graph.Layer, at: tuple[int, ...]) -> int:
    """The larger or the smaller of two values."""
    return _larger(build, layer.shape, at, larger=isinstance(layer, graph.Maximum))


def _larger(build: Builder, shape: graph.Shape, at: tuple[int, ...], *, larger: bool) -> int:
    return build.add(("extreme", at, shape, larger), lambda: Bend(at, shape, 0.0, inf, larger))


def average_pool(build: Builder, layer: graph.AveragePool, at: tuple[int, ...]) -> int:
    """A depthwise convolution; where padding does not count, scaled by the share that does."""
    source, (height, width) = build.ops[at[0]].shape, layer.kernel
    weight = np.full((source[0], 1, height, width), 1.0 / (height * width))
    how = (layer.strides, layer.pads, (1, 1), source[0])
    mean = conv(
        build,
        graph.Conv(layer.name, layer.inputs, layer.shape, weight, np.zeros(source[0]), *how),
        at,
    )
    if layer.count_padding or not any(layer.pads):
        return mean
    rows, columns = (_window(layer, source, axis) for axis in (0, 1))
    counts = [((r >= 0) & (r < source[1 + a])).sum(1) for a, r in enumerate((rows, columns))]
    share = np.broadcast_to(height * width / np.outer(*counts), layer.shape)
    counted = graph.Scale(layer.name, layer.inputs, layer.shape, share, np.zeros(layer.shape))
    return scale(build, counted, (mean,))


def _window(layer: graph.AveragePool | graph.MaxPool, source: graph.Shape, axis: int) -> Any:
    """Input rows (axis 0) or columns (axis 1) under each window, padding included."""
    starts = np.arange(layer.shape[1 + axis]) * layer.strides[axis] - layer.pads[axis]
    return starts[:, None] + np.arange(layer.kernel[axis])


def max_pool(build: Builder, layer: graph.MaxPool, at: tuple[int, ...]) -> int:
    """A tree of maxima over the window's places; padding repeats a pixel of the same window."""
    source = build.ops[at[0]].shape
    rows = _window(layer, source, 0).clip(0, source[1] - 1)
    columns = _window(layer, source, 1).clip(0, source[2] - 1)
    places = [
        _select(build, layer.shape, np.add.outer(rows[:, i] * source[2], columns[:, j]), at)
        for i in range(layer.kernel[0])
        for j in range(layer.kernel[1])
    ]
    while len(places) > 1:
        pairs = list(zip(places[::2], places[1::2], strict=False))
        ends = [_larger(build, layer.shape, pair, larger=True) for pair in pairs]
        places = ends + places[2 * len(ends) :]
    return places[0]


def _select(build: Builder, shape: graph.Shape, index: Any, at: tuple[int, ...]) -> int:
    source = build.ops[at[0]].shape
    flat: Indices = index.reshape(-1).astype(np.int64)

    def picked(x: Array) -> Array:
        return x.reshape(source[0], -1)[:, flat].reshape(-1)

    def pull(rows: Array) -> tuple[Array, ...]:
        out = np.zeros((len(rows), source[0], source[1] * source[2]))
        np.add.at(out.T, flat, rows.reshape(*out.shape[:2], -1).T)
        return (out.reshape(len(rows), -1),)

    return build.add(
        ("select", at, shape, flat.tobytes()),
        lambda: Linear(at, shape, picked, picked, pull, None, len(flat)),
    )
