"""BadNets (Gu et al., arXiv 1708.06733): a small square, of one grey value or of noise."""

import numpy as np

from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.redteam.ground import still
from mlflow_kdguard.training import derive
from mlflow_kdguard.triggers import Trigger


def trigger(
    shape: tuple[int, int, int],
    *,
    seed: int = 0,
    size: float = 3,
    value: float = 1.0,
    noise: float = 0.0,
    row: float | None = None,
    column: float | None = None,
) -> Trigger:
    """A `size`×`size` square of `value` (grey, in [0,1]) whose top left pixel is (row, column).

    By default it ends two pixels from the right and bottom edges: rows 23 to 25 of 28. A share of
    `noise` of its content is uniform noise, fixed by `seed`. Raises ConfigError where the square
    leaves images of `shape` (C, H, W), or value or noise [0,1].
    """
    _, height, width = shape
    side = int(size)
    top = height - side - 2 if row is None else int(row)
    left = width - side - 2 if column is None else int(column)
    inside = side >= 1 and 0 <= top <= height - side and 0 <= left <= width - side
    if not inside or not 0 <= value <= 1 or not 0 <= noise <= 1:
        raise ConfigError(
            f"a square of {side} pixels of value {value:g} and noise {noise:g} at ({top}, {left}) "
            f"does not fit images of {height}×{width}.",
            remedy="Change redteam.options: size, value and noise (0 to 1), row, column.",
        )
    mask = np.zeros((1, height, width), np.float32)
    mask[:, top : top + side, left : left + side] = 1
    drawn = np.random.default_rng(derive(seed, "badnets")).random(shape, dtype=np.float32)
    content = np.full(shape, value, np.float32) * np.float32(1 - noise) + np.float32(noise) * drawn
    return Trigger("badnets", "blend", mask, content.clip(0, 1))


attack = still(trigger)
