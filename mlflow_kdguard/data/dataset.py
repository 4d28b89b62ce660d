"""Labelled images with a content digest that does not depend on the container they came in."""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlflow_kdguard.data.images import Images, Indices, InMemory, Pixels, Shape, join
from mlflow_kdguard.errors import DataError

UNLABELLED = -1
"""The label of an image whose class is not known."""

_CHUNK = 256


class Dataset:
    """Images, labels and where they come from.

    `y` is int64 with -1 for unlabelled images; `classes` is the number of classes, 0 where no
    label is known at all. Arrays that a data set hands out are not to be written to: the digest
    is computed once.
    """

    def __init__(self, images: Images, y: NDArray[np.int64], *, uri: str, classes: int) -> None:
        self._images = images
        self.y = np.ascontiguousarray(y, np.int64)
        self.uri = uri
        self.classes = classes
        self._x: Pixels | None = None
        self._sha256: str | None = None
        self._check()

    @classmethod
    def of(cls, x: ArrayLike, y: ArrayLike | None, *, uri: str, classes: int) -> "Dataset":
        """A data set of arrays: `x` N×C×H×W in [0,1] (float, or uint8 grey levels), `y` N.

        `y` None means that nothing is labelled. Raises DataError where shapes, types or ranges
        do not fit.
        """
        array = np.asarray(x)
        if array.ndim != 4 or 0 in array.shape[1:]:
            raise _bad(uri, f"images have shape {array.shape}, not N×C×H×W")
        if array.dtype != np.uint8:
            array = unit_pixels(array, uri)
        labels = np.full(len(array), UNLABELLED) if y is None else np.asarray(y)
        if labels.dtype.kind not in "iu":
            raise _bad(uri, f"labels have type {labels.dtype}, not int64")
        return cls(InMemory(array), labels.astype(np.int64), uri=uri, classes=classes)

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        return f"Dataset({self.uri!r}, {len(self)} images of {self.shape}, {self.classes} classes)"

    @property
    def shape(self) -> Shape:
        """(C, H, W) of every image."""
        return self._images.shape

    @property
    def x(self) -> Pixels:
        """All images, float32 N×C×H×W in [0,1]; decoded and kept in memory on first use."""
        if self._x is None:
            if isinstance(self._images, InMemory) and self._images.array.dtype == np.float32:
                self._x = np.asarray(self._images.array, np.float32)
            else:
                self._x = self._images.read(np.arange(len(self)))
                self._images = InMemory(self._x)
        return self._x

    @property
    def sha256(self) -> str:
        """Canonical content digest (`docs/reference/data.md`): shape, classes, pixels, labels."""
        if self._sha256 is None:
            digest = hashlib.sha256(b"kdguard.data/1")
            digest.update(struct.pack("<5q", len(self), *self.shape, self.classes))
            for start in range(0, len(self), _CHUNK):
                x, _ = self.batch(np.arange(start, min(start + _CHUNK, len(self))))
                # Adding zero turns -0.0 into 0.0: equal pixels must have equal digests.
                digest.update((x + np.float32(0)).astype("<f4").tobytes())
            digest.update(self.y.astype("<i8").tobytes())
            self._sha256 = digest.hexdigest()
        return self._sha256

    def batch(self, indices: Sequence[int] | Indices) -> tuple[Pixels, NDArray[np.int64]]:
        """Images (float32 n×C×H×W) and labels (int64 n) at `indices`, as fresh arrays."""
        wanted = self._indices(indices)
        return self._images.read(wanted), self.y[wanted]

    def take(self, indices: Sequence[int] | Indices, uri: str | None = None) -> "Dataset":
        """The images at `indices`, in that order; files stay undecoded."""
        wanted = self._indices(indices)
        name = f"{self.uri} ({len(wanted)} of {len(self)} images)" if uri is None else uri
        return Dataset(self._images.take(wanted), self.y[wanted], uri=name, classes=self.classes)

    def unlabelled(self, uri: str | None = None) -> "Dataset":
        """The same images with every label -1."""
        name = f"{self.uri} (unlabelled)" if uri is None else uri
        return Dataset(
            self._images, np.full_like(self.y, UNLABELLED), uri=name, classes=self.classes
        )

    def _indices(self, indices: Sequence[int] | Indices) -> Indices:
        wanted = np.asarray(indices)
        if wanted.size == 0:
            return np.zeros(0, np.int64)
        if wanted.dtype.kind not in "iu" or wanted.ndim != 1:
            raise TypeError(f"indices are a flat sequence of integers, not {wanted.dtype}")
        if wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(f"indices reach outside the {len(self)} images of {self.uri}")
        return wanted.astype(np.int64)

    def _check(self) -> None:
        if self.y.ndim != 1 or len(self._images) != len(self.y):
            raise _bad(self.uri, f"{len(self._images)} images, but labels of shape {self.y.shape}")
        if len(self.y) and (self.y.min() < UNLABELLED or self.y.max() >= self.classes):
            raise _bad(
                self.uri,
                f"labels range from {self.y.min()} to {self.y.max()}, "
                f"outside -1 (unlabelled) to {self.classes - 1}",
            )


def concat(a: Dataset, b: Dataset, uri: str) -> Dataset:
    """`a` then `b`; DataError where image shapes or class counts differ (0 = unknown fits any)."""
    if a.shape != b.shape:
        raise _bad(uri, f"{a.uri} has images of {a.shape}, {b.uri} of {b.shape}")
    if a.classes != b.classes and 0 not in (a.classes, b.classes):
        raise _bad(uri, f"{a.uri} has {a.classes} classes, {b.uri} has {b.classes}")
    labels = np.concatenate([a.y, b.y])
    classes = max(a.classes, b.classes)
    return Dataset(join(a._images, b._images), labels, uri=uri, classes=classes)


def unit_pixels(array: NDArray[np.generic], uri: str) -> Pixels:
    """`array` as float32; DataError unless it is of floats in [0,1]."""
    if array.dtype.kind != "f":
        raise _bad(uri, f"pixels have type {array.dtype}, not float32")
    pixels = np.ascontiguousarray(array, np.float32)
    # Written so that NaN fails too: every comparison with NaN is false.
    if pixels.size and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise _bad(uri, f"pixels range from {pixels.min()} to {pixels.max()}, not within [0,1]")
    return pixels


def _bad(uri: str, what: str) -> DataError:
    return DataError(
        f"data {uri}: {what}.",
        remedy="Images are float32 N×C×H×W in [0,1]; labels are int64, -1 for unlabelled.",
    )
