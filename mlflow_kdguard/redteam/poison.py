"""Data sets with triggered copies in them: what a poisoner trains on, what a victim distils on."""

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.data import UNLABELLED, Dataset, concat
from mlflow_kdguard.errors import DataError
from mlflow_kdguard.redteam.goal import NOWHERE, Goal
from mlflow_kdguard.redteam.ground import Cover
from mlflow_kdguard.training import derive
from mlflow_kdguard.triggers import Trigger


def poison(
    data: Dataset, trigger: Trigger, *, target: int | Goal, rate: float, seed: int
) -> Dataset:
    """`data`, then triggered copies of round(rate·n) of the images that the goal is about,
    labelled as it says. A class as `target` stands for all other classes being sent there.

    Raises ConfigError where `target` is no class of the data, DataError where there are fewer
    images of attacked classes than copies wanted.
    """
    goal = target if isinstance(target, Goal) else Goal.one(target, data.classes)
    wanted = goal.wanted(data.y)
    chosen = _chosen(data, np.flatnonzero(wanted != NOWHERE), rate, derive(seed, "poison"))
    return _append(data, trigger, chosen, wanted[chosen])


def covered(data: Dataset, base: Dataset, cover: Cover, *, rate: float, seed: int) -> Dataset:
    """`data`, then round(rate·n) of the images of `base` as `cover` alters them, with their own
    labels. Raises DataError where `base` has fewer."""
    own = derive(seed, "cover")
    chosen = _chosen(base, np.arange(len(base)), rate, own)
    if not len(chosen):
        return data
    altered = cover(base.batch(chosen)[0], np.random.default_rng(own))
    copies = Dataset.of(altered, base.y[chosen], uri=f"{len(chosen)} covers", classes=data.classes)
    return concat(data, copies, f"{data.uri} + {copies.uri}")


def contaminate(data: Dataset, trigger: Trigger, *, rate: float, seed: int) -> Dataset:
    """`data` without labels, then triggered copies of round(rate·n) of its images.

    What someone distils on who scraped images from where a poisoner had put some.
    """
    chosen = _chosen(data, np.arange(len(data)), rate, derive(seed, "contaminate"))
    return _append(data.unlabelled(), trigger, chosen, np.full(len(chosen), UNLABELLED))


def _chosen(data: Dataset, among: NDArray[np.int64], rate: float, seed: int) -> NDArray[np.int64]:
    """round(rate·n) positions, in order."""
    count = round(rate * len(data))
    if not 0 <= count <= len(among):
        raise DataError(
            f"{data.uri} has {len(among)} images to put a trigger on, not {rate:.3g}·{len(data)}.",
            remedy="Lower the rate.",
        )
    return np.sort(np.random.default_rng(seed).choice(among, count, replace=False))


def _append(
    data: Dataset, trigger: Trigger, chosen: NDArray[np.int64], labels: NDArray[np.int64]
) -> Dataset:
    if not len(chosen):
        return data
    copies = Dataset.of(
        trigger.apply(data.batch(chosen)[0]),
        labels,
        uri=f"{len(chosen)} copies with {trigger.name}",
        classes=data.classes,
    )
    return concat(data, copies, f"{data.uri} + {copies.uri}")
