"""`npz:FILE`: NumPy archives, read member by member and never unpickled."""

import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from mlflow_kdguard.data.collection import Collection, Part, Places
from mlflow_kdguard.data.dataset import unit_pixels
from mlflow_kdguard.data.images import InMemory
from mlflow_kdguard.data.uri import Request

_LARGEST = 1 << 33
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_REMEDY = (
    "Write it with numpy.savez(FILE, x=…, y=…): x float32 N×C×H×W in [0,1], y int64 with -1 for "
    "unlabelled; or x_train, y_train, x_test, y_test. Optionally classes, an int64 scalar."
)


def npz(request: Request, _places: Places) -> Collection:
    """`x` and `y`, or `x_train`, `y_train`, `x_test`, `y_test`; optionally `classes`.

    Without `classes`, the number of classes is the largest label of the whole file + 1.
    """
    assert request.path is not None
    path = request.path
    members = _members(request, path)
    suffixes = _suffixes(request, members)
    labels = {suffix: _labels(request, path, f"y{suffix}") for suffix in suffixes}
    classes = max(int(y.max(initial=-1)) for y in labels.values()) + 1
    if "classes" in members:
        classes = _classes(request, path)
    return Collection(
        classes,
        {s.removeprefix("_"): partial(_part, request, path, s, labels[s]) for s in suffixes},
    )


def _members(request: Request, path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise request.error(f"cannot read {path}: {reason}", remedy=_REMEDY) from error
    if len(set(names)) != len(names):
        raise request.error(f"{path} holds two members of one name", remedy=_REMEDY)
    return {name.removesuffix(".npy") for name in names}


def _suffixes(request: Request, members: set[str]) -> tuple[str, ...]:
    flat, halves = {"x", "y"} <= members, {"x_train", "y_train", "x_test", "y_test"} <= members
    if flat == halves:
        what = "both a flat and a split set" if flat else "neither x, y nor x_train … y_test"
        raise request.error(f"it holds {what}: {', '.join(sorted(members))}", remedy=_REMEDY)
    return ("",) if flat else ("_train", "_test")


def _part(request: Request, path: Path, suffix: str, y: NDArray[np.int64]) -> Part:
    x = _array(request, path, f"x{suffix}")
    if x.dtype != np.float32 or x.ndim != 4 or 0 in x.shape[1:]:
        raise request.error(f"x{suffix} is {x.dtype} of shape {x.shape}", remedy=_REMEDY)
    return InMemory(unit_pixels(x, request.uri)), y


def _labels(request: Request, path: Path, key: str) -> NDArray[np.int64]:
    y = _array(request, path, key)
    if y.dtype != np.int64 or y.ndim != 1:
        raise request.error(f"{key} is {y.dtype} of shape {y.shape}", remedy=_REMEDY)
    return y.astype(np.int64)


def _classes(request: Request, path: Path) -> int:
    array = _array(request, path, "classes")
    value = int(array.item()) if array.dtype == np.int64 and array.shape == () else -1
    if not 0 <= value < 1 << 31:
        raise request.error("classes is not one non-negative int64", remedy=_REMEDY)
    return value


def _array(request: Request, path: Path, key: str) -> NDArray[np.generic]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
            version = npy.read_magic(file)
            if version not in _HEADERS:
                raise ValueError(f"its format version {version} is unknown")
            shape, fortran, dtype = _HEADERS[version](file)
            size = _size(shape, dtype)
            data = file.read(size + 1)  # one more than declared: trailing bytes show
    except (
        *(OSError, EOFError, KeyError, ValueError, MemoryError, NotImplementedError),
        *(RuntimeError, zipfile.BadZipFile, zlib.error),
    ) as error:
        raise request.error(f"cannot read {key} of {path}: {error}", remedy=_REMEDY) from error
    if len(data) != size:
        raise request.error(f"{key} of {path} is not as long as it declares", remedy=_REMEDY)
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return array.astype(dtype.newbyteorder("="))


def _size(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> int:
    if dtype.hasobject or dtype.kind not in "biuf":
        raise ValueError(f"its type is {dtype}: objects would have to be unpickled")
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if not 0 <= size <= _LARGEST or any(side < 0 for side in shape):
        raise ValueError(f"its shape {shape} is too large")
    return size
