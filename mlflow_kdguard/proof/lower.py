"""From two canonical graphs to one net."""

from collections.abc import Callable
from math import inf

import numpy as np

from mlflow_kdguard import graph
from mlflow_kdguard.errors import CertificateError
from mlflow_kdguard.proof import windows
from mlflow_kdguard.proof.arithmetic import Array
from mlflow_kdguard.proof.net import Bend, Builder, Linear, Net, key_of


def joined(reference: graph.Graph, student: graph.Graph) -> Net:
    """One net of two graphs; CertificateError where they are no pair, or hold an unknown layer."""
    if reference.input_shape != student.input_shape or reference.classes != student.classes:
        raise CertificateError(
            "the proof's networks take different images or give different numbers of logits.",
            remedy="Check a proof with the two networks that it was written for.",
        )
    build = Builder(reference.input_shape)
    ends = _lowered(build, reference), _lowered(build, student)
    columns, width = {}, 0
    for index, op in enumerate(build.ops):
        if isinstance(op, Bend):
            columns[index] = slice(width, width + op.size)
            width += op.size
    digests = (reference.sha256, student.sha256)
    return Net(tuple(build.ops), *ends, reference.classes, columns, width, digests)


def _lowered(build: Builder, model: graph.Graph) -> int:
    """Append a graph's operations; the number of its output."""
    place = {graph.INPUT: 0}
    for layer in model.layers:
        rule = _RULES.get(type(layer))
        if rule is None:
            raise CertificateError(
                f"UNSUPPORTED: the checker knows no layer {type(layer).__name__}.",
                remedy="A certificate of this network cannot be recomputed.",
            )
        place[layer.name] = rule(build, layer, tuple(place[name] for name in layer.inputs))
    return place[model.output]


def _affine(build: Builder, layer: graph.Affine, at: tuple[int, ...]) -> int:
    weight, bias = np.ascontiguousarray(layer.weight), layer.bias
    size = np.abs(weight)
    if len(layer.shape) != 1:
        return _matrices(build, layer, at)
    return build.add(
        ("affine", at, layer.shape, *key_of(weight, bias)),
        lambda: Linear(
            at, layer.shape, lambda x: weight @ x + bias, lambda r: size @ r,
            lambda rows: (rows @ weight,), bias, max(weight.shape),
        ),
    )  # fmt: skip


def _matrices(build: Builder, layer: graph.Affine, at: tuple[int, ...]) -> int:
    """An affine layer on the last axis of several."""
    source, (outs, ins) = build.ops[at[0]].shape, layer.weight.shape
    weight, size = layer.weight, np.abs(layer.weight)
    bias = np.broadcast_to(layer.bias, layer.shape).reshape(-1)

    def pull(rows: Array) -> tuple[Array, ...]:
        return ((rows.reshape(-1, outs) @ weight).reshape(len(rows), -1),)

    return build.add(
        ("affine", at, layer.shape, *key_of(layer.weight, layer.bias)),
        lambda: Linear(
            at, layer.shape,
            lambda x: (x.reshape(source) @ weight.T).reshape(-1) + bias,
            lambda r: (r.reshape(-1, ins) @ size.T).reshape(-1), pull, bias, max(weight.shape),
        ),
    )  # fmt: skip


def _clip(build: Builder, layer: graph.Clip, at: tuple[int, ...]) -> int:
    low, high = float(layer.low), float(layer.high)
    return build.add(("bend", at, layer.shape, low, high), lambda: Bend(at, layer.shape, low, high))


def _relu(build: Builder, layer: graph.Relu, at: tuple[int, ...]) -> int:
    return build.add(("bend", at, layer.shape, 0.0, inf), lambda: Bend(at, layer.shape, 0.0, inf))


def _sum(build: Builder, layer: graph.Add | graph.Sub, at: tuple[int, ...]) -> int:
    sign = 1.0 if isinstance(layer, graph.Add) else -1.0
    return build.add(
        ("sum", at, layer.shape, sign),
        lambda: Linear(
            at, layer.shape, lambda a, b: a + sign * b, lambda a, b: a + b,
            lambda rows: (rows, sign * rows),
        ),
    )  # fmt: skip


def _reshape(build: Builder, layer: graph.Reshape, at: tuple[int, ...]) -> int:
    source = build.ops[at[0]].shape
    return build.add(
        ("reshape", at, layer.shape, source),
        lambda: Linear(at, layer.shape, lambda x: x, lambda r: r, lambda rows: (rows,)),
    )


_RULES: dict[type[graph.Layer], Callable[..., int]] = {
    graph.Affine: _affine,
    graph.Conv: windows.conv,
    graph.Scale: windows.scale,
    graph.Relu: _relu,
    graph.Clip: _clip,
    graph.Add: _sum,
    graph.Sub: _sum,
    graph.Maximum: windows.extreme,
    graph.Minimum: windows.extreme,
    graph.MaxPool: windows.max_pool,
    graph.AveragePool: windows.average_pool,
    graph.Reshape: _reshape,
}
