"""Functionals of any operation, pulled back to the image and bounded there.

CROWN (arXiv 1811.00866) with the multipliers of β-CROWN (arXiv 2103.06624): of a switch that is
known to be on (z >= 0) or off (z <= 0), any multiple λ >= 0 of |z| may be added.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.errors import CertificateError
from mlflow_kdguard.proof.arithmetic import UNDERFLOW, Array, gamma, up
from mlflow_kdguard.proof.bends import Lines
from mlflow_kdguard.proof.net import Bend, Linear, Net

ROWS = 256
"""Functionals in one pass: what fits in a processor's cache."""


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """The images that a proof speaks of: those of [0, 1]^d within `eps` of `centre` (flat)."""

    centre: Array
    lo: Array
    hi: Array
    eps: float
    norm: Literal["linf", "l2"]

    @classmethod
    def around(cls, centre: Array, eps: float, norm: Literal["linf", "l2"]) -> "Region":
        """The ball; its box is rounded outwards before it is cut to [0, 1]."""
        lo = np.clip(np.nextafter(centre - eps, -np.inf), 0.0, 1.0)
        hi = np.clip(np.nextafter(centre + eps, np.inf), 0.0, 1.0)
        return cls(centre, lo, hi, eps, norm)

    def highest(self, coef: Array, rate: float) -> Array:
        """Largest value of each row of `coef` (N×d), without the error of the inner product."""
        rises = np.maximum(coef, 0.0)
        best = rises @ self.hi + (coef - rises) @ self.lo
        if self.norm == "l2":
            unit = np.maximum(np.abs(coef).max(1), 1e-300)
            length = unit * np.sqrt(((coef / unit[:, None]) ** 2).sum(1)) * (1.0 + rate)
            best = np.minimum(best, coef @ self.centre + self.eps * length + UNDERFLOW)
        return best


@dataclass(slots=True, eq=False)
class Known:
    """What is known so far: the box of every operation, the sizes that rounding errors are
    proportional to (largest Σ|W||x| + |b|), and the lines around every bent operation."""

    net: Net
    region: Region
    lo: list[Array] = field(default_factory=list)
    hi: list[Array] = field(default_factory=list)
    sizes: list[Array] = field(default_factory=list)
    lines: dict[int, Lines] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """γ of every sum in a pass."""
        return gamma(self.net.terms)


@dataclass(frozen=True, slots=True, eq=False)
class Fixed:
    """Of N rows: phases (int8 N×width: -1 off, 1 on, 0 open), and `value` (N×width): the slope
    below an open switch, the multiplier of a fixed one."""

    phase: NDArray[np.int8]
    value: Array

    def take(self, part: slice) -> "Fixed":
        """Some of the rows."""
        return Fixed(self.phase[part], self.value[part])


def highest(known: Known, seeds: Mapping[int, Array], fixed: Fixed | None = None) -> Array:
    """Upper bounds of Σ seeds[i]·(value of operation i), N rows: float64 N."""
    count = len(next(iter(seeds.values())))
    bounds = [np.zeros(0)]
    for start in range(0, count, ROWS):
        part = slice(start, start + ROWS)
        some = {index: rows[part] for index, rows in seeds.items()}
        bounds.append(_highest(known, some, None if fixed is None else fixed.take(part)))
    return np.concatenate(bounds)


def _highest(known: Known, seeds: dict[int, Array], fixed: Fixed | None) -> Array:
    waiting, net = dict(seeds), known.net
    count = len(next(iter(seeds.values())))
    shift, error, lost = np.zeros(count), np.zeros(count), 0.0
    for index in range(max(waiting), 0, -1):
        if index not in waiting:
            continue
        rows, op = waiting.pop(index), net.ops[index]
        error += np.abs(rows) @ known.sizes[index]
        lost += float(known.sizes[index].sum())
        if isinstance(op, Linear):
            if op.offset is not None:
                shift += rows @ op.offset
            parts = op.pull(rows)
        elif isinstance(op, Bend):
            parts, constant = _bent(known, index, op, rows, fixed)
            shift += constant
        else:
            raise CertificateError(f"UNSUPPORTED: operation {index} of the networks.")
        for source, part in zip(op.inputs, parts, strict=True):
            waiting[source] = waiting[source] + part if source in waiting else part
    coef = waiting.get(0)
    if coef is not None:
        error += np.abs(coef) @ known.sizes[0]
        lost += float(known.sizes[0].sum())
        shift = shift + known.region.highest(coef, known.rate)
    bound = up(shift + known.rate * error) + UNDERFLOW * (1.0 + lost)
    return np.where(np.isnan(bound), np.inf, bound)


def _bent(
    known: Known, index: int, op: Bend, rows: Array, fixed: Fixed | None
) -> tuple[tuple[Array, ...], Array]:
    """Functionals of a bent operation as functionals of its inputs, and a constant a row."""
    if op.larger is None:
        switch, constant = _switch(known, index, rows, fixed)
        return (switch,), constant
    switch, constant = _switch(known, index, rows if op.larger else -rows, fixed)
    first, second = (switch, -switch) if op.larger else (rows + switch, -switch)
    return (first, rows + second if op.larger else second), constant


def _switch(known: Known, index: int, rows: Array, fixed: Fixed | None) -> tuple[Array, Array]:
    """Functionals of f(z) as functionals of z (N×size), and a constant a row."""
    lines = known.lines[index]
    rises = np.maximum(rows, 0.0)
    falls = rows - rises
    if fixed is None or not lines.open.any():
        constant = rises @ lines.above_shift
        if lines.below_shift.any():
            constant += falls @ lines.below_shift
        return rises * lines.above + falls * lines.below, constant
    where = known.net.columns[index]
    phase = np.where(lines.open, fixed.phase[:, where], 0)
    value, held, on = fixed.value[:, where], phase != 0, phase > 0
    free = ~held & lines.open
    below = np.where(held, on, np.where(free, np.clip(value, 0.0, 1.0), lines.below))
    above = np.where(held, on, lines.above)
    constant = np.where(held, 0.0, rises) @ lines.above_shift
    if lines.below_shift.any():
        constant += np.where(held, 0.0, falls) @ lines.below_shift
    pushed = np.where(held, np.maximum(value, 0.0), 0.0) * phase
    return rises * above + falls * below + pushed, constant
