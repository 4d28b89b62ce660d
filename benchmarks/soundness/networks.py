"""Random small networks as canonical graphs: every layer that bounds know, at any scale."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlflow_kdguard import graph
from mlflow_kdguard.graph import Graph, Layer

CLASSES = 3
IMAGE = (2, 5, 5)


class _Making:
    """Layers one after the other; weights are normal, times `scale` over the root of the fan-in."""

    def __init__(self, shape: tuple[int, ...], random: np.random.Generator, scale: float) -> None:
        self.random, self.scale = random, scale
        self.shapes: dict[str, tuple[int, ...]] = {graph.INPUT: shape}
        self.layers: list[Layer] = []
        self.at = self.add(graph.Clip, [graph.INPUT], shape, low=0.0, high=1.0)

    def add(self, kind: Any, inputs: Sequence[str], shape: tuple[int, ...], **rest: Any) -> str:
        name = f"{kind.__name__.lower()}{len(self.layers)}"
        self.layers.append(kind(name=name, inputs=tuple(inputs), shape=shape, **rest))
        self.shapes[name] = shape
        self.at = name
        return name

    def weights(self, *shape: int) -> np.ndarray:
        fan = int(np.prod(shape[1:])) if len(shape) > 1 else 4
        drawn = self.random.normal(size=shape) * self.scale * np.sqrt(2.0 / fan)
        return drawn.astype(np.float32).astype(np.float64)

    def relu(self) -> None:
        self.add(graph.Relu, [self.at], self.shapes[self.at])

    def flat(self) -> None:
        self.add(graph.Reshape, [self.at], (int(np.prod(self.shapes[self.at])),))

    def affine(self, out: int) -> None:
        (into,) = self.shapes[self.at]
        self.add(graph.Affine, [self.at], (out,), weight=self.weights(out, into),
                 bias=self.weights(out))  # fmt: skip

    def conv(self, out: int, *, size: int = 3, stride: int = 1, groups: int = 1) -> None:
        channels, rows, columns = self.shapes[self.at]
        pad = size // 2
        shape = (out, *((n + 2 * pad - size) // stride + 1 for n in (rows, columns)))
        self.add(graph.Conv, [self.at], shape, bias=self.weights(out), strides=(stride, stride),
                 weight=self.weights(out, channels // groups, size, size), pads=(pad,) * 4,
                 dilations=(1, 1), groups=groups)  # fmt: skip

    def pool(self, kind: Any, *, pad: int = 0, **options: Any) -> None:
        channels, rows, columns = self.shapes[self.at]
        shape = (channels, *((n + 2 * pad - 2) // 2 + 1 for n in (rows, columns)))
        self.add(kind, [self.at], shape, kernel=(2, 2), strides=(2, 2), pads=(pad,) * 4,
                 **options)  # fmt: skip

    def done(self, classes: int = CLASSES) -> Graph:
        self.flat()
        self.affine(classes)
        by_name = {layer.name: layer for layer in self.layers}
        shape = self.shapes[graph.INPUT]
        return Graph(shape, tuple(self.layers), self.layers[-1].name, "0" * 64, by_name)


def planar(random: np.random.Generator, scale: float) -> Graph:
    """Two pixels and one or two hidden layers: small enough to enumerate."""
    net = _Making((1, 1, 2), random, scale)
    net.flat()
    for _ in range(int(random.integers(1, 3))):
        net.affine(int(random.integers(2, 6)))
        net.relu()
    return net.done(int(2 + random.integers(2)))


def mlp(random: np.random.Generator, scale: float) -> Graph:
    """One to three hidden layers on ten pixels."""
    net = _Making((1, 2, 5), random, scale)
    net.flat()
    for _ in range(int(random.integers(1, 4))):
        net.affine(int(random.integers(4, 12)))
        net.relu()
    return net.done()


def conv(random: np.random.Generator, scale: float) -> Graph:
    """Two convolutions, strided or grouped."""
    net = _Making(IMAGE, random, scale)
    net.conv(4, stride=int(random.integers(1, 3)))
    net.relu()
    net.conv(4, groups=int(random.integers(1, 3)))
    net.relu()
    return net.done()


def residual(random: np.random.Generator, scale: float) -> Graph:
    """A stem and a block whose input is added to its output."""
    net = _Making(IMAGE, random, scale)
    net.conv(3)
    net.relu()
    entry = net.at
    net.conv(3)
    net.relu()
    net.conv(3)
    net.add(graph.Add, [net.at, entry], net.shapes[net.at])
    net.relu()
    net.pool(graph.AveragePool, count_padding=True)
    return net.done()


def pooled(random: np.random.Generator, scale: float) -> Graph:
    """Max pooling after a convolution, then average pooling whose padding does not count."""
    net = _Making(IMAGE, random, scale)
    net.conv(3)
    net.relu()
    net.pool(graph.MaxPool, pad=1)
    net.conv(3)
    net.pool(graph.AveragePool, pad=1, count_padding=False)
    return net.done()


KINDS: dict[str, Callable[[np.random.Generator, float], Graph]] = {
    "planar": planar, "mlp": mlp, "conv": conv, "residual": residual, "pooled": pooled,
}  # fmt: skip
SCALES = (0.1, 0.5, 1.0, 1.0, 2.0, 5.0, 30.0, 1e3, 1e6)


def pair(kind: str, random: np.random.Generator) -> tuple[Graph, Graph, float]:
    """Reference, student, and the scale of the reference's weights.

    The student is of the same kind; of its own scale one time in three, and one time in four the
    reference's own with one weight in ten moved.
    """
    scale = float(random.choice(SCALES))
    seed = int(random.integers(2**31))
    reference = KINDS[kind](np.random.default_rng(seed), scale)
    if random.random() < 0.25:
        return reference, _moved(KINDS[kind](np.random.default_rng(seed), scale), random), scale
    other = float(random.choice(SCALES)) if random.random() < 1 / 3 else scale
    student = KINDS[kind](random, other)
    while student.classes != reference.classes:
        student = KINDS[kind](random, other)
    return reference, student, scale


SURE = (100.0, 700.0, 744.55, 760.0, 1e3, 1e6)
"""What is added to a logit: exp of it is large, denormal, or nothing in float64."""


def hostile(model: Graph, random: np.random.Generator) -> Graph:
    """The network with numbers that floating point dislikes: one kind of them, at random."""
    linear = [layer for layer in model.layers if isinstance(layer, graph.Affine | graph.Conv)]
    kind = int(random.integers(5))
    if kind == 0:
        linear[-1].bias[random.integers(model.classes)] += random.choice(SURE)
    for layer in linear:
        rows = layer.weight.reshape(len(layer.weight), -1)
        if kind == 1:
            rows *= 2.0 ** random.integers(-40, 20, (len(rows), 1))
        elif kind == 2:
            half = rows.shape[1] // 2
            rows[:, :half] *= 2.0 ** random.integers(0, 20, (len(rows), 1))
            rows[:, half : 2 * half] = -rows[:, :half] * (1 + 1e-6 * random.normal(size=half))
        elif kind == 3:
            some = random.random(rows.shape)
            rows[:] = np.where(some < 0.3, 1e-40, np.where(some < 0.5, 0.0, rows))
        elif kind == 4:
            layer.bias[:] += random.normal(size=layer.bias.shape) * 1e6
        for values in (layer.weight, layer.bias):
            values[:] = values.astype(np.float32)
    return model


def _moved(model: Graph, random: np.random.Generator) -> Graph:
    for layer in model.layers:
        if isinstance(layer, graph.Affine | graph.Conv):
            weight = layer.weight
            some = random.random(weight.shape) < 0.1
            weight *= np.where(some, 1 + 0.1 * random.normal(size=weight.shape), 1.0)
    return model
