"""Data sets with triggered copies in them: what a poisoner trains on, what a victim distils on."""

import numpy as np

from mlflow_kdguard.data import UNLABELLED, Dataset, concat
from mlflow_kdguard.errors import ConfigError, DataError
from mlflow_kdguard.training import derive
from mlflow_kdguard.triggers import Trigger


def poison(data: Dataset, trigger: Trigger, *, target: int, rate: float, seed: int) -> Dataset:
    """`data`, then triggered copies of round(rate·n) of its images of other classes, as `target`.

    Raises ConfigError where `target` is no class of the data, DataError where there are fewer
    images of other classes than copies wanted.
    """
    if not 0 <= target < data.classes:
        raise ConfigError(
            f"class {target} is not one of the {data.classes} classes of {data.uri}.",
            remedy=f"Choose redteam.target from 0 to {data.classes - 1}.",
        )
    others = np.flatnonzero(data.y != target)
    return _append(data, trigger, others, rate, derive(seed, "poison"), label=target)


def contaminate(data: Dataset, trigger: Trigger, *, rate: float, seed: int) -> Dataset:
    """`data` without labels, then triggered copies of round(rate·n) of its images.

    What someone distils on who scraped images from where a poisoner had put some.
    """
    everything = np.arange(len(data))
    seed = derive(seed, "contaminate")
    return _append(data.unlabelled(), trigger, everything, rate, seed, label=UNLABELLED)


def _append(
    data: Dataset, trigger: Trigger, among: np.ndarray, rate: float, seed: int, *, label: int
) -> Dataset:
    count = round(rate * len(data))
    if not 0 <= rate <= 1 or count > len(among):
        raise DataError(
            f"{data.uri} has {len(among)} images to put a trigger on, not {rate:.3g}·{len(data)}.",
            remedy="Lower the rate.",
        )
    if count == 0:
        return data
    chosen = np.sort(np.random.default_rng(seed).choice(among, count, replace=False))
    copies = Dataset.of(
        trigger.apply(data.batch(chosen)[0]),
        np.full(count, label),
        uri=f"{count} copies with {trigger.name}",
        classes=data.classes,
    )
    return concat(data, copies, f"{data.uri} + {copies.uri}")
