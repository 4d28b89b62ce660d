"""What every reader returns: named splits, each read only when it is asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.data.images import Images
from mlflow_kdguard.data.uri import Request

Part = tuple[Images, NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Collection:
    """A data set as it lies there: number of classes, and its splits in order.

    A set without splits has the single split "".
    """

    classes: int
    splits: Mapping[str, Callable[[], Part]]


@dataclass(frozen=True, slots=True)
class Places:
    """Where readers may look, and whether they may download."""

    root: Path | None = None
    download: bool = False


Reader = Callable[[Request, Places], Collection]
