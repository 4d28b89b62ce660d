"""What multipliers prove, whoever found them.

For any y, and d = c - Aᵀy, every point of the program has c·v = y·(A v) + d·v, and each term is at
most its largest value on its interval (Neumaier and Shcherbina, "Safe bounds in linear and
mixed-integer linear programming", Math. Program. 99 (2004), with boxes for all variables). Errors
of float64 are bounded beforehand (Higham, *Accuracy and Stability*, 3.1): |fl(v·w) - v·w| <=
γ_n |v|·|w| in any order. A solver's status plays no part.
"""

import numpy as np

from mlflow_kdguard.solvers.model import Floats, Model

UNIT = 2.0**-53
_TINY = 1e-290
"""More than underflow can lose in any sum here."""


def _gamma(terms: int) -> float:
    """γ_n, four times, for n + 16 roundings: the bounds of errors are rounded too."""
    n = 4 * (terms + 16) * UNIT
    return n / (1.0 - n)


def upper(model: Model, y: Floats) -> float:
    """An upper bound of the objective over the program, with integrality or without; inf where `y`
    proves nothing (wrong length, overflow)."""
    return _bound(model, model.cost, y)


def empty(model: Model, y: Floats) -> bool:
    """Whether `y` proves that the program has no point (Farkas): with no objective at all the
    bound is negative, and it can be scaled to anything. Both signs of `y` are tried."""
    nothing = np.zeros_like(model.cost)
    return min(_bound(model, nothing, y), _bound(model, nothing, -y)) < 0.0


def _bound(model: Model, cost: Floats, y: Floats) -> float:
    if y.shape != model.row_lo.shape:
        return float("inf")
    with np.errstate(over="ignore", invalid="ignore"):
        y = signed(model, y)
        ends = np.where(y > 0.0, model.row_hi, np.where(y < 0.0, model.row_lo, 0.0))
        d = cost - model.matrix.T @ y
        size = np.abs(cost) + abs(model.matrix).T @ np.abs(y)
        widest = np.maximum(np.abs(model.lo), np.abs(model.hi))
        value = float(y @ ends + np.maximum(d * model.lo, d * model.hi).sum())
        length = float(np.abs(y) @ np.abs(ends) + (2.0 * size) @ widest)
        bound = value + _gamma(sum(model.shape)) * length + _TINY * (1.0 + float(widest.sum()))
    return bound if np.isfinite(bound) else float("inf")


def signed(model: Model, y: Floats) -> Floats:
    """The multipliers without those that are no numbers or speak of an end that is infinite."""
    y = np.where(np.isfinite(y), y, 0.0)
    y = np.where((y > 0.0) & np.isinf(model.row_hi), 0.0, y)
    return np.where((y < 0.0) & np.isinf(model.row_lo), 0.0, y)
