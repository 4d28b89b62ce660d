"""Where pixels come from: arrays in memory, or anything that can produce a batch when asked."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Pixels = NDArray[np.float32]
Shape = tuple[int, int, int]


class Images(Protocol):
    """A sequence of images that are read by batches: float32 n×C×H×W in [0,1]."""

    @property
    def shape(self) -> Shape:
        """(C, H, W) of every image."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: Indices) -> Pixels:
        """The images at `indices` (all of them in range), in that order, as a fresh array."""
        ...

    def take(self, indices: Indices) -> "Images":
        """The images at `indices`, without reading them where that can be put off."""
        ...


class InMemory:
    """Images of an array N×C×H×W: float32 in [0,1], or uint8 grey levels that mean level/255."""

    def __init__(self, array: NDArray[np.float32] | NDArray[np.uint8]) -> None:
        self.array = array

    @property
    def shape(self) -> Shape:
        _, c, h, w = self.array.shape
        return c, h, w

    def __len__(self) -> int:
        return len(self.array)

    def read(self, indices: Indices) -> Pixels:
        taken = self.array[indices]
        if taken.dtype == np.uint8:
            return taken.astype(np.float32) / np.float32(255)
        return taken.astype(np.float32, copy=False)

    def take(self, indices: Indices) -> Images:
        return InMemory(self.array[indices])


class Picked:
    """Some images of another source, in a given order; nothing is read until a batch is."""

    def __init__(self, images: Images, indices: Indices) -> None:
        self._images, self._indices = images, indices

    @property
    def shape(self) -> Shape:
        return self._images.shape

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, indices: Indices) -> Pixels:
        return self._images.read(self._indices[indices])

    def take(self, indices: Indices) -> Images:
        return Picked(self._images, self._indices[indices])


class Joined:
    """One source after the other; both have images of one shape."""

    def __init__(self, first: Images, second: Images) -> None:
        self._first, self._second = first, second

    @property
    def shape(self) -> Shape:
        return self._first.shape

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def read(self, indices: Indices) -> Pixels:
        pixels = np.empty((len(indices), *self.shape), np.float32)
        early = indices < len(self._first)
        pixels[early] = self._first.read(indices[early])
        pixels[~early] = self._second.read(indices[~early] - len(self._first))
        return pixels

    def take(self, indices: Indices) -> Images:
        return Picked(self, indices)


def join(first: Images, second: Images) -> Images:
    """`first` then `second`, as one array where both are arrays of one type."""
    if (
        isinstance(first, InMemory)
        and isinstance(second, InMemory)
        and first.array.dtype == second.array.dtype
    ):
        return InMemory(np.concatenate([first.array, second.array]))
    return Joined(first, second)
