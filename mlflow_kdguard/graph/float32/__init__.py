"""How far float32 inference can be from the real numbers that bounds speak of.

No error is measured: each is bounded beforehand, layer by layer (Higham, "Accuracy and Stability of
Numerical Algorithms", 2002, 3.1 and 4.2): a sum of n products is off by at most γ_n Σ|w_i||x_i|,
with γ_n = n u / (1 - n u) and u = 2^-24, and by at most u times each of its partial sums, in any
order of additions, blocked or not, with or without fused multiply-add. What a runtime may fold (a
batch norm, a factor or a residual sum into the convolution before it) is covered as well: the terms
of neighbouring linear layers are added up without cancellation, and all of them may go through all
additions. What each layer adds is carried to the confidences by the network's own derivatives,
which are bounded over the box (`sensitivity`).
Not covered: arithmetic that is no sum of products in float32 (Winograd or FFT convolutions,
TensorFloat-32, bfloat16), which onnxruntime uses on CUDA but not on a CPU.
"""

import math
from dataclasses import dataclass
from math import prod

import numpy as np

from mlflow_kdguard.errors import ModelError
from mlflow_kdguard.graph.float32 import outputs
from mlflow_kdguard.graph.float32.forward import Value, largest, values
from mlflow_kdguard.graph.float32.rounding import LARGEST, UNIT
from mlflow_kdguard.graph.layers import Array, Graph

__all__ = ["Margin", "gap_margin", "lead_margin", "margin"]

_NUMBERS = 2**27
"""Coefficients that forms of one image may have (1 GiB, if all of them were held at once; only
those that are read again are); beyond, ranges come from intervals, which know nothing of what two
logits have in common, and leave margins hundreds of times as large."""
_AT_ONCE = 2**24
"""Coefficients of the images that are looked at together."""


@dataclass(frozen=True, slots=True, eq=False)
class Margin:
    """What float32 inference may add to or take from the real values, for every image of a box.

    `logits`, `confidences`: float64 B×K, the latter of a softmax computed in float32 or better.
    `layers`: the largest error after each layer, by its name. Infinite where float32 may overflow.
    """

    layers: tuple[tuple[str, float], ...]
    logits: Array
    confidences: Array


def margin(graph: Graph, lo: Array, hi: Array) -> Margin:
    """|float32 inference - real arithmetic| for every float32 image between `lo` and `hi`.

    `lo`, `hi`: B×C×H×W, or C×H×W for a single box. Raises ModelError where they do not fit.
    """
    parts = []
    for low, high in _chunks(graph, lo, hi):
        known, finite = _known(graph, low, high)
        logits = known[graph.output].error if finite else np.full((len(low), graph.classes), np.inf)
        parts.append((_errors(graph, known), logits, outputs.confidences(graph, known, finite)))
    errors, bare, softened = zip(*parts, strict=True)
    worst = np.max(errors, axis=0).tolist()
    return Margin(
        tuple(zip(_names(graph), worst, strict=True)),
        np.concatenate(bare),
        np.concatenate(softened),
    )


def gap_margin(reference: Graph, student: Graph, lo: Array, hi: Array) -> Array:
    """What float32 inference may add to p_S,k - p_R,k, for every image of the box: B×K."""
    parts = [margin(network, lo, hi).confidences for network in (reference, student)]
    total: Array = parts[0] + parts[1] + UNIT
    return total


def lead_margin(graph: Graph, lo: Array, hi: Array, target: int) -> Array:
    """What float32 inference may add to z_t - z_k, for every image of the box: B×(K-1).

    One figure for each other class k, ascending. Infinite where float32 may overflow.
    """
    parts = []
    for low, high in _chunks(graph, lo, hi):
        known, finite = _known(graph, low, high)
        parts.append(outputs.leads(graph, known, target, finite))
    return np.concatenate(parts)


def _errors(graph: Graph, known: dict[str, Value]) -> list[float]:
    """The largest error after each layer; infinite behind one that may overflow."""
    found, limit = [], 0.0
    for name in _names(graph):
        limit = max(limit, known[name].largest)
        found.append(largest(known[name].error) if limit < LARGEST else math.inf)
    return found


def _names(graph: Graph) -> list[str]:
    return [layer.name for layer in graph.layers]


def _known(graph: Graph, lo: Array, hi: Array) -> tuple[dict[str, Value], bool]:
    """All values, and whether none of them may overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        known = values(graph, lo, hi, keep_forms=_coefficients(graph) <= _NUMBERS)
    return known, max(known[name].largest for name in _names(graph)) < LARGEST


def _coefficients(graph: Graph) -> int:
    return prod(graph.input_shape) * sum(prod(layer.shape) for layer in graph.layers)


def _chunks(graph: Graph, lo: Array, hi: Array) -> list[tuple[Array, Array]]:
    lo, hi = _box(graph, lo), _box(graph, hi)
    if not (lo <= hi).all():
        raise ModelError("the box is empty or not finite.", remedy="Give finite ends, lo <= hi.")
    size = max(1, _AT_ONCE // _coefficients(graph))
    return [(lo[at : at + size], hi[at : at + size]) for at in range(0, len(lo), size)]


def _box(graph: Graph, ends: Array) -> Array:
    given = np.asarray(ends, dtype=np.float64)
    given = given[None] if given.ndim == len(graph.input_shape) else given
    if given.shape[1:] != graph.input_shape:
        raise ModelError(
            f"a box of shape {given.shape} does not fit the graph's input N×{graph.input_shape}.",
            remedy="Give boxes of the shape that the graph was exported for.",
        )
    return given
