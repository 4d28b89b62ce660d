"""From a URI to a data set."""

import difflib
from functools import reduce
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.data import cifar, embedded, folders, idx
from mlflow_kdguard.data.collection import Collection, Part, Places, Reader
from mlflow_kdguard.data.dataset import UNLABELLED, Dataset
from mlflow_kdguard.data.images import Images, join
from mlflow_kdguard.data.npz import npz
from mlflow_kdguard.data.uri import Request, parse

_NAMED: dict[str, Reader] = {
    "digits": embedded.digits,
    "mnist5k": embedded.mnist5k,
    "fashion-mnist": idx.fashion_mnist,
    "mnist": idx.mnist,
    "cifar10": cifar.cifar10,
    "cifar100": cifar.cifar100,
    "gtsrb": folders.gtsrb,
    "flowers102": folders.flowers102,
    "imagenet": folders.imagenet,
}
_WITH_PATH: dict[str, Reader] = {
    "idx": idx.idx,
    "imagefolder": folders.imagefolder,
    "npz": npz,
}
_RESIZED = ("imagefolder", "imagenet", "gtsrb", "flowers102")

SOURCES = (*_NAMED, *_WITH_PATH)
"""Every name that a URI may begin with."""


def load(uri: str, *, root: Path | None = None, download: bool = False) -> Dataset:
    """The images that `uri` names.

    `root` is the folder of torchvision data sets; `download` lets torchvision fetch what is not
    there. Raises DataError naming the URI and the remedy; image folders are decoded by the batch,
    so that a broken file shows when it is read.
    """
    request = parse(uri)
    try:
        collection = _reader(request)(request, Places(root, download))
        images, y = reduce(_joined, (collection.splits[s]() for s in _chosen(request, collection)))
    except OSError as error:
        raise request.error(f"cannot read it: {error}", remedy="Check the path.") from error
    _check(request, images, y, collection.classes)
    whole = Dataset(images, y, uri=uri, classes=collection.classes)
    return _slice(request, _ordered(request, whole) if request.shuffled else whole)


def _check(request: Request, images: Images, y: NDArray[np.int64], classes: int) -> None:
    if len(images) != len(y):
        raise request.error(
            f"{len(images)} images, but {len(y)} labels", remedy="Fetch the files again."
        )
    # Only npz can say that an image is unlabelled; elsewhere a negative class is a broken file.
    lowest = UNLABELLED if request.name == "npz" else 0
    if len(y) and not lowest <= y.min() <= y.max() < classes:
        raise request.error(
            f"labels range from {y.min()} to {y.max()}, outside {lowest} to {classes - 1}",
            remedy="Fetch the files again, or repair the labels.",
        )


def _reader(request: Request) -> Reader:
    table = _NAMED if request.path is None else _WITH_PATH
    if request.name not in table:
        raise _unknown(request)
    if request.size is not None and request.name not in _RESIZED:
        raise request.error(
            f"images of {request.name} all have one size",
            remedy=f"Leave ?size= out; it belongs to {', '.join(_RESIZED)}.",
        )
    return table[request.name]


def _unknown(request: Request) -> Exception:
    known = f"Known: {', '.join(_NAMED)}, {', '.join(f'{name}:PATH' for name in _WITH_PATH)}."
    if request.name in _WITH_PATH:
        return request.error(f"{request.name} needs a path", remedy=f"{request.name}:PATH. {known}")
    if request.name in _NAMED:
        return request.error(
            f"{request.name} takes no path", remedy=f"Write {request.name}, and --data-root DIR."
        )
    close = difflib.get_close_matches(request.name, SOURCES, n=1)
    hint = f"Did you mean {close[0]}? " if close else ""
    return request.error(f"there is no data set called {request.name!r}", remedy=hint + known)


def _chosen(request: Request, collection: Collection) -> tuple[str, ...]:
    if not request.split:
        return tuple(collection.splits)
    if request.split not in collection.splits:
        names = [f"#{name}" for name in collection.splits if name]
        raise request.error(
            f"there is no split #{request.split}",
            remedy=f"It has {', '.join(names)}." if names else "It has no splits: leave it out.",
        )
    return (request.split,)


def _joined(first: Part, second: Part) -> Part:
    return join(first[0], second[0]), np.concatenate([first[1], second[1]])


def _ordered(request: Request, dataset: Dataset) -> Dataset:
    """In a fixed order that says nothing of classes: a slice of it is a sample."""
    order = embedded.permutation(f"{request.name}#{request.split}", len(dataset))
    return dataset.take(order, request.uri)


def _slice(request: Request, dataset: Dataset) -> Dataset:
    n, start = len(dataset), request.start
    stop = n if request.stop is None else request.stop
    if not 0 <= start < stop <= n:
        raise request.error(
            f"the slice [{start}:{stop}] holds nothing or reaches past the {n} images",
            remedy=f"Choose 0 <= a < b <= {n} in [a:b].",
        )
    return dataset if (start, stop) == (0, n) else dataset.take(np.arange(start, stop), request.uri)
