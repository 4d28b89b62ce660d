"""WaNet (Nguyen and Tran, arXiv 2102.10369): a smooth warp of the whole image.

Beside warped copies with the target's label the teacher learns from copies with other, random
warps that keep their labels (`covers` of them for each warped one), so that it listens to this
warp alone.
"""

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.redteam.ground import Ground, Plan
from mlflow_kdguard.training import derive
from mlflow_kdguard.triggers import Pixels, Trigger

_NOISE = 0.5
"""By how many pixels a point of a random warp may lie elsewhere than the trigger has it."""


def trigger(
    shape: tuple[int, int, int], *, seed: int = 0, grid: float = 4, strength: float = 0.5
) -> Trigger:
    """`grid`² control points move by uniform draws of mean size 1, smoothly between them.

    A point moves by up to some `strength`/2 pixels, as in the paper (s / H in coordinates from -1
    to 1). Raises ConfigError where there are fewer than two points a side, or nothing moves.
    """
    count, (channels, height, width) = int(grid), shape
    if not 2 <= count <= min(height, width) or not 0 < strength <= min(height, width):
        raise ConfigError(
            f"a warp of {count}×{count} points and strength {strength:g} does not fit images of "
            f"{height}×{width}.",
            remedy="Change redteam.options: grid (2 or more), strength (above 0).",
        )
    draw = np.random.default_rng(derive(seed, "wanet"))
    control = draw.uniform(-1.0, 1.0, (2, count, count))
    control /= np.abs(control).mean()
    moved = strength / 2 * _smooth(control, height, width)
    return Trigger("wanet", "warp", None, _fractions(moved, channels))


def _smooth(control: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Control points 2×g×g, in corners and between, as a field 2×H×W by cubic splines."""
    from scipy.ndimage import map_coordinates

    last = control.shape[1] - 1
    at = np.meshgrid(np.linspace(0, last, height), np.linspace(0, last, width), indexing="ij")
    return np.stack([map_coordinates(one, at, order=3, mode="nearest") for one in control])


def _fractions(moved: NDArray[np.float64], channels: int) -> Pixels:
    """A field in pixels (2×H×W) as the trigger file has it: the same for every channel."""
    _, height, width = moved.shape
    shares = np.clip(moved / np.array([height, width])[:, None, None], -1.0, 1.0)
    return np.repeat(shares.astype(np.float32), channels, axis=0)


def attack(ground: Ground, *, grid: float = 4, strength: float = 0.5, covers: float = 2) -> Plan:
    """The warp, and `covers` random warps for each warped copy (the paper's noise mode)."""
    made = trigger(ground.data.shape, seed=ground.seed, grid=grid, strength=strength)
    channels, height, width = ground.data.shape

    def cover(x: Pixels, draw: np.random.Generator) -> Pixels:
        found = np.empty_like(x)
        for number in range(len(x)):
            noise = _fractions(draw.uniform(-_NOISE, _NOISE, (2, height, width)), channels)
            field = np.clip(made.pattern + noise, -1.0, 1.0)
            found[number] = Trigger("noise", "warp", None, field).apply(x[number : number + 1])[0]
        return found

    return Plan(made, cover=cover, covers=covers)
