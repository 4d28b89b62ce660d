"""IDX files (MNIST's format), plain or gzipped: `idx:DIR`, `mnist`, `fashion-mnist`.

Format: two zero bytes, type 0x08 (unsigned byte), number of dimensions, then the big-endian
dimensions and the bytes (http://yann.lecun.com/exdb/mnist).
"""

import gzip
import struct
import zlib
from functools import partial
from io import BufferedIOBase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.data.collection import Collection, Part, Places
from mlflow_kdguard.data.images import InMemory
from mlflow_kdguard.data.places import folder
from mlflow_kdguard.data.uri import Request

_FILES = {"train": "train", "test": "t10k"}
_LARGEST = 1 << 33
_DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
_REMEDY = "Fetch the file again, or name a folder with Fashion-MNIST's four IDX files."


def idx(request: Request, _places: Places) -> Collection:
    """`idx:DIR`: a folder with Fashion-MNIST's file names; classes = largest label + 1."""
    assert request.path is not None
    place = request.path
    if not place.is_dir():
        raise request.error(f"{place} is not a folder", remedy="Check the path.")
    present = [split for split in _FILES if _find(place, split, "images") is not None]
    if not present:
        raise request.error(f"there is no train-images-idx3-ubyte[.gz] in {place}", remedy=_REMEDY)
    largest = max(int(_labels(request, place, split).max(initial=-1)) for split in present)
    return _collection(request, place, largest + 1, present)


def mnist(request: Request, places: Places) -> Collection:
    """`mnist`: torchvision's files under ROOT/MNIST/raw."""
    place = folder(request, places, ["MNIST/raw"], torchvision="MNIST")
    return _collection(request, place, 10, list(_FILES))


def fashion_mnist(request: Request, places: Places) -> Collection:
    """`fashion-mnist`: ROOT/FashionMNIST/raw, or without a root Debian's dataset-fashion-mnist."""
    if places.root is None and not places.download and _DEBIAN_FASHION.is_dir():
        return _collection(request, _DEBIAN_FASHION, 10, list(_FILES))
    place = folder(request, places, ["FashionMNIST/raw"], torchvision="FashionMNIST")
    return _collection(request, place, 10, list(_FILES))


def _collection(request: Request, place: Path, classes: int, splits: list[str]) -> Collection:
    return Collection(classes, {split: partial(_part, request, place, split) for split in splits})


def _part(request: Request, place: Path, split: str) -> Part:
    images = _array(request, place, split, "images", 3)
    return InMemory(images[:, None]), _labels(request, place, split)


def _labels(request: Request, place: Path, split: str) -> NDArray[np.int64]:
    return _array(request, place, split, "labels", 1).astype(np.int64)


def _find(place: Path, split: str, kind: str) -> Path | None:
    stem = f"{_FILES[split]}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    found = [path for path in (place / stem, place / f"{stem}.gz") if path.is_file()]
    return found[0] if found else None


def _array(
    request: Request, place: Path, split: str, kind: str, dimensions: int
) -> NDArray[np.uint8]:
    path = _find(place, split, kind)
    if path is None:
        name = f"{_FILES[split]}-{kind}-idx{dimensions}-ubyte"
        raise request.error(f"there is no {name}[.gz] in {place}", remedy=_REMEDY)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            return _read(request, path, file, dimensions)
    except (OSError, EOFError, zlib.error) as error:
        raise request.error(f"cannot read {path}: {error}", remedy=_REMEDY) from error


def _read(request: Request, path: Path, file: BufferedIOBase, dimensions: int) -> NDArray[np.uint8]:
    header = file.read(4 + 4 * dimensions)
    if header[:4] != bytes([0, 0, 8, dimensions]):
        raise request.error(
            f"{path} begins with {header[:4].hex()}, not {bytes([0, 0, 8, dimensions]).hex()}: "
            f"not an IDX file of {dimensions}-dimensional bytes",
            remedy=_REMEDY,
        )
    if len(header) < 4 + 4 * dimensions:
        raise request.error(f"{path} ends inside its header", remedy=_REMEDY)
    shape = struct.unpack(f">{dimensions}I", header[4:])
    size = int(np.prod(shape, dtype=object))
    if size > _LARGEST or 0 in shape[1:]:
        raise request.error(f"{path} claims the shape {shape}", remedy=_REMEDY)
    # One byte more than declared, so that trailing bytes show without reading a whole bomb.
    data = file.read(size + 1)
    if len(data) != size:
        found = "more" if len(data) > size else len(data)
        raise request.error(f"{path} declares {size} bytes and holds {found}", remedy=_REMEDY)
    return np.frombuffer(data, np.uint8).reshape(shape)
