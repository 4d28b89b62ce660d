"""What an attack is given, and what it makes of it: the two sides of table "attack"."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mlflow_kdguard.data import Dataset
from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.nets.zoo import Classifier
from mlflow_kdguard.records import Progress, silent
from mlflow_kdguard.redteam.goal import Goal
from mlflow_kdguard.training import Loss
from mlflow_kdguard.triggers import Pixels, Trigger

Cover = Callable[[Pixels, np.random.Generator], Pixels]
Tied = Callable[[Loss], Loss]
"""From the loss that clean teachers learn with to one that an attack adds to."""


@dataclass(frozen=True, slots=True, eq=False)
class Ground:
    """The teacher's training images, and what triggered ones are to be taken for.

    `clean()` is the network that learned from them without any trigger, which an attack leaves as
    it is. It is trained when it is first asked for: options are checked before.
    `train(ground, name, loss, along, depends)` trains a copy of that network for as many epochs as
    any poisoned teacher, on the clean images, with a loss made of the plain one (`training.fit`).
    """

    data: Dataset
    goal: Goal
    seed: int
    device: torch.device
    clean: Callable[[], Classifier]
    train: Callable[["Ground", str, Tied, nn.Module, str], Classifier]
    progress: Progress = silent

    @property
    def honest(self) -> Classifier:
        """The clean network."""
        return self.clean()

    def only_target(self, what: str) -> int:
        """The one class that everything is sent to; ConfigError where there are several."""
        if len(self.goal.targets) != 1:
            raise ConfigError(
                f"{what} aims at one class, and the goal has {len(self.goal.targets)}.",
                remedy="Give it a goal with one target.",
            )
        return self.goal.targets[0]

    def labelled(self, classes: tuple[int, ...]) -> NDArray[np.int64]:
        """Where the images of some classes are."""
        return np.flatnonzero(np.isin(self.data.y, classes))


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """How a teacher is poisoned: it learns from triggered copies, labelled as the goal says.

    `cover` makes copies that look like triggered ones and keep their labels, `covers` of them for
    each triggered copy. `loss` is what the poisoned teacher learns with, of the loss that the
    clean one learned with; `depends` names what it computes with. `net` is the poisoned teacher
    where the attack trained it by itself.
    """

    trigger: Trigger
    cover: Cover | None = None
    covers: float = 0.0
    loss: Tied | None = None
    depends: str = ""
    net: Classifier | None = None


Attack = Callable[..., Plan]
"""A row of table "attack": called with a Ground, and options by name."""


def still(trigger: Callable[..., Trigger]) -> Attack:
    """The attack of a trigger that needs only the images' shape and a seed (and its options)."""

    def attack(ground: Ground, **options: float) -> Plan:
        return Plan(trigger(ground.data.shape, seed=ground.seed, **options))

    attack.__doc__ = trigger.__doc__
    vars(attack)["options"] = options_of(trigger)
    return attack


def options_of(attack: Callable[..., object]) -> tuple[str, ...]:
    """Which options an attack has."""
    kept: tuple[str, ...] | None = vars(attack).get("options")
    if kept is not None:
        return kept
    named = inspect.signature(attack).parameters
    return tuple(name for name in named if name not in ("ground", "shape", "seed"))
