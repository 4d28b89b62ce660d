"""From what rounding does to margins of the logits to what it does to confidences and leads."""

import numpy as np

from mlflow_kdguard.graph.float32.forward import Value
from mlflow_kdguard.graph.float32.rounding import gamma, own
from mlflow_kdguard.graph.float32.sensitivity import effect
from mlflow_kdguard.graph.layers import Array, Graph


def leads(graph: Graph, known: dict[str, Value], target: int, finite: bool) -> Array:
    """Errors of z_target - z_k for the other classes k, ascending: B×(K-1)."""
    logits = known[graph.output]
    count, classes = logits.lo.shape
    if not finite:
        return np.full((count, classes - 1), np.inf)
    others = np.array([k for k in range(classes) if k != target], dtype=np.int64)
    rows = np.zeros((count, classes - 1, classes))
    rows[:, np.arange(classes - 1), others] = -1.0
    rows[:, :, target] = 1.0
    direct = logits.error[:, others] + logits.error[:, [target]]
    return np.minimum(effect(graph, known, rows), direct)


def confidences(graph: Graph, known: dict[str, Value], finite: bool) -> Array:
    """Errors of softmax(logits), computed in float32: B×K.

    With t a class of each image and m_j = z_j - z_t, dp_k = p_k (dm_k - Σ_j p_j dm_j). Each dm_j is
    bounded by itself (`effect`), the products of confidences over all that is between the real and
    the computed values.
    """
    logits = known[graph.output]
    count, classes = logits.lo.shape
    if not finite or classes == 1:
        return np.full((count, classes), 0.0 if finite else 1.0)
    pivot = (logits.lo + logits.hi).argmax(1)
    # Row j is m_j; that of t itself is zero.
    rows = np.repeat(np.eye(classes)[None], count, 0)
    rows[np.arange(count), :, pivot] -= 1.0
    direct = logits.error + logits.error[np.arange(count), pivot][:, None]
    change = np.minimum(effect(graph, known, rows), direct)
    change[np.arange(count), pivot] = 0.0
    lo, hi = _margins(logits, pivot)
    wide = change + own(1) * (np.abs(lo) + np.abs(hi))
    low, high = _ranges(lo - wide, hi + wide)
    pair = _products(high[:, :, None], high[:, None, :])
    single = _own_products(low, high)
    here = np.arange(classes)
    pair[:, here, here] = single
    weighted = (pair @ change[:, :, None])[:, :, 0]
    # The coefficients of all dm_j but the own one are at most as large together as that one.
    spread = change.max(1, keepdims=True) + change
    total = np.minimum(weighted, single * spread) * (1.0 + own(classes))
    found: Array = np.minimum(total + gamma(2 * classes + 32), 1.0)
    return found


def _margins(logits: Value, pivot: Array) -> tuple[Array, Array]:
    """Ranges of z_j - z_t for the pivot t of each image: B×K each."""
    at = np.arange(len(pivot))
    lo = logits.lo - logits.hi[at, pivot][:, None]
    hi = logits.hi - logits.lo[at, pivot][:, None]
    if logits.form is not None:
        form = logits.form
        # Of a form with one coefficient each, no two values depend on the same pixel.
        own_reach = form.slack + form.slack[at, pivot][:, None]
        if form.single:
            sizes = np.abs(form.coefficients)
            reach = sizes + sizes[at, pivot][:, None] + own_reach
        else:
            apart = form.coefficients - form.coefficients[at, :, pivot][:, :, None]
            reach = np.abs(apart).sum(1) + own_reach
        centre = form.centre - form.centre[at, pivot][:, None]
        size = np.abs(form.centre) + np.abs(form.centre[at, pivot][:, None]) + form.reach
        terms = form.coefficients[0].size
        reach = reach + own(terms) * (size + form.reach[at, pivot][:, None])
        lo, hi = np.maximum(lo, centre - reach), np.minimum(hi, centre + reach)
    lo[at, pivot] = 0.0
    hi[at, pivot] = 0.0
    return lo, hi


def _ranges(lo: Array, hi: Array) -> tuple[Array, Array]:
    """Ranges of softmax(m) for m in a box: p_k is 1 / (1 + Σ_{j≠k} exp(m_j - m_k))."""
    with np.errstate(over="ignore"):
        most = np.exp(lo[:, None, :] - hi[:, :, None])
        least = np.exp(hi[:, None, :] - lo[:, :, None])
    here = np.arange(lo.shape[1])
    most[:, here, here] = 0.0
    least[:, here, here] = 0.0
    slack = 1.0 + own(lo.shape[1])
    low = 1.0 / (1.0 + least.sum(2)) / slack
    high = np.minimum(1.0 / (1.0 + most.sum(2)) * slack, 1.0)
    return low, high


def _products(a: Array, b: Array) -> Array:
    """Largest p q for p <= a, q <= b and p + q <= 1."""
    small, large = np.minimum(a, b), np.maximum(a, b)
    found: Array = np.where(small >= 0.5, 0.25, small * np.minimum(large, 1.0 - small))
    return found


def _own_products(low: Array, high: Array) -> Array:
    """Largest p (1 - p) for p in [low, high]."""
    inside = (low <= 0.5) & (high >= 0.5)
    found: Array = np.where(inside, 0.25, np.maximum(low * (1.0 - low), high * (1.0 - high)))
    return found
