"""How far float64 arithmetic can be from the real numbers that a bound speaks of.

The order in which BLAS adds is unknown, so that no error is measured: every sum of products is
given the a-priori error of Higham, "Accuracy and Stability of Numerical Algorithms" (2002), 3.1,
|fl(v·w) - v·w| <= γ_n |v|·|w| with γ_n = n u / (1 - n u), which holds for every order, with or
without fused multiply-add.
"""

import math

from torch import Tensor

UNIT = 2.0**-53
"""Unit roundoff u of float64."""

TINY = 1e-300
"""Absolute floor that covers underflow, also where the hardware flushes to zero."""

UNDERFLOW = 1e-290
"""What a functional loses at most for each unit of the values that it is of: coefficients that
underflow, 2^-1022 for each product, in every one of up to 1e17 products."""

_SLACK = 4
"""Covers second-order terms and the rounding of the error terms themselves."""


def gamma(terms: int) -> float:
    """γ_n for sums of `terms` products, with slack for constants rounded once (n + 64, times 4)."""
    n = _SLACK * (terms + 64) * UNIT
    return n / (1.0 - n)


def up(x: Tensor) -> Tensor:
    """At least the real result of the one or two operations that gave `x`."""
    return x + (x.abs() * (4 * UNIT) + TINY)


def down(x: Tensor) -> Tensor:
    """At most the real result of the one or two operations that gave `x`."""
    return x - (x.abs() * (4 * UNIT) + TINY)


def next_up(x: Tensor) -> Tensor:
    """The next float64 above."""
    return x.nextafter(x.new_tensor(math.inf))


def next_down(x: Tensor) -> Tensor:
    """The next float64 below."""
    return x.nextafter(x.new_tensor(-math.inf))
