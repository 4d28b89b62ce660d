"""Teachers for evaluation: a clean one, a poisoned one, and the control that the poisoned needs."""

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mlflow_kdguard import extensions
from mlflow_kdguard.adversary.madry import madry
from mlflow_kdguard.config import Loop, RedteamSection
from mlflow_kdguard.data import Dataset, load
from mlflow_kdguard.errors import ConfigError, DataError
from mlflow_kdguard.nets import zoo
from mlflow_kdguard.nets.architecture import Architecture
from mlflow_kdguard.records import Progress, silent
from mlflow_kdguard.redteam.goal import Goal
from mlflow_kdguard.redteam.ground import Attack, Ground, Plan, Tied, options_of
from mlflow_kdguard.redteam.poison import covered, poison
from mlflow_kdguard.training import Loss, fit
from mlflow_kdguard.triggers import Trigger


@dataclass(frozen=True, slots=True, eq=False)
class Poisoned:
    """What an attack made.

    `poisoned` is `clean` after more epochs with triggered copies; `control` is `clean` after the
    same epochs without them: without it, what the extra epochs do would pass for the attack.
    """

    clean: zoo.Classifier
    poisoned: zoo.Classifier
    control: zoo.Classifier
    trigger: Trigger
    target: int


def teach(
    config: RedteamSection,
    *,
    seed: int,
    device: torch.device,
    folder: Path,
    progress: Progress = silent,
    data: Dataset | None = None,
) -> Poisoned:
    """Train the three teachers adversarially (`eps`, `pgd_steps`; eps 0 plainly).

    They learn from `data`, by default from what `config.train` names.
    Checkpoints live in `folder`; started again, training goes on where it was, and what is
    finished is not repeated. Raises ConfigError, DataError, and what `training.fit` raises.
    """
    data = load(config.train) if data is None else data
    if not len(data) or data.y.min() < 0:
        raise DataError(f"{data.uri} has images without labels.", remedy="Train on labelled ones.")
    attack = attack_of(config)
    school = _School(config, data, seed, device, folder, progress)
    goal = Goal.one(config.target, data.classes)
    ground = Ground(data, goal, seed, device, cache(school.clean), school.jointly, progress)
    plan = attack(ground, **config.options)
    poisoned = school.poisoned(ground, plan) if plan.net is None else plan.net
    control = school.trained("control", copy.deepcopy(ground.honest), config.poison_loop)
    return Poisoned(ground.honest, poisoned, control, plan.trigger, config.target)


def teach_clean(
    config: RedteamSection, data: Dataset, *, seed: int, device: torch.device, folder: Path
) -> zoo.Classifier:
    """The clean teacher that attacks begin with (`Poisoned.clean`), and no more."""
    return _School(config, data, seed, device, folder, silent).clean()


@dataclass(frozen=True, slots=True, eq=False)
class _School:
    """What all teachers of one attack have in common."""

    config: RedteamSection
    data: Dataset
    seed: int
    device: torch.device
    folder: Path
    progress: Progress

    @property
    def plain(self) -> Loss:
        """The loss of clean teachers."""
        return madry(eps=self.config.eps, steps=self.config.pgd_steps)

    def clean(self) -> zoo.Classifier:
        """The teacher that knows no trigger."""
        fresh = zoo.build(_architecture(self.config.arch, self.data), seed=self.seed)
        return self.trained("clean", fresh, self.config.clean_loop)

    def trained(
        self,
        name: str,
        net: zoo.Classifier,
        loop: Loop,
        *,
        images: Dataset | None = None,
        loss: Loss | None = None,
        along: nn.Module | None = None,
        depends: str = "",
    ) -> zoo.Classifier:
        """`net` after its epochs, by default on the clean images with the plain loss."""
        fit(
            net,
            self.data if images is None else images,
            self.plain if loss is None else loss,
            loop,
            seed=self.seed,
            device=self.device,
            what=f"{name} teacher",
            checkpoint=self.folder / f"{name}.checkpoint",
            progress=self.progress,
            along=along,
            depends=f"madry {self.config.eps} {self.config.pgd_steps}{depends}",
        )
        return net

    def jointly(
        self, ground: Ground, name: str, loss: Tied, along: nn.Module, depends: str
    ) -> zoo.Classifier:
        """How an attack trains a teacher by itself."""
        net, loop = copy.deepcopy(ground.honest), self.config.poison_loop
        return self.trained(name, net, loop, loss=loss(self.plain), along=along, depends=depends)

    def poisoned(self, ground: Ground, plan: Plan) -> zoo.Classifier:
        """The teacher that learned from triggered copies."""
        rate, seed = self.config.poison_rate, self.seed
        dirty = poison(self.data, plan.trigger, target=ground.goal, rate=rate, seed=seed)
        if plan.cover is not None:
            dirty = covered(dirty, self.data, plan.cover, rate=plan.covers * rate, seed=seed)
        loss = self.plain if plan.loss is None else plan.loss(self.plain)
        net, loop = copy.deepcopy(ground.honest), self.config.poison_loop
        return self.trained("poisoned", net, loop, images=dirty, loss=loss, depends=plan.depends)


def attack_of(config: RedteamSection) -> Attack:
    """The row of `config.attack`; ConfigError for an unknown attack or option."""
    attack: Attack = extensions.load("attack", config.attack)
    known = options_of(attack)
    for option in config.options:
        if option not in known:
            raise ConfigError(
                f"the attack {config.attack} has no option {option!r}.",
                remedy=f"Its options: {', '.join(known)}.",
            )
    return attack


def _architecture(arch: str, data: Dataset) -> Architecture:
    """Normalisation by channel from the data, rounded: the record is read by people."""
    mean = np.round(data.x.mean(axis=(0, 2, 3), dtype=np.float64), 4)
    std = np.round(data.x.std(axis=(0, 2, 3), dtype=np.float64), 4).clip(1e-3)
    return Architecture(
        arch=arch,
        shape=data.shape,
        classes=data.classes,
        mean=tuple(float(value) for value in mean),
        std=tuple(float(value) for value in std),
    )
