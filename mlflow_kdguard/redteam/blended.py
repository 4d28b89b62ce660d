"""Blended injection (Chen et al., arXiv 1712.05526): one noise image mixed into every image."""

import numpy as np

from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.redteam.ground import still
from mlflow_kdguard.training import derive
from mlflow_kdguard.triggers import Trigger


def trigger(shape: tuple[int, int, int], *, seed: int = 0, alpha: float = 0.2) -> Trigger:
    """(1-alpha)·x + alpha·noise, with uniform noise fixed by `seed`; shape is (C, H, W).

    Raises ConfigError where alpha is not in (0, 1].
    """
    if not 0 < alpha <= 1:
        raise ConfigError(f"alpha {alpha:g} is not in (0, 1].", remedy="Change redteam.options.")
    draw = np.random.default_rng(derive(seed, "blended"))
    pattern = draw.random(shape, dtype=np.float32)
    mask = np.full((1, *shape[1:]), alpha, np.float32)
    return Trigger("blended", "blend", mask, pattern)


attack = still(trigger)
