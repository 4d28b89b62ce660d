"""A-priori errors of float64 arithmetic, for a checker that does not choose the order of its sums.

NumPy leaves sums to BLAS, whose order and rounding mode are unknown. Higham, "Accuracy and
Stability of Numerical Algorithms" (2002), 3.1: in any order, with or without fused multiply-add,
|fl(v·w) - v·w| <= γ_n |v|·|w| with γ_n = n u / (1 - n u), as long as nothing underflows.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

UNIT = 2.0**-53
"""Unit roundoff u of float64."""
UNDERFLOW = 1e-290
"""What products lose at most by underflow, for each unit of what they are multiplied with: 2^-1022
for each, in up to 1e17 of them."""
HUGE_EXPONENT = 600.0
"""Where exp is cut off: 1 / (1 + exp 600) and 0 differ by less than any margin here."""


def gamma(terms: int) -> float:
    """γ of sums of `terms` products, four times over: what is left covers the errors of the error
    terms, constants that were rounded once, and terms of second order."""
    n = 4.0 * (terms + 64) * UNIT
    return n / (1.0 - n)


def up(x: Array) -> Array:
    """At least the real result of the up to four operations that gave `x`, when their sizes do not
    exceed |x|."""
    raised: Array = x + (np.abs(x) * (8.0 * UNIT) + UNDERFLOW)
    return raised


def down(x: Array) -> Array:
    """At most the real result of the up to four operations that gave `x`."""
    return -up(-x)


def exp(x: Array) -> Array:
    """exp, cut off where it would overflow."""
    value: Array = np.exp(np.minimum(x, HUGE_EXPONENT))
    return value


def logsumexp(x: Array) -> Array:
    """log Σ exp over the last axis."""
    top = x.max(-1, keepdims=True)
    value: Array = np.log(np.exp(x - top).sum(-1)) + top[..., 0]
    return value


def sigmoid(t: Array) -> Array:
    """1 / (1 + exp(-t)) without overflow."""
    small = np.exp(-np.abs(t))
    value: Array = np.where(t >= 0.0, 1.0, small) / (1.0 + small)
    return value
