"""Learning rates by step."""

import math

from mlflow_kdguard.config import Loop

_STEPS = (0.5, 0.75)
"""Shares of the run at which the step schedule divides the rate by ten (He et al., 1512.03385)."""


def rate(step: int, steps: int, loop: Loop) -> float:
    """Learning rate of a step under `loop.schedule`, after a linear warm-up where one is asked for.

    one-cycle: `one_cycle`; constant: the peak; step: the peak, a tenth from half of the run on, a
    hundredth from three quarters on; cosine: from the peak to 0 (Loshchilov & Hutter, arXiv
    1608.03983). In the first `warm_up` share of the steps it rises by equal steps to what it would
    be; one-cycle has a rise of its own and takes no other.
    """
    if loop.schedule == "one-cycle":
        return one_cycle(step, steps, loop.lr)
    rise = loop.warm_up * steps
    warm = min(1.0, (step + 1) / rise) if rise else 1.0
    return warm * loop.lr * _factor(loop.schedule, step / steps)


def _factor(schedule: str, done: float) -> float:
    if schedule == "step":
        return 0.1 ** sum(done >= at for at in _STEPS)
    return 0.5 * (1.0 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Learning rate of a step: cosine from peak/25 up over 30 % of the steps, then to peak/250,000.

    Smith & Topin, arXiv 1708.07120, with the constants of torch's OneCycleLR.
    """
    low, last = peak / 25.0, peak / 25.0 / 1e4
    turn = 0.3 * steps - 1
    if step <= turn:
        start, end, share = low, peak, step / turn if turn else 1.0
    else:
        start, end, share = peak, last, min(1.0, (step - turn) / max(steps - 1 - turn, 1e-12))
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * share))
