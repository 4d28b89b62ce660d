"""Gaussian noise on images, as a smoothed network is asked: one way for certifier and server.

A noisy image is clip(round(x + σ·z)) with z ~ N(0, I), rounded to multiples of `GRID` and clipped
to [0, 1]. Both steps come before the network, so that they belong to what is smoothed, and every
noisy pixel is exact in float32 and of the same grid whatever the image: low bits that betray the
image behind the noise (Voráček and Hein, "Sound randomized smoothing in floating-point
arithmetics", ICLR 2023) are gone.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.files import sha256

GRID = 2.0**-20
"""Distance of neighbouring values of a noisy pixel."""
BLOCK = 256
"""Noisy copies at a time."""
LARGEST_BLOCK = 2**24
"""Numbers of noise that are held at a time, where an image has fewer."""
_CELL = 2.0**-28

Floats = NDArray[np.float32]


def generator(*parts: str) -> np.random.Generator:
    """The random numbers that follow from `parts`; others follow from any other parts."""
    return np.random.Generator(np.random.PCG64(int(sha256("\x1f".join(parts).encode()), 16)))


def noisy(
    image: Floats, *, sigma: float, draws: int, random: np.random.Generator
) -> Iterator[Floats]:
    """`draws` noisy copies of an image C×H×W, BLOCK or fewer at a time: float32 n×C×H×W.

    Where one ends and the next begins depends on the image's size alone, so that sums of a block
    are the same whatever batches a runtime takes.
    """
    step = max(1, min(BLOCK, LARGEST_BLOCK // image.size))
    pixels = image.astype(np.float64)
    for start in range(0, draws, step):
        z = random.standard_normal((min(step, draws - start), *image.shape))
        z *= sigma
        z += pixels
        np.rint(z / GRID, out=z)
        z *= GRID
        yield np.clip(z, 0.0, 1.0, out=z).astype(np.float32)


def slack(pixels: int, sigma: float) -> float:
    """By how much a probability under N(0, σ²I) may exceed that under what `noisy` draws.

    A double of the generator stands for an interval of numbers that is at most 2⁻⁵⁰ wide, and
    x + σz is rounded by less; a cell of the grid is 2⁻²⁰ wide. So a pixel's distribution on the
    grid is off by at most max(1, σ)·2⁻²⁸ in total variation, with room, and an image's by as
    many times that as it has pixels. That the generator's numbers are as good as independent is
    taken for granted.
    """
    return pixels * max(1.0, sigma) * _CELL
