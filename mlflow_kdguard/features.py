"""Feature variance, in the three readings of RobustKD's loss (arXiv:2406.03409).

The paper does not print the formula of its variance term L_f; these are the readings that its text
allows. All are population variances (divided by the count), so that they are exact quadratic forms
of the features. A tap without spatial axes (a hidden linear layer, N×C) counts as N×C×1×1.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

from torch import Tensor

from mlflow_kdguard.errors import UsageError

Reading = Literal["A", "B", "C"]
READINGS: tuple[Reading, ...] = ("A", "B", "C")


def within_map(features: Tensor) -> Tensor:
    """A: mean over images of the variance over channels and places. N×C×H×W -> scalar."""
    return features.flatten(1).var(dim=1, correction=0).mean()


def between_channels(features: Tensor) -> Tensor:
    """B: mean over images of the variance over channels of the spatial mean. -> scalar."""
    return features.reshape(*features.shape[:2], -1).mean(dim=2).var(dim=1, correction=0).mean()


def over_batch(features: Tensor) -> Tensor:
    """C: mean over elements of the variance over the images of the batch. -> scalar."""
    return features.var(dim=0, correction=0).mean()


_FORMULAS = {"A": within_map, "B": between_channels, "C": over_batch}


def variance(features: Tensor, reading: Reading) -> Tensor:
    """The chosen reading of the variance of one tap's features, N×C or N×C×H×W -> scalar."""
    if features.dim() < 2 or features.shape[0] == 0:
        raise UsageError(
            f"features of shape {tuple(features.shape)} have no channels to vary over.",
            remedy="Tap a layer whose output is N×C or N×C×H×W (detox.layers).",
        )
    return _FORMULAS[reading](features)


def total(features: Mapping[str, Tensor] | Iterable[Tensor], reading: Reading) -> Tensor:
    """Sum of the variance over all taps -> scalar."""
    maps = features.values() if isinstance(features, Mapping) else features
    values = [variance(each, reading) for each in maps]
    if not values:
        raise UsageError("no layer is tapped.", remedy="Name at least one (detox.layers).")
    result = values[0]
    for value in values[1:]:
        result = result + value
    return result
