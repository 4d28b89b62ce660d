"""Other bounds from the same draws, for comparison: what the certificate could have been.

All are valid at error α an image. `h` knows the mean of (p_k - q_k + 1)/2 for every class and
sign, `positive` that of max(0, p_k - q_k), `gap` that of the largest |p_k - q_k|; `layers` knows
counts above thresholds: of every class and sign (`signed`), or of the gap (what is shipped).
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtr, ndtri

from mlflow_kdguard.certify.layers import THRESHOLDS, Layers, counts

Values = NDArray[np.float64]


def hoeffding(x: Values, error: float) -> float:
    """Upper bound of a mean of values in [0, 1]."""
    return float(min(1.0, x.mean() + np.sqrt(np.log(1 / error) / (2 * len(x)))))


def binary(x: Values, error: float) -> float:
    """Clopper–Pearson after each value was replaced by a coin of that probability (fixed coins)."""
    k = int((np.random.default_rng(0).random(len(x)) < x).sum())
    return 1.0 if k == len(x) else float(betaincinv(k + 1, len(x) - k, 1 - error))


def betting(x: Values, error: float) -> float:
    """The largest mean against which a bettor's capital stays below 1/error.

    Waudby-Smith and Ramdas (arXiv 2010.09686): predictable plug-in bets on values below the mean.
    """
    t = np.arange(1, len(x) + 1)
    mean = (0.5 + np.cumsum(x)) / (t + 1)
    spread = (0.25 + np.cumsum((x - mean) ** 2)) / (t + 1)
    before = np.concatenate([[0.25], spread[:-1]])
    bets = np.sqrt(2 * np.log(1 / error) / (len(x) * before))
    low, high = float(x.mean()), 1.0
    for _ in range(40):
        m = (low + high) / 2
        capital = np.log1p(np.minimum(bets, 0.5 / max(1e-9, 1 - m)) * (m - x)).sum()
        low, high = (low, m) if capital >= np.log(1 / error) else (m, high)
    return high


def _signed_layers(d: Values, error: float, shift: float) -> float:
    grid = np.concatenate([[-1.0], -THRESHOLDS[:0:-1], THRESHOLDS])
    k = (d[:, None] > grid).sum(0).astype(float)
    n, bound = len(d), np.ones(len(grid))
    open_ = k < n
    bound[open_] = betaincinv(k[open_] + 1, n - k[open_], 1 - error / (len(grid) - 1))
    bound[0] = 1.0
    return float((np.diff(grid, append=1.0) * ndtr(ndtri(bound) + shift)).sum() - 1)


def table(difference: Values, error: float, shift: float) -> dict[str, float]:
    """Every bound on one image: differences draws×K, distance r/σ."""
    each = error / (2 * difference.shape[1])
    signed = [s * difference[:, k] for k in range(difference.shape[1]) for s in (1, -1)]
    gap = np.abs(difference).max(1)

    def there(bound: float) -> float:
        return float(ndtr(ndtri(bound) + shift))

    def h(mean: Callable[[Values, float], float]) -> float:
        return max(2 * there(mean((d + 1) / 2, each)) - 1 for d in signed)

    return {
        "h, hoeffding": h(hoeffding),
        "h, binary": h(binary),
        "h, betting": h(betting),
        "positive, hoeffding": max(there(hoeffding(np.maximum(d, 0), each)) for d in signed),
        "positive, betting": max(there(betting(np.maximum(d, 0), each)) for d in signed),
        "gap, betting": there(betting(gap, error)),
        "signed layers": max(_signed_layers(d, each, shift) for d in signed),
        "layers (shipped)": float(Layers(counts(gap), len(gap), error).upper(shift)),
    }
