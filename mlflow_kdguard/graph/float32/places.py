"""Forms through layers that only move, or pick, values."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.graph.float32.forms import Form, spread
from mlflow_kdguard.graph.float32.rounding import own
from mlflow_kdguard.graph.interpreter import apply
from mlflow_kdguard.graph.layers import Array, Layer, MaxPool


def reshaped(layer: Layer, x: Form) -> Form:
    """The same numbers in another shape."""
    if x.single:
        coefficients = apply(layer, x.coefficients)
    else:
        coefficients = x.coefficients.reshape(*x.coefficients.shape[:2], *layer.shape)
    return Form(apply(layer, x.centre), coefficients, apply(layer, x.slack), x.single)


def pooled(layer: MaxPool, x: Form, lo: Array, hi: Array) -> Form:
    """The largest of each window: what has the highest low end, and what others exceed it by."""
    coefficients = spread(x) if x.single else x.coefficients
    lows, highs = (seen(layer, part, -np.inf) for part in (lo, hi))
    which = lows.argmax(0)
    low = lows.max(0)
    others = np.where(np.arange(len(lows)).reshape(-1, 1, 1, 1, 1) == which, -np.inf, highs)
    rise = np.maximum(others.max(0) - low, 0.0)
    centre, slack = (_picked(seen(layer, part, 0.0), which) for part in (x.centre, x.slack))
    wide = coefficients.reshape(-1, *coefficients.shape[2:])
    kept = np.zeros((*coefficients.shape[:2], *layer.shape))
    for place, part in enumerate(views(layer, wide, 0.0)):
        here = (which == place)[:, None]
        kept += np.where(here, part.reshape(kept.shape), 0.0)
    lost = own(4) * (np.abs(centre) + rise)
    return Form(centre + rise / 2.0, kept, slack + rise / 2.0 + lost, single=False)


def _picked(parts: Array, which: NDArray[np.int64]) -> Array:
    picked: Array = np.take_along_axis(parts, which[None], 0)[0]
    return picked


def seen(layer: Any, x: Array, value: float) -> Array:
    """What each place of the window sees: places×N×C×out height×out width."""
    return np.stack(views(layer, x, value))


def views(layer: Any, x: Array, value: float) -> list[Array]:
    """The same, one place after the other."""
    top, left, bottom, right = layer.pads
    sides = ((0, 0), (0, 0), (top, bottom), (left, right))
    padded = np.pad(x, sides, constant_values=value)
    return [padded[part] for part in slices(layer, layer.kernel, (1, 1))]


def slices(
    layer: Any, kernel: tuple[int, int], dilations: tuple[int, int]
) -> list[tuple[Any, ...]]:
    """Where in the padded image each place of the window comes to lie, row by row."""
    firsts = ((i * dilations[0], j * dilations[1]) for i, j in np.ndindex(*kernel))
    return [
        (slice(None), slice(None), *map(_reach, first, layer.strides, layer.shape[1:]))
        for first in firsts
    ]


def _reach(first: int, step: int, count: int) -> slice:
    return slice(first, first + step * (count - 1) + 1, step)
