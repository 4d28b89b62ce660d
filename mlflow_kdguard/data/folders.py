"""Data sets of image files: `imagefolder:DIR`, `imagenet`, `gtsrb`, `flowers102`.

Files are listed in torchvision's order, so that index i is the same image in both.
"""

import csv
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.data.collection import Collection, Part, Places
from mlflow_kdguard.data.pictures import Pictures
from mlflow_kdguard.data.places import folder
from mlflow_kdguard.data.uri import Request

_IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_LAYOUT = "Lay it out as DIR/CLASS/IMAGE.png, or DIR/train/CLASS/… and DIR/test/CLASS/…."
_GTSRB_CLASSES = 43
_FLOWERS_CLASSES = 102
_FLOWERS_SPLITS = {"train": "trnid", "val": "valid", "test": "tstid"}


def imagefolder(request: Request, _places: Places) -> Collection:
    """`imagefolder:DIR`: a folder a class; DIR/train and DIR/test are splits where present."""
    assert request.path is not None
    if not request.path.is_dir():
        raise request.error(f"{request.path} is not a folder", remedy=_LAYOUT)
    # A class folder holds images, a split folder holds class folders.
    halves = {s: request.path / s for s in ("train", "test") if _folders(request.path / s)}
    return _by_class(request, halves or {"": request.path}, request.size)


def imagenet(request: Request, places: Places) -> Collection:
    """`imagenet`: ROOT/imagenet/train/WNID/… and …/val/WNID/… (or without `imagenet/`)."""
    candidates = ["imagenet/train", "imagenet/val", "train", "val"]
    base = folder(request, places, candidates, torchvision=None).parent
    halves = {"train": base / "train", "test": base / "val"}
    present = {split: place for split, place in halves.items() if place.is_dir()}
    return _by_class(request, present, request.size or 224)


def gtsrb(request: Request, places: Places) -> Collection:
    """`gtsrb`: ROOT/gtsrb/GTSRB/Training/CLASS/*.ppm, Final_Test/Images and GT-final_test.csv."""
    base = folder(request, places, ["gtsrb/GTSRB"], torchvision="GTSRB").parent
    return Collection(
        _GTSRB_CLASSES,
        {
            "train": partial(_gtsrb_train, request, base),
            "test": partial(_gtsrb_test, request, base),
        },
    )


def flowers102(request: Request, places: Places) -> Collection:
    """`flowers102`: ROOT/flowers-102 with jpg/, imagelabels.mat and setid.mat."""
    base = folder(request, places, ["flowers-102/jpg"], torchvision="Flowers102").parent
    return Collection(
        _FLOWERS_CLASSES,
        {split: partial(_flowers, request, base, split) for split in _FLOWERS_SPLITS},
    )


def _by_class(request: Request, halves: dict[str, Path], size: int | None) -> Collection:
    """Splits that share one list of classes, that of the first."""
    classes = _folders(next(iter(halves.values())))
    for split, place in halves.items():
        if strange := sorted(set(_folders(place)) - set(classes)):
            raise request.error(
                f"#{split} has the class {strange[0]!r}, which {next(iter(halves))} lacks",
                remedy="Labels follow the sorted class folders: give both splits the same ones.",
            )
    if not classes:
        raise request.error(f"{next(iter(halves.values()))} holds no class folders", remedy=_LAYOUT)
    read: Callable[[Path], Part] = partial(_class_folders, request, size, classes)
    return Collection(
        len(classes), {split: partial(read, place) for split, place in halves.items()}
    )


def _class_folders(request: Request, size: int | None, classes: Sequence[str], place: Path) -> Part:
    paths: list[Path] = []
    y: list[int] = []
    for label, name in enumerate(classes):
        if not (place / name).is_dir():
            continue
        found = _listed(place / name, _IMAGES)
        if not found:
            raise request.error(f"the class folder {place / name} holds no images", remedy=_LAYOUT)
        paths += found
        y += [label] * len(found)
    return Pictures(request, paths, size), np.array(y, np.int64)


def _gtsrb_train(request: Request, base: Path) -> Part:
    place = base / "GTSRB" / "Training"
    paths: list[Path] = []
    y: list[int] = []
    for name in _folders(place):
        if not name.isascii() or not name.isdigit():
            raise request.error(f"{place / name} is not a class number", remedy="Unpack it again.")
        found = _listed(place / name, (".ppm",))
        paths += found
        y += [int(name)] * len(found)
    return _numbered(request, place, paths, y, default=32)


def _gtsrb_test(request: Request, base: Path) -> Part:
    place, table = base / "GTSRB" / "Final_Test" / "Images", base / "GT-final_test.csv"
    try:
        with table.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter=";", skipinitialspace=True))
        names, y = [row["Filename"] for row in rows], [int(row["ClassId"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise request.error(
            f"cannot read {table}: {error!r}", remedy="Unpack GTSRB_Final_Test_GT.zip there."
        ) from error
    if strange := [name for name in names if not name or Path(name).name != name]:
        raise request.error(
            f"{table} names {strange[0]!r}, which is no file name", remedy="Unpack it again."
        )
    return _numbered(request, place, [place / name for name in names], y, default=32)


def _flowers(request: Request, base: Path, split: str) -> Part:
    labels = _matrix(request, base / "imagelabels.mat", "labels")
    numbers = _matrix(request, base / "setid.mat", _FLOWERS_SPLITS[split])
    if numbers.size and not 1 <= numbers.min() <= numbers.max() <= len(labels):
        raise request.error(
            f"setid.mat names images beyond the {len(labels)} labels", remedy="Fetch both again."
        )
    paths = [base / "jpg" / f"image_{number:05d}.jpg" for number in numbers]
    return _numbered(request, base / "jpg", paths, list(labels[numbers - 1] - 1), default=224)


def _matrix(request: Request, path: Path, key: str) -> NDArray[np.int64]:
    from scipy.io import loadmat

    try:
        value = np.asarray(loadmat(path, variable_names=[key])[key])
    except Exception as error:
        # Broken MATLAB files make the parser fail in any way it likes.
        raise request.error(
            f"cannot read {key} of {path}: {error}", remedy="Fetch the file again."
        ) from error
    if value.dtype.kind not in "iu":
        raise request.error(f"{key} of {path} is not of integers", remedy="Fetch it again.")
    return value.ravel().astype(np.int64)


def _numbered(
    request: Request, place: Path, paths: Sequence[Path], y: Sequence[int], *, default: int
) -> Part:
    if not paths:
        raise request.error(f"{place} holds no images", remedy="Unpack the archive again.")
    return Pictures(request, paths, request.size or default), np.array(y, np.int64)


def _folders(place: Path) -> list[str]:
    return (
        sorted(entry.name for entry in place.iterdir() if entry.is_dir()) if place.is_dir() else []
    )


def _listed(place: Path, endings: tuple[str, ...]) -> list[Path]:
    return [
        Path(folder_, name)
        for folder_, _, names in sorted(os.walk(place, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(endings)
    ]
