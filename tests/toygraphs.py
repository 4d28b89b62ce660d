"""Tiny random canonical graphs of every layer that bounds know, and a brute force for their gap.

The brute force knows only `graph.evaluate` (NumPy): it shares no code with the bounds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard import graph
from mlflow_kdguard.graph import Graph, Layer

Floats = NDArray[np.float64]
CLASSES = 3


class Net:
    """Layers in the making: every call appends one and gives its name."""

    def __init__(self, shape: tuple[int, ...], seed: int, scale: float = 1.0) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {graph.INPUT: shape}
        self.layers: list[Layer] = []
        self.draw = np.random.default_rng(seed)
        self.scale = scale

    def add(
        self,
        kind: Callable[..., Layer],
        inputs: Sequence[str],
        shape: tuple[int, ...],
        **constants: Any,
    ) -> str:
        name = f"{kind.__name__.lower()}{len(self.layers)}"
        self.layers.append(kind(name=name, inputs=tuple(inputs), shape=shape, **constants))
        self.shapes[name] = shape
        return name

    def normal(self, *shape: int) -> Floats:
        return self.draw.normal(size=shape) * self.scale

    def clip(self, at: str = graph.INPUT, low: float = 0.0, high: float = 1.0) -> str:
        return self.add(graph.Clip, [at], self.shapes[at], low=low, high=high)

    def relu(self, at: str) -> str:
        return self.add(graph.Relu, [at], self.shapes[at])

    def flat(self, at: str) -> str:
        return self.add(graph.Reshape, [at], (int(np.prod(self.shapes[at])),))

    def affine(self, at: str, out: int, weight: Floats | None = None) -> str:
        into = self.shapes[at][-1]
        weight = self.normal(out, into) if weight is None else weight
        bias = np.zeros(out) if weight is not None and out != len(weight) else self.normal(out) / 3
        return self.add(graph.Affine, [at], (out,), weight=weight, bias=bias)

    def select(self, at: str, columns: Sequence[int]) -> str:
        weight = np.zeros((len(columns), self.shapes[at][0]))
        weight[np.arange(len(columns)), list(columns)] = 1.0
        return self.add(
            graph.Affine, [at], (len(columns),), weight=weight, bias=np.zeros(len(columns))
        )

    def scale_by(self, at: str) -> str:
        shape = self.shapes[at]
        factor, offset = self.draw.uniform(-1.5, 1.5, shape), self.draw.normal(size=shape) / 3
        return self.add(graph.Scale, [at], shape, factor=factor, offset=offset)

    def conv(
        self,
        at: str,
        out: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        pads: tuple[int, int, int, int] = (1, 1, 1, 1),
        dilation: int = 1,
        groups: int = 1,
    ) -> str:
        channels, height, width = self.shapes[at]
        reach = (kernel - 1) * dilation
        rows = (height + pads[0] + pads[2] - reach - 1) // stride + 1
        columns = (width + pads[1] + pads[3] - reach - 1) // stride + 1
        return self.add(
            graph.Conv, [at], (out, rows, columns),
            weight=self.normal(out, channels // groups, kernel, kernel) / 2,
            bias=self.normal(out) / 3,
            strides=(stride, stride), pads=pads, dilations=(dilation, dilation), groups=groups,
        )  # fmt: skip

    def pool(self, kind: Callable[..., Layer], at: str, *, pad: int = 0, **options: Any) -> str:
        channels, height, width = self.shapes[at]
        rows, columns = (height + 2 * pad - 2) // 2 + 1, (width + 2 * pad - 2) // 2 + 1
        return self.add(
            kind, [at], (channels, rows, columns),
            kernel=(2, 2), strides=(2, 2), pads=(pad, pad, pad, pad), **options,
        )  # fmt: skip

    def both(self, kind: Callable[..., Layer], a: str, b: str) -> str:
        return self.add(kind, [a, b], self.shapes[a])

    def done(self) -> Graph:
        return finish(self.shapes[graph.INPUT], self.layers)


def finish(shape: tuple[int, ...], layers: Sequence[Layer]) -> Graph:
    """A Graph of these layers; its output is the last."""
    by_name = {layer.name: layer for layer in layers}
    return Graph(shape, tuple(layers), layers[-1].name, "0" * 64, by_name)


def mlp(seed: int, *, scale: float = 1.0, widths: Sequence[int] = (5, 4)) -> Graph:
    """Two pixels, hidden layers, three classes."""
    net = Net((1, 1, 2), seed, scale)
    at = net.flat(net.clip())
    for width in widths:
        at = net.relu(net.affine(at, width))
    net.affine(at, CLASSES)
    return net.done()


def _image(seed: int, scale: float) -> tuple[Net, str]:
    net = Net((2, 4, 4), seed, scale)
    return net, net.scale_by(net.clip())


def cnn(seed: int, *, scale: float = 1.0) -> Graph:
    """Strided, padded, dilated and grouped convolutions with scales between them."""
    net, at = _image(seed, scale)
    at = net.relu(net.scale_by(net.conv(at, 4, stride=2)))
    at = net.relu(net.conv(at, 4, pads=(2, 1, 0, 1), groups=2))
    at = net.relu(net.conv(at, 3, kernel=2, dilation=2, pads=(1, 1, 1, 1)))
    net.affine(net.flat(at), CLASSES)
    return net.done()


def residual(seed: int, *, scale: float = 1.0) -> Graph:
    """A stem, one block with an identity and one with a strided 1×1 shortcut."""
    net, at = _image(seed, scale)
    at = net.relu(net.conv(at, 3))
    branch = net.conv(net.relu(net.conv(at, 3)), 3)
    at = net.relu(net.both(graph.Add, branch, at))
    branch = net.conv(net.relu(net.conv(at, 3, stride=2)), 3)
    short = net.conv(at, 3, kernel=1, stride=2, pads=(0, 0, 0, 0))
    at = net.relu(net.both(graph.Sub, branch, short))
    at = net.pool(graph.AveragePool, at, count_padding=True)
    net.affine(net.flat(at), CLASSES)
    return net.done()


def pooled(seed: int, *, scale: float = 1.0) -> Graph:
    """Max pooling and average pooling with padding that does not count, and an inner clip."""
    net, at = _image(seed, scale)
    at = net.pool(graph.MaxPool, net.relu(net.conv(at, 3)), pad=1)
    at = net.clip(net.conv(at, 3), -0.4, 0.7)
    at = net.pool(graph.AveragePool, at, pad=1, count_padding=False)
    net.affine(net.flat(at), CLASSES)
    return net.done()


def capped(seed: int, *, scale: float = 1.0) -> Graph:
    """The margin cap of two small networks for class 0, as it is exported."""
    net = Net((1, 1, 2), seed, scale)
    pixels = net.flat(net.clip())
    p, d = (net.affine(net.relu(net.affine(pixels, 5)), CLASSES) for _ in range(2))

    def largest(at: str) -> str:
        return net.both(graph.Maximum, net.select(at, [1]), net.select(at, [2]))

    margin = net.both(graph.Sub, net.select(d, [0]), largest(d))
    limit = net.both(graph.Add, largest(p), margin)
    cap = net.both(graph.Minimum, net.select(p, [0]), limit)
    others = np.diag([0.0, 1.0, 1.0])
    place = np.array([[1.0], [0.0], [0.0]])
    kept = net.add(graph.Affine, [p], (3,), weight=others, bias=np.zeros(3))
    placed = net.add(graph.Affine, [cap], (3,), weight=place, bias=np.zeros(3))
    net.both(graph.Add, kept, placed)
    return net.done()


KINDS: dict[str, Callable[..., Graph]] = {
    "mlp": mlp, "cnn": cnn, "residual": residual, "pooled": pooled, "capped": capped,
}  # fmt: skip


def permuted(model: Graph, order: Sequence[int]) -> Graph:
    """The same network with its classes in another order (one more affine layer)."""
    last = model.by_name[model.output]
    weight = np.zeros((len(order), len(order)))
    weight[np.arange(len(order)), list(order)] = 1.0
    turn = graph.Affine("turn", (last.name,), last.shape, weight, np.zeros(len(order)))
    return finish(model.input_shape, (*model.layers, turn))


def confidences(model: Graph, x: Floats) -> Floats:
    """Softmax of the logits at N images."""
    logits = graph.evaluate(model, x)
    shifted: Floats = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def gaps(reference: Graph, student: Graph, x: Floats) -> Floats:
    """|p_S - p_R| at N images: N×K."""
    difference: Floats = np.abs(confidences(student, x) - confidences(reference, x))
    return difference


def brute(
    reference: Graph,
    student: Graph,
    x: Floats,
    eps: float,
    *,
    seed: int = 0,
    klass: int | None = None,
    norm: str = "linf",
) -> float:
    """The largest gap over a grid (2 pixels) or random points, corners and a local search."""
    draw = np.random.default_rng(seed)
    lo, hi = np.clip(x - eps, 0.0, 1.0), np.clip(x + eps, 0.0, 1.0)
    if x.size == 2:
        ticks = np.linspace(0.0, 1.0, 41)
        grid = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, *x.shape)
        points = lo + grid * (hi - lo)
    else:
        points = lo + draw.random((600, *x.shape)) * (hi - lo)
        points[::2] = np.where(draw.random((300, *x.shape)) < 0.5, lo, hi)
    best, top = -1.0, x
    for radius in (1.0, 0.3, 0.1, 0.03):
        if radius < 1.0:
            near = top + (draw.random((400, *x.shape)) * 2 - 1) * radius * (hi - lo)
            points = np.clip(near, lo, hi)
        if norm == "l2":
            offset = points - x
            length = np.sqrt((offset**2).sum(axis=(1, 2, 3), keepdims=True)).clip(1e-12)
            points = np.clip(x + offset * np.minimum(1.0, eps * (1 - 1e-12) / length), 0.0, 1.0)
        found = gaps(reference, student, points)
        score = found.max(1) if klass is None else found[:, klass]
        if score.max() > best:
            best, top = float(score.max()), points[score.argmax()]
    return best
