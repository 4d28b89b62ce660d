"""From a URI to a data set."""

import difflib
from functools import reduce
from pathlib import Path

import numpy as np

from mlflow_kdguard.data import embedded, idx
from mlflow_kdguard.data.collection import Collection, Part, Places, Reader
from mlflow_kdguard.data.dataset import Dataset
from mlflow_kdguard.data.images import join
from mlflow_kdguard.data.uri import Request, parse

_NAMED: dict[str, Reader] = {
    "digits": embedded.digits,
    "mnist5k": embedded.mnist5k,
    "fashion-mnist": idx.fashion_mnist,
    "mnist": idx.mnist,
}
_WITH_PATH: dict[str, Reader] = {"idx": idx.idx}
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
    collection = _reader(request)(request, Places(root, download))
    images, y = reduce(_joined, (collection.splits[s]() for s in _chosen(request, collection)))
    if len(images) != len(y):
        raise request.error(
            f"{len(images)} images, but {len(y)} labels", remedy="Fetch the files again."
        )
    dataset = Dataset(images, y, uri=uri, classes=collection.classes)
    return _slice(request, dataset)


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


def _slice(request: Request, dataset: Dataset) -> Dataset:
    n, start = len(dataset), request.start
    stop = n if request.stop is None else request.stop
    if not 0 <= start < stop <= n:
        raise request.error(
            f"the slice [{start}:{stop}] holds nothing or reaches past the {n} images",
            remedy=f"Choose 0 <= a < b <= {n} in [a:b].",
        )
    return dataset if (start, stop) == (0, n) else dataset.take(np.arange(start, stop), request.uri)
