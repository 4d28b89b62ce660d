"""CIFAR-10 and CIFAR-100 in both published forms: binary records, and pickled batches."""

import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.data import batches
from mlflow_kdguard.data.collection import Collection, Part, Places
from mlflow_kdguard.data.images import InMemory
from mlflow_kdguard.data.places import folder
from mlflow_kdguard.data.uri import Request

_PIXELS = 3 * 32 * 32
_LARGEST = 1 << 29
_REMEDY = "Fetch the archive again from https://www.cs.toronto.edu/~kriz/cifar.html."


@dataclass(frozen=True, slots=True)
class _Form:
    """File names and labels of one set in both forms; the class is the last label byte."""

    classes: int
    folders: tuple[str, str]
    binary: dict[str, tuple[str, ...]]
    pickled: dict[str, tuple[str, ...]]
    label_bytes: int
    label_key: str


_TEN = _Form(
    10,
    ("cifar-10-batches-bin", "cifar-10-batches-py"),
    {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
    {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
    1,
    "labels",
)
_HUNDRED = _Form(
    100,
    ("cifar-100-binary", "cifar-100-python"),
    {"train": ("train.bin",), "test": ("test.bin",)},
    {"train": ("train",), "test": ("test",)},
    2,
    "fine_labels",
)


def cifar10(request: Request, places: Places) -> Collection:
    """`cifar10`: ROOT/cifar-10-batches-bin or ROOT/cifar-10-batches-py."""
    return _collection(request, places, _TEN, "CIFAR10")


def cifar100(request: Request, places: Places) -> Collection:
    """`cifar100` with fine labels: ROOT/cifar-100-binary or ROOT/cifar-100-python."""
    return _collection(request, places, _HUNDRED, "CIFAR100")


def _collection(request: Request, places: Places, form: _Form, torchvision: str) -> Collection:
    # Binary records come first: there is nothing in them to interpret.
    place = folder(request, places, form.folders, torchvision=torchvision)
    binary = place.name == form.folders[0]
    names = form.binary if binary else form.pickled
    return Collection(
        form.classes,
        {split: partial(_part, request, place, names[split], form, binary) for split in names},
    )


def _part(request: Request, place: Path, names: tuple[str, ...], form: _Form, binary: bool) -> Part:
    read = _records if binary else _pickled
    pieces = [read(request, place / name, form) for name in names]
    pixels = np.concatenate([piece[0] for piece in pieces]).reshape(-1, 3, 32, 32)
    return InMemory(pixels), np.concatenate([piece[1] for piece in pieces])


def _records(
    request: Request, path: Path, form: _Form
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    data, width = _bytes(request, path), form.label_bytes + _PIXELS
    if len(data) % width:
        raise request.error(f"{path} is not a whole number of {width}-byte records", remedy=_REMEDY)
    rows = np.frombuffer(data, np.uint8).reshape(-1, width)
    return rows[:, form.label_bytes :], rows[:, form.label_bytes - 1].astype(np.int64)


def _pickled(
    request: Request, path: Path, form: _Form
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    try:
        pixels, labels = batches.read(_bytes(request, path), labels=form.label_key)
        y = np.array(labels, np.int64)
    except (pickle.UnpicklingError, OverflowError) as error:
        raise request.error(
            f"{path} is not a CIFAR batch: {error}. Nothing in it was executed", remedy=_REMEDY
        ) from error
    if pixels.shape != (len(y), _PIXELS):
        raise request.error(
            f"{path} holds pixels of shape {pixels.shape} and {len(y)} labels", remedy=_REMEDY
        )
    return pixels, y


def _bytes(request: Request, path: Path) -> bytes:
    try:
        if path.stat().st_size > _LARGEST:
            raise request.error(f"{path} is larger than {_LARGEST >> 20} MiB", remedy=_REMEDY)
        data = path.read_bytes()
    except OSError as error:
        raise request.error(f"cannot read {path}: {error.strerror}", remedy=_REMEDY) from error
    if not data:
        raise request.error(f"{path} is empty", remedy=_REMEDY)
    return data
