"""What cells keep: the attacker's files, and a network's answers on the judging images."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.files import write_json
from mlflow_kdguard.nets import load, zoo
from mlflow_kdguard.triggers import Trigger

POISONED, CONTROL, CLEAN, TRIGGER, DONE = "poisoned", "control", "clean", "trigger.kdt", "done.json"


@dataclass(frozen=True, slots=True)
class Taught:
    """The attacker's files, and what names them."""

    folder: Path
    digest: str

    def net(self, name: str) -> zoo.Classifier:
        """`poisoned`, or `control`: as many epochs without the trigger."""
        return load.load(self.folder / name / "weights.safetensors", architecture=None)

    @property
    def trigger(self) -> Trigger:
        """What the attack puts on images."""
        return Trigger.load(self.folder / TRIGGER)


@dataclass(frozen=True, slots=True)
class Judged:
    """A network on the judging images: whether each is right (bool N), and whether each image of
    another class is sent to the target (bool M); and what was noted when it was made."""

    right: NDArray[np.bool_]
    sent: NDArray[np.bool_]
    told: dict[str, Any]

    @property
    def accuracy(self) -> float:
        """Share of images that are right."""
        return float(self.right.mean())

    @property
    def asr(self) -> float:
        """Share of other classes' images that are sent to the target."""
        return float(self.sent.mean())


def share(shared: Path, place: Path) -> None:
    """Keep the clean teachers' checkpoints for other attacks, and none beside."""
    shared.mkdir(parents=True, exist_ok=True)
    for name in (CLEAN, CONTROL):
        half = shared / f"{name}.checkpoint.{os.getpid()}"
        shutil.copyfile(place / f"{name}.checkpoint", half)
        half.replace(shared / f"{name}.checkpoint")  # another process may be reading it
    for left in place.glob("*.checkpoint"):
        left.unlink()


def once(folder: Path, make: Callable[[Path], dict[str, Any]]) -> Path:
    """Let `make` fill the folder, unless it has; its notes are written last."""
    if not (folder / DONE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / DONE, make(folder))
    return folder
