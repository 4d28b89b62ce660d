"""Backward: what the rounding of every layer can do to functionals of the logits.

The computed network is the real one with an error δ added to each layer. Along the way from no
error to δ the output is piecewise linear in it, and its derivative in δ is a product of the layers'
derivatives, whose switches are those of values between the real and the computed ones. An interval
that holds this derivative for every image of the box is carried backwards through the graph;
times the largest local error of each value, summed up, it bounds what rounding does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlflow_kdguard.graph import layers
from mlflow_kdguard.graph.float32.forms import Mask
from mlflow_kdguard.graph.float32.forward import Value
from mlflow_kdguard.graph.float32.places import slices, views
from mlflow_kdguard.graph.float32.rounding import own, terms_of
from mlflow_kdguard.graph.layers import INPUT, Array, Graph, Layer


@dataclass(frozen=True, slots=True, eq=False)
class Slopes:
    """An interval for each derivative: `lo`, `hi` float64 (B·R)×shape, R functionals an image."""

    lo: Array
    hi: Array

    def plus(self, other: "Slopes | None") -> "Slopes":
        """The sum of what two layers make of one value."""
        if other is None:
            return self
        lo, hi = self.lo + other.lo, self.hi + other.hi
        lost = own(1) * (np.abs(lo) + np.abs(hi))
        return Slopes(lo - lost, hi + lost)

    def times(self, one: Mask, nothing: Mask) -> "Slopes":
        """Times 1, or 0, or any factor in [0, 1] where it is neither for certain: exact."""
        return Slopes(
            np.where(one, self.lo, np.where(nothing, 0.0, np.minimum(self.lo, 0.0))),
            np.where(one, self.hi, np.where(nothing, 0.0, np.maximum(self.hi, 0.0))),
        )

    def size(self) -> Array:
        """The largest magnitude."""
        return np.maximum(np.abs(self.lo), np.abs(self.hi))


def effect(graph: Graph, values: dict[str, Value], rows: Array) -> Array:
    """|rows · (computed logits - real ones)| at most, for rows B×R×K: float64 B×R."""
    count, each, classes = rows.shape
    seed = rows.reshape(count * each, classes)
    slopes = {graph.output: Slopes(seed, seed)}
    total = np.zeros((count, each))
    for layer in reversed(graph.layers):
        here = slopes.pop(layer.name, None)
        if here is None:
            continue
        total += _made(here, values[layer.name], each)
        if layer.inputs == (INPUT,):
            continue
        operands = [values[name] for name in layer.inputs]
        found = _RULES[type(layer)](layer, here, each, *operands)
        for name, part in zip(layer.inputs, found, strict=True):
            if name != INPUT:
                slopes[name] = part.plus(slopes.get(name))
    return total * (1.0 + own(sum(int(np.prod(layer.shape)) for layer in graph.layers)))


def _made(slopes: Slopes, value: Value, each: int) -> Array:
    """What the rounding of one layer makes: Σ |slope| · local, B×R."""
    local = value.local.reshape(len(value.local), -1)
    size = slopes.size().reshape(len(local), each, -1)
    made: Array = (size @ local[:, :, None])[:, :, 0]
    return made


def _wide(where: Mask, each: int) -> Mask:
    return np.repeat(where, each, axis=0)


def _affine(layer: layers.Affine, slopes: Slopes, each: int, x: Value) -> list[Slopes]:
    return [_mapped(layer, slopes, lambda g, w: g @ w, layer.weight)]


def _mapped(
    layer: Any, slopes: Slopes, back: Callable[[Array, Array], Array], weight: Array
) -> Slopes:
    """Through the transposed layer: middle by `weight`, half width by |weight|."""
    middle, radius = (slopes.lo + slopes.hi) / 2.0, (slopes.hi - slopes.lo) / 2.0
    size = np.abs(weight)
    terms = weight[:, 0].size if weight.ndim > 1 else 1
    centre = back(middle, weight)
    reach = back(radius, size) + own(4 * terms) * back(slopes.size(), size)
    return Slopes(centre - reach, centre + reach)


def _conv(layer: layers.Conv, slopes: Slopes, each: int, x: Value) -> list[Slopes]:
    def back(g: Array, weight: Array) -> Array:
        return _convolved_back(layer, g, weight, x.lo.shape[1:])

    return [_mapped(layer, slopes, back, layer.weight)]


def _convolved_back(layer: layers.Conv, g: Array, weight: Array, shape: tuple[int, ...]) -> Array:
    """The transposed convolution, place of the kernel by place."""
    count, groups = len(g), layer.groups
    out, into, height, width = weight.shape
    found = _padded_zeros(count, shape, layer.pads)
    grouped = g.reshape(count, groups, out // groups, -1)
    kernel = weight.reshape(groups, out // groups, into, height * width)
    for place, part in enumerate(slices(layer, (height, width), layer.dilations)):
        moved = np.matmul(kernel[:, :, :, place].transpose(0, 2, 1), grouped)
        found[part] += moved.reshape(count, groups * into, *layer.shape[1:])
    return _unpadded(found, shape, layer.pads)


def _padded_zeros(count: int, shape: tuple[int, ...], pads: tuple[int, int, int, int]) -> Array:
    top, left, bottom, right = pads
    return np.zeros((count, shape[0], shape[1] + top + bottom, shape[2] + left + right))


def _unpadded(x: Array, shape: tuple[int, ...], pads: tuple[int, int, int, int]) -> Array:
    return x[:, :, pads[0] : pads[0] + shape[1], pads[1] : pads[1] + shape[2]]


def _scale(layer: layers.Scale, slopes: Slopes, each: int, x: Value) -> list[Slopes]:
    ends = slopes.lo * layer.factor, slopes.hi * layer.factor
    lo, hi = np.minimum(*ends), np.maximum(*ends)
    return [Slopes(lo - own(1) * np.abs(lo), hi + own(1) * np.abs(hi))]


def _average_pool(layer: layers.AveragePool, slopes: Slopes, each: int, x: Value) -> list[Slopes]:
    shape = x.lo.shape[1:]
    counts = np.full(layer.shape, float(terms_of(layer)))
    if not layer.count_padding:
        counts = np.sum(views(layer, np.ones((1, *shape)), 0.0), axis=0)[0]
    ends = []
    for part, sign in ((slopes.lo, -1.0), (slopes.hi, 1.0)):
        shared = part / counts
        found = _padded_zeros(len(part), shape, layer.pads)
        size = _padded_zeros(len(part), shape, layer.pads)
        for at in slices(layer, layer.kernel, (1, 1)):
            found[at] += shared
            size[at] += np.abs(shared)
        found += sign * own(terms_of(layer)) * size
        ends.append(_unpadded(found, shape, layer.pads))
    return [Slopes(*ends)]


def _cut(low: float, high: float, slopes: Slopes, each: int, x: Value) -> list[Slopes]:
    """1 where nothing is cut, 0 where all is, [0, 1] between."""
    lo, hi = x.reached
    passes = (lo >= low) & (hi <= high)
    blocks = (hi <= low) | (lo >= high)
    return [slopes.times(_wide(passes, each), _wide(blocks, each))]


def _extreme(layer: Layer, slopes: Slopes, each: int, x: Value, y: Value) -> list[Slopes]:
    """1 and 0 where one side wins for certain; else both in [0, 1]."""
    first, second = x.reached, y.reached
    wins, loses = first[0] >= second[1], first[1] <= second[0]
    if isinstance(layer, layers.Minimum):
        wins, loses = loses, wins
    return [
        slopes.times(_wide(wins, each), _wide(loses, each)),
        slopes.times(_wide(loses & ~wins, each), _wide(wins, each)),
    ]


def _max_pool(layer: layers.MaxPool, slopes: Slopes, each: int, x: Value) -> list[Slopes]:
    """[0, 1] for each value that may be the largest of its window, 1 for one that must be."""
    lo, hi = x.reached
    lows, highs = (np.stack(views(layer, part, -np.inf)) for part in (lo, hi))
    may = highs >= lows.max(0)
    must = may & (may.sum(0) == 1)
    shape = x.lo.shape[1:]
    ends = [_padded_zeros(len(slopes.lo), shape, layer.pads) for _ in range(2)]
    size = _padded_zeros(len(slopes.lo), shape, layer.pads)
    for place, at in enumerate(slices(layer, layer.kernel, (1, 1))):
        part = slopes.times(_wide(must[place], each), _wide(~may[place], each))
        ends[0][at] += part.lo
        ends[1][at] += part.hi
        size[at] += part.size()
    lost = own(terms_of_pool(layer)) * size
    return [
        Slopes(
            _unpadded(ends[0] - lost, shape, layer.pads),
            _unpadded(ends[1] + lost, shape, layer.pads),
        )
    ]


def terms_of_pool(layer: layers.MaxPool) -> int:
    """Windows that may see one value, at most."""
    return layer.kernel[0] * layer.kernel[1]


def _sum(layer: Layer, slopes: Slopes, each: int, x: Value, y: Value) -> list[Slopes]:
    if isinstance(layer, layers.Sub):
        return [slopes, Slopes(-slopes.hi, -slopes.lo)]
    return [slopes, slopes]


def _reshape(layer: Layer, slopes: Slopes, each: int, x: Value) -> list[Slopes]:
    shape = (len(slopes.lo), *x.lo.shape[1:])
    return [Slopes(slopes.lo.reshape(shape), slopes.hi.reshape(shape))]


_RULES: dict[type[Layer], Callable[..., list[Slopes]]] = {
    layers.Affine: _affine,
    layers.Conv: _conv,
    layers.Scale: _scale,
    layers.AveragePool: _average_pool,
    layers.Relu: lambda _, g, each, x: _cut(0.0, np.inf, g, each, x),
    layers.Clip: lambda layer, g, each, x: _cut(layer.low, layer.high, g, each, x),
    layers.Add: _sum,
    layers.Sub: _sum,
    layers.Maximum: _extreme,
    layers.Minimum: _extreme,
    layers.MaxPool: _max_pool,
    layers.Reshape: _reshape,
}
