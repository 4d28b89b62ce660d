"""Forward: for each layer the range of the real values, and what its own rounding may add.

A computed value is the layer's exact function of computed inputs plus a rounding error of its own
(`local`), which is bounded beforehand. The masses it is bounded with are those of the computed
values, so that nothing is left out to second order.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlflow_kdguard.graph import layers
from mlflow_kdguard.graph.float32 import forms, places
from mlflow_kdguard.graph.float32.forms import Form
from mlflow_kdguard.graph.float32.rounding import (
    FLUSHED,
    FOLDED,
    absolute,
    gamma,
    own,
    summed,
    terms_of,
    units,
    without_offset,
)
from mlflow_kdguard.graph.interpreter import apply
from mlflow_kdguard.graph.layers import INPUT, Array, Graph, Layer


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """One layer's values, float64 B×shape each.

    [lo, hi] holds the real values; `error`: largest distance of computed to real ones; `local`: the
    part of it that this layer's own rounding makes. `mass`: at least the sum of the magnitudes of
    the terms that the computed value is a sum of, `terms` the roundings that one of them may go
    through (a runtime may begin such a sum with what is added last, a bias or another branch);
    `unit`: what a loss of 1 in any product behind the last switch may grow to, whatever is
    multiplied first (`rounding.units`). `single`: it is one term, and no sum. `form`: the
    real values as functions of the pixels, None where nobody keeps them.
    """

    lo: Array
    hi: Array
    error: Array
    local: Array
    mass: Array
    unit: Array
    terms: int
    single: bool
    form: Form | None

    @property
    def largest(self) -> float:
        """At least the magnitude of every number on the way here; infinity where one is none."""
        return max(largest(self.mass), largest(self.unit))

    @property
    def reached(self) -> tuple[Array, Array]:
        """The interval of the real value, the computed one, and all between them."""
        wide = self.error + own(1) * self.mass
        return self.lo - wide, self.hi + wide


def values(graph: Graph, lo: Array, hi: Array, *, keep_forms: bool) -> dict[str, Value]:
    """All values of a graph for the images between `lo` and `hi` (B×C×H×W)."""
    begun = forms.begun(lo, hi) if keep_forms else None
    found = {INPUT: _settled(lo, hi, np.zeros_like(lo), begun)}
    left = _uses(graph)
    for layer in graph.layers:
        operands = [found[name] for name in layer.inputs]
        found[layer.name] = _RULES[type(layer)](layer, *operands)
        for name in layer.inputs:
            left[name] -= 1
            if left[name] == 0:  # Forms are large, and not needed behind their last use.
                found[name] = replace(found[name], form=None)
    return found


def _uses(graph: Graph) -> dict[str, int]:
    count = {INPUT: 0} | {layer.name: 0 for layer in graph.layers}
    for layer in graph.layers:
        for name in layer.inputs:
            count[name] += 1
    return count


def largest(numbers: Array) -> float:
    """The largest number; infinity where one is none (infinity times zero)."""
    found = float(numbers.max())
    return float("inf") if math.isnan(found) else found


def _settled(lo: Array, hi: Array, error: Array, form: Form | None) -> Value:
    """A value that is compared or cut, never re-associated: it is its own only term."""
    if form is not None:
        reach = form.reach
        lo, hi = np.maximum(lo, form.centre - reach), np.minimum(hi, form.centre + reach)
    mass = np.maximum(np.abs(lo), np.abs(hi)) + error
    return Value(lo, hi, error, np.zeros_like(error), mass, np.maximum(mass, 1.0), 0, True, form)


def _rounded(value: Value, slack: Array) -> Value:
    """Ranges met with the form's and widened by `slack`; underflow and this analysis' own error."""
    mass, terms = value.mass, value.terms
    grown = 1.0 + own(terms)
    local = (value.local + FLUSHED * (terms + FOLDED) * value.unit) * grown
    error = value.error * grown + local
    lo, hi = value.lo - slack, value.hi + slack
    if value.form is not None:
        reach = value.form.reach
        lo = np.maximum(lo, value.form.centre - reach)
        hi = np.minimum(hi, value.form.centre + reach)
    wide = (1.0 + gamma(terms)) * grown
    unit = value.unit * wide
    return replace(value, lo=lo, hi=hi, error=error, local=local, mass=mass * wide, unit=unit)


def _linear(layer: Any, x: Value) -> Value:
    """W x + b: |W| carries errors on, and the sum's own rounding is added."""
    count = terms_of(layer)
    terms = x.terms + count
    sizes = absolute(layer)
    mass = apply(sizes, x.mass)
    local = gamma(terms) * mass
    if x.single:
        local = np.minimum(local, _plain_sum(layer, x, mass))
    middle, radius = (x.lo + x.hi) / 2.0, (x.hi - x.lo) / 2.0
    carried, lost = without_offset(sizes), own(terms) * mass
    centre, reach = apply(layer, middle), apply(carried, radius)
    form = None if x.form is None else forms.linear(layer, x.form)
    value = Value(
        centre - reach, centre + reach, apply(carried, x.error), local, mass,
        units(layer, x.unit), terms, False, form,
    )  # fmt: skip
    return _rounded(value, lost)


def _scale(layer: layers.Scale, x: Value) -> Value:
    """factor · x + offset: exact by 1, and no sum where nothing is added."""
    if layer.offset.any():
        return _linear(layer, x)
    if (np.abs(layer.factor) == 1.0).all():
        ends = np.sort((layer.factor * x.lo, layer.factor * x.hi), axis=0)
        form = None if x.form is None else forms.linear(layer, x.form)
        return replace(x, lo=ends[0], hi=ends[1], local=np.zeros_like(x.local), form=form)
    return replace(_linear(layer, x), single=x.single)


def _plain_sum(layer: Any, x: Value, mass: Array) -> Array:
    """`rounding.summed` of numbers that are no sums themselves."""
    sizes, begin_end = absolute(layer), (x.lo - x.error, x.hi + x.error)
    up, down = np.maximum(begin_end[1], 0.0), np.maximum(-begin_end[0], 0.0)
    # |w| (up + down) ± w (up - down) is twice what is positive, and twice what is negative.
    both, signed = apply(sizes, up + down), apply(layer, up - down)
    count = terms_of(layer)
    lost = own(count) * both
    largest = (both + np.abs(signed)) / 2.0 + lost
    return summed(largest, mass + lost, count, x.terms)


def _sum(layer: Layer, x: Value, y: Value) -> Value:
    sign = -1.0 if isinstance(layer, layers.Sub) else 1.0
    ends = (y.lo, y.hi) if sign > 0 else (-y.hi, -y.lo)
    terms = x.terms + y.terms + 1
    mass = x.mass + y.mass
    form = None
    if x.form is not None and y.form is not None:
        form = forms.total(x.form, y.form, sign)
    value = Value(
        x.lo + ends[0], x.hi + ends[1], x.error + y.error, gamma(terms) * mass, mass,
        x.unit + y.unit, terms, False, form,
    )  # fmt: skip
    return _rounded(value, own(terms) * mass)


def _cut(low: float, high: float, x: Value) -> Value:
    """min(max(x, low), high): both values end in one interval, perhaps shorter than x.error."""
    lo, hi = np.clip(x.lo, low, high), np.clip(x.hi, low, high)
    begin, end = x.reached
    room = np.clip(end, low, high) - np.clip(begin, low, high)
    form = None if x.form is None else forms.cut(low, high, x.form, x.lo, x.hi)
    return _settled(lo, hi, np.minimum(x.error, room * (1.0 + own(1))), form)


def _extreme(layer: Layer, x: Value, y: Value) -> Value:
    lo, hi = apply(layer, x.lo, y.lo), apply(layer, x.hi, y.hi)
    form = None
    if x.form is not None and y.form is not None:
        if isinstance(layer, layers.Maximum):
            which = x.lo >= y.lo
            rise = np.maximum(np.where(which, y.hi - x.lo, x.hi - y.lo), 0.0)
        else:
            which = x.hi <= y.hi
            rise = np.minimum(np.where(which, y.lo - x.hi, x.lo - y.hi), 0.0)
        form = forms.chosen(x.form, y.form, which, rise)
    return _settled(lo, hi, np.maximum(x.error, y.error), form)


def _max_pool(layer: layers.MaxPool, x: Value) -> Value:
    form = None if x.form is None else places.pooled(layer, x.form, x.lo, x.hi)
    lo, hi, error = (apply(layer, part) for part in (x.lo, x.hi, x.error))
    return _settled(lo, hi, error, form)


def _reshape(layer: Layer, x: Value) -> Value:
    lo, hi, error, mass, unit = (apply(layer, p) for p in (x.lo, x.hi, x.error, x.mass, x.unit))
    form = None if x.form is None else places.reshaped(layer, x.form)
    return Value(lo, hi, error, np.zeros_like(error), mass, unit, x.terms, x.single, form)


_RULES: dict[type[Layer], Callable[..., Value]] = {
    layers.Affine: _linear,
    layers.Conv: _linear,
    layers.Scale: _scale,
    layers.AveragePool: _linear,
    layers.Relu: lambda _, x: _cut(0.0, np.inf, x),
    layers.Clip: lambda layer, x: _cut(layer.low, layer.high, x),
    layers.Add: _sum,
    layers.Sub: _sum,
    layers.Maximum: _extreme,
    layers.Minimum: _extreme,
    layers.MaxPool: _max_pool,
    layers.Reshape: _reshape,
}
