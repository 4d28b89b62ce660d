"""Teachers as files: each is made once, and found again by what it is made of."""

import shutil
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.guard.kept import CLEAN, CONTROL, POISONED, TRIGGER, Taught, once, share
from benchmarks.guard.rows import Row
from mlflow_kdguard import data
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.files import digest_json
from mlflow_kdguard.nets import load, zoo
from mlflow_kdguard.redteam import teach, teach_clean

JUDGES = ("validation", "test")
IMAGES = ("train", "clean", "judges")


class Teachers:
    """Images, and the teachers of attacks, as files of one folder."""

    def __init__(
        self, folder: Path, sets: Mapping[str, str], *, on: str = "test",
        device: torch.device | None = None, root: Path | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.sets, self.on, self.root = folder, sets, on, root
        self.device = torch.device("cpu") if device is None else device
        # Other arithmetic makes other cells; those of a CPU are not named, as they came first.
        self.where = {} if self.device.type == "cpu" else {"device": self.device.type}

    def __getstate__(self) -> dict[str, Any]:
        """Without images, which another process reads for itself."""
        return {name: each for name, each in vars(self).items() if name not in IMAGES}

    @cached_property
    def train(self) -> Dataset:
        """What teachers learn from, and the clean part of the transfer set."""
        return data.load(self.sets["train"], root=self.root)

    @cached_property
    def clean(self) -> Dataset:
        """The defender's labelled images."""
        return data.load(self.sets["clean"], root=self.root)

    @cached_property
    def judges(self) -> dict[str, Dataset]:
        """The images that everything is judged on, by name."""
        return {name: data.load(self.sets[name], root=self.root) for name in JUDGES}

    @property
    def _judge_digests(self) -> dict[str, str]:
        return {name: images.sha256 for name, images in self.judges.items()}

    def taught(self, row: Row, seed: int) -> Taught:
        """The poisoned teacher of a row, its control and its trigger."""
        told = {"section": row.teacher.model_dump(mode="json"), "seed": seed,
                "train": self.train.sha256, **self.where}  # fmt: skip
        digest = digest_json(told)[:24]
        folder = self.folder / "teachers" / digest

        def make(place: Path) -> dict[str, Any]:
            shared = self._shared(row, seed, place)
            began = time.process_time()
            made = teach(row.teacher, seed=seed, device=self.device, folder=place, data=self.train)
            seconds = time.process_time() - began
            for name, net in ((POISONED, made.poisoned), (CONTROL, made.control)):
                load.save(net, place / name)
            made.trigger.save(place / TRIGGER)
            share(shared, place)
            return {**told, "seconds": seconds}

        once(folder, make)
        return Taught(folder, digest)

    def _shared(self, row: Row, seed: int, place: Path) -> Path:
        """Where the checkpoints of clean teachers are that many attacks begin with."""
        section = row.teacher.model_dump(
            mode="json", include={"arch", "eps", "pgd_steps", "clean_loop", "poison_loop"}
        )
        key = {"section": section, "seed": seed, "train": self.train.sha256, **self.where}
        shared = self.folder / "clean" / digest_json(key)[:24]
        place.mkdir(parents=True, exist_ok=True)
        for name in (CLEAN, CONTROL):
            if (shared / f"{name}.checkpoint").exists():
                shutil.copyfile(shared / f"{name}.checkpoint", place / f"{name}.checkpoint")
        return shared

    def plain(self, row: Row, seed: int) -> zoo.Classifier:
        """A clean teacher of the row's pair, as it is before an attack begins with it."""
        keep = {"arch", "eps", "pgd_steps", "clean_loop"}
        section = row.teacher.model_dump(mode="json", include=keep)
        told = {"plain": section, "seed": seed, "train": self.train.sha256, **self.where}

        def make(place: Path) -> dict[str, Any]:
            net = teach_clean(row.teacher, self.train, seed=seed, device=self.device, folder=place)
            load.save(net, place / "net")
            (place / f"{CLEAN}.checkpoint").unlink()
            return told

        place = once(self.folder / "plain" / digest_json(told)[:24], make)
        return load.load(place / "net" / "weights.safetensors", architecture=None)
