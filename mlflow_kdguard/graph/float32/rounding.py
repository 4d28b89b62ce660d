"""Constants and units of the analysis of float32 inference."""

from dataclasses import replace
from typing import Any

import numpy as np

from mlflow_kdguard.graph import layers
from mlflow_kdguard.graph.interpreter import apply
from mlflow_kdguard.graph.layers import Array

UNIT = 2.0**-24
"""Unit roundoff u of float32."""
LARGEST = 2.0**127
"""Sums of terms from here on may overflow: nothing is promised."""
FOLDED = 16
"""Roundings beyond the sum itself: factors, offsets, what was folded (a batch norm needs eight)."""
FLUSHED = 2.0**-125
"""What an underflow loses: 2^-126 where it is flushed to zero."""
_OWN = 2.0**-51
"""Four times the unit roundoff of float64, in which these very figures are computed."""


def gamma(terms: int) -> float:
    """γ_n of a sum of `terms` products, a bias, and what was folded into them."""
    n = (terms + FOLDED) * UNIT
    return n / (1.0 - n) if n < 1.0 else float("inf")


def own(terms: int) -> float:
    """What `gamma` is for float32, for the float64 in which it is all computed; generously."""
    return (terms + 64) * _OWN


def summed(largest: Array, mass: Array, terms: int, before: int) -> Array:
    """Error of one sum of `terms` products and a bias, in any order: float64, as `mass`.

    A sum of n + 1 terms is n additions, and each is off by at most half the spacing of the numbers
    around its result. Whatever the order, that result is the sum of some of the terms: at most
    `largest`, which the positive ones and the negative ones do not exceed (Higham 2002, 4.2). What
    is rounded in each term by itself (products, factors that are folded in, `before` of them
    earlier) is off by u times the term, together u times `mass`, the sum of all magnitudes, each.
    """
    most = (terms + before + 2 * FOLDED) * UNIT
    if most >= 0.5:
        return np.full_like(mass, np.inf)
    growth = 1.0 / (1.0 - most)
    mantissa, exponent = np.frexp(largest * growth)
    below = np.where(mantissa > 0.0, np.ldexp(1.0, exponent - 1), 0.0)
    error: Array = UNIT * growth * (terms * below + (before + FOLDED) * mass * growth)
    return error


def absolute(layer: Any) -> Any:
    """The linear layer with magnitudes for weights, and for the terms of its offset."""
    if isinstance(layer, layers.Affine | layers.Conv):
        return replace(layer, weight=np.abs(layer.weight), bias=np.abs(layer.bias))
    if isinstance(layer, layers.Scale):
        return replace(layer, factor=np.abs(layer.factor), offset=np.abs(layer.offset))
    return layer


def units(layer: Any, unit: Array) -> Array:
    """Through the linear layer with magnitudes of at least 1 for weights and terms of its offset.

    A runtime may multiply constants with each other before it sees the image (a batch norm or a
    factor folded into a convolution), and numbers in any order. What one product loses is then
    multiplied by some of the other numbers: by all that are above 1, at most.
    """
    sizes = absolute(layer)
    if isinstance(sizes, layers.AveragePool):
        return apply(replace(sizes, count_padding=True), unit) * terms_of(layer)
    names = ("factor", "offset") if isinstance(sizes, layers.Scale) else ("weight", "bias")
    return apply(replace(sizes, **{n: np.maximum(getattr(sizes, n), 1.0) for n in names}), unit)


def without_offset(layer: Any) -> Any:
    """The linear layer without its bias or offset."""
    if isinstance(layer, layers.Affine | layers.Conv):
        return replace(layer, bias=np.zeros_like(layer.bias))
    if isinstance(layer, layers.Scale):
        return replace(layer, offset=np.zeros(()))
    return layer


def terms_of(layer: Any) -> int:
    """Products in one sum of a linear layer."""
    if isinstance(layer, layers.Affine):
        return int(layer.weight.shape[1])
    if isinstance(layer, layers.Conv):
        return int(layer.weight[0].size)
    if isinstance(layer, layers.AveragePool):
        return layer.kernel[0] * layer.kernel[1]
    return 1
