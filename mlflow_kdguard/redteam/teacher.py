"""Teachers for evaluation: a clean one, a poisoned one, and the control that the poisoned needs."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mlflow_kdguard import extensions
from mlflow_kdguard.adversary.madry import madry
from mlflow_kdguard.config import Loop, RedteamSection
from mlflow_kdguard.data import Dataset, load
from mlflow_kdguard.errors import ConfigError, DataError
from mlflow_kdguard.nets import zoo
from mlflow_kdguard.nets.architecture import Architecture
from mlflow_kdguard.records import Progress, silent
from mlflow_kdguard.redteam.goal import Goal
from mlflow_kdguard.redteam.ground import Attack, Ground, Plan, options_of
from mlflow_kdguard.redteam.poison import covered, poison
from mlflow_kdguard.training import fit
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
    goal, attack = Goal.one(config.target, data.classes), attack_of(config)
    plain = madry(eps=config.eps, steps=config.pgd_steps)

    def trained(
        net: zoo.Classifier, images: Dataset, loop: Loop, name: str, plan: Plan | None = None
    ) -> zoo.Classifier:
        fit(
            net,
            images,
            plain if plan is None or plan.loss is None else plan.loss(plain),
            loop,
            seed=seed,
            device=device,
            what=f"{name} teacher",
            checkpoint=folder / f"{name}.checkpoint",
            progress=progress,
            depends=f"madry {config.eps} {config.pgd_steps}{'' if plan is None else plan.depends}",
        )
        return net

    fresh = zoo.build(_architecture(config.arch, data), seed=seed)
    clean = trained(fresh, data, config.clean_loop, "clean")
    plan = attack(Ground(data, goal, seed, device, clean, progress), **config.options)
    dirty = poison(data, plan.trigger, target=goal, rate=config.poison_rate, seed=seed)
    if plan.cover is not None:
        rate = plan.covers * config.poison_rate
        dirty = covered(dirty, data, plan.cover, rate=rate, seed=seed)
    poisoned = trained(copy.deepcopy(clean), dirty, config.poison_loop, "poisoned", plan)
    control = trained(copy.deepcopy(clean), data, config.poison_loop, "control")
    return Poisoned(clean, poisoned, control, plan.trigger, config.target)


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
