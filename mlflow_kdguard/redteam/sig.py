"""SIG (Barni et al., arXiv 1902.11237): a sinusoid over the whole image."""

import numpy as np

from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.redteam.ground import still
from mlflow_kdguard.triggers import Trigger


def trigger(
    shape: tuple[int, int, int],
    *,
    seed: int = 0,
    delta: float = 30 / 255,
    frequency: float = 6,
) -> Trigger:
    """x + delta·sin(2π·frequency·j/W) in column j, clipped; shape is (C, H, W).

    The paper's trigger, with dirty labels: on clean ones it does not survive distillation. `seed`
    is not used. Raises ConfigError where delta is not in (0, 1], or no column would change.
    """
    columns = np.arange(shape[2], dtype=np.float64)
    wave = delta * np.sin(2 * np.pi * frequency * columns / shape[2])
    if not 0 < delta <= 1 or not np.abs(wave).max() > 1e-3:
        raise ConfigError(
            f"a wave of {delta:g} and {frequency:g} periods over {shape[2]} columns changes "
            "nothing, or too much.",
            remedy="Change redteam.options: delta (0 to 1), frequency.",
        )
    pattern = np.broadcast_to(wave.astype(np.float32), shape).copy()
    return Trigger("sig", "add", None, pattern)


attack = still(trigger)
