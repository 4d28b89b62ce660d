"""Cells: networks and bounds, each a finished file that the next run finds again.

A cell's name is the digest of everything that it follows from. A file is written in one move, and
last, so that a run that was killed repeats no more than the cell that it was at.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlflow_kdguard import data, distill
from mlflow_kdguard.certify import certify
from mlflow_kdguard.config import CertifySection, DistillSection, ExportSection, TeachSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.errors import ExportError
from mlflow_kdguard.export import to_onnx
from mlflow_kdguard.files import digest_json, write_json
from mlflow_kdguard.measure import Session
from mlflow_kdguard.nets import load, zoo
from mlflow_kdguard.nets.architecture import Architecture
from mlflow_kdguard.teach import teach

CPU = torch.device("cpu")
ONNX, DONE, REFUSED = "model.onnx", "done.json", "refused"


@dataclass(frozen=True, slots=True)
class Sets:
    """Images by URI: to train on, to select on, to report on."""

    train: str
    validation: str
    test: str


class Cells:
    """Makes or finds the cells of one folder."""

    def __init__(self, folder: Path, sets: Sets) -> None:
        self.folder = folder
        self.sets = sets
        self._loaded: dict[str, Dataset] = {}

    def images(self, split: str) -> Dataset:
        """One of the sets: train, validation, test."""
        uri: str = getattr(self.sets, split)
        if uri not in self._loaded:
            self._loaded[uri] = data.load(uri)
        return self._loaded[uri]

    def teacher(self, told: Mapping[str, Any], seed: int) -> Path:
        """Folder of the teacher that `told` (a `teach` section) describes."""
        config = TeachSection(**told)

        def make(folder: Path) -> None:
            train = self.images("train")
            net, _ = teach(
                _architecture(config.arch, train), train,
                config=config, seed=seed, device=CPU, checkpoint=folder / "checkpoint",
            )  # fmt: skip
            _keep(net, folder, train)

        return self._network("teacher", {"teach": config.model_dump(mode="json")}, seed, make)

    def student(self, told: Mapping[str, Any], teacher: Path, seed: int) -> Path:
        """Folder of the student of `teacher` that `told` (a `distill` section) describes."""
        config = DistillSection(**told)

        def make(folder: Path) -> None:
            train = self.images("train")
            net = zoo.build(_architecture(config.arch, train), seed=seed + 1)
            distill.train(
                net, load.load(teacher / load.WEIGHTS), train, train.take([]),
                config=config, seed=seed, device=CPU, checkpoint=folder / "checkpoint",
            )  # fmt: skip
            _keep(net, folder, train)

        inputs = {"distill": config.model_dump(mode="json"), "teacher": teacher.name}
        return self._network("student", inputs, seed, make)

    def bounds(
        self, reference: Path, student: Path, told: Mapping[str, Any], split: str
    ) -> dict[str, Any]:
        """What `certify` says under `told` (a `certify` section) on images of a split.

        They are the first `samples` that the reference classifies rightly, the same ones for every
        student.
        """
        config = CertifySection(**told)
        shown = self._right(reference, split, config.samples)
        inputs = {
            "certify": config.model_dump(mode="json"), "data": shown.sha256,
            "reference": reference.name, "student": student.name,
        }  # fmt: skip
        file = self.folder / "bounds" / f"{digest_json(inputs)[:16]}.json"
        if not file.exists():
            began = _seconds()
            models = [(net / ONNX).read_bytes() for net in (reference, student)]
            report = certify(models[0], models[1], shown, config=config, device=CPU)
            summary = report.summary
            found = {
                "n": summary.n, "lower": summary.lower_mean, "upper": summary.upper_mean,
                "control": report.control.gap_mean,
                "cpu_seconds": (_seconds() - began) / summary.n,
                "lowers": [sample.lower for sample in report.samples],
                "uppers": [sample.upper for sample in report.samples],
            }  # fmt: skip
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {"inputs": inputs, "found": found})
        answer: dict[str, Any] = json.loads(file.read_text())["found"]
        return answer

    def accuracy(self, net: Path, split: str) -> float:
        """Share of the split's images that the exported network classifies rightly."""
        shown = self.images(split)
        file = net / f"accuracy-{shown.sha256[:16]}.json"
        if not file.exists():
            session = Session((net / ONNX).read_bytes(), device=CPU, where=str(net))
            right = session.logits(shown.x, 1000).argmax(1) == shown.y
            write_json(file, {"accuracy": float(right.mean()), "n": len(shown)})
        return float(json.loads(file.read_text())["accuracy"])

    def _right(self, net: Path, split: str, count: int) -> Dataset:
        """The first images of a split that the network classifies rightly."""
        images = self.images(split)
        first = images.take(range(min(len(images), 4 * count)))
        session = Session((net / ONNX).read_bytes(), device=CPU, where=str(net))
        right = np.flatnonzero(session.logits(first.x, 1000).argmax(1) == first.y)[:count]
        if len(right) < count:
            raise SystemExit(f"{net} classifies fewer than {count} of {4 * count} images rightly.")
        return first.take(right.tolist())

    def _network(self, kind: str, inputs: dict[str, Any], seed: int, make: Any) -> Path:
        inputs = {**inputs, "seed": seed, "train": self.sets.train}
        folder = self.folder / "networks" / f"{kind}-{digest_json(inputs)[:16]}"
        if not (folder / DONE).exists():
            folder.mkdir(parents=True, exist_ok=True)
            began = _seconds()
            notes = {"inputs": inputs}
            try:
                make(folder)
            except ExportError as error:
                notes[REFUSED] = error.message
            (folder / "checkpoint").unlink(missing_ok=True)
            write_json(folder / DONE, {**notes, "cpu_seconds": _seconds() - began})
        return folder

    def refused(self, net: Path) -> str | None:
        """Why the network could not be exported: diverged ones have weights beyond float32."""
        why: str | None = json.loads((net / DONE).read_text()).get(REFUSED)
        return why


def _seconds() -> float:
    """Processor time so far, of a solver's finished processes, too."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _architecture(arch: str, images: Dataset) -> Architecture:
    """Pixels as they are: what the benchmark of bounds uses."""
    channels = images.shape[0]
    return Architecture(
        arch=arch, shape=images.shape, classes=images.classes,
        mean=(0.0,) * channels, std=(1.0,) * channels,
    )  # fmt: skip


def _keep(net: Any, folder: Path, images: Dataset) -> None:
    load.save(net, folder)
    to_onnx(
        net, folder / ONNX, shape=images.shape, classes=images.classes,
        images=images.x[:1000], config=ExportSection(), device=CPU,
    )  # fmt: skip
