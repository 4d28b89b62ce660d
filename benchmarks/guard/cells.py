"""Teachers, audits and students as files: each is made once, and found again by what it is made of.

A cell's notes are written last, so that a run that was killed repeats the cell that it was at.
"""

import json
import shutil
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.guard.kept import (
    CLEAN,
    CONTROL,
    DONE,
    POISONED,
    TRIGGER,
    Judged,
    Taught,
    once,
    share,
)
from benchmarks.guard.rows import Guard, Row
from mlflow_kdguard import data, distill
from mlflow_kdguard.audit import examine
from mlflow_kdguard.config import AuditSection, DetoxSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.detox import choose, cleanse
from mlflow_kdguard.detox.suspects import NEEDING
from mlflow_kdguard.files import digest_json
from mlflow_kdguard.nets import load, zoo
from mlflow_kdguard.nets.architecture import Architecture
from mlflow_kdguard.records import AuditReport
from mlflow_kdguard.redteam import contaminate, teach, teach_clean
from mlflow_kdguard.training import predict, state_sha256
from mlflow_kdguard.triggers import Trigger

CLEAN_TEACHER, NO_TEACHER, NONE = "clean teacher", "no teacher", "none"
FLOORS = (CLEAN_TEACHER, NO_TEACHER)
JUDGES = ("validation", "test")
THRESHOLDS = {"lead", "lead_twice", "alpha"}  # of audits: no calibration depends on them
IMAGES = ("train", "clean", "judges")


class Cells:
    """The cells of one folder; figures are taken `on` the test or the validation images.

    Whatever is made is judged on both, so that what was tuned on one need not be made again.
    """

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

    def raw(self, row: Row, seed: int) -> Judged:
        """The poisoned teacher itself."""
        taught = self.taught(row, seed)

        def make(place: Path) -> dict[str, Any]:
            self._judge(place, taught.net(POISONED), taught.trigger, row.teacher.target)
            return {}

        told = {"raw": taught.digest, **self._judge_digests, **self.where}
        return self._read(once(self.folder / "raw" / digest_json(told)[:24], make))

    def audited(
        self, net: zoo.Classifier, audit: AuditSection, seed: int
    ) -> tuple[AuditReport, float]:
        """What the detectors say of a network, and the seconds that it took them."""
        told = {"net": state_sha256(net), "seed": seed, "clean": self.clean.sha256,
                "audit": audit.model_dump(mode="json"), **self.where}  # fmt: skip
        calibrated = self.calibrated(net, audit)

        def make(_: Path) -> dict[str, Any]:
            began = time.process_time()
            found = examine(net, data=self.clean, config=calibrated, model_sha256=told["net"],
                            seed=seed, device=self.device)  # fmt: skip
            seconds = time.process_time() - began
            return {**told, "report": found.report.model_dump(mode="json"), "seconds": seconds}

        notes = once(self.folder / "audits" / digest_json(told)[:24], make)
        kept = json.loads((notes / DONE).read_text())
        return AuditReport.model_validate(kept["report"]), kept["seconds"]

    def calibrated(self, net: zoo.Classifier, audit: AuditSection) -> AuditSection:
        """The section with its calibration, which is made once an architecture and clean set, and
        is not in any audit's seconds."""
        if not audit.shadows:
            return audit
        told = {"architecture": net.architecture.model_dump(mode="json"),
                "audit": audit.model_dump(mode="json", exclude=THRESHOLDS),
                "clean": self.clean.sha256, **self.where}  # fmt: skip
        name = f"{digest_json(told)[:24]}.json"

        def make(place: Path) -> dict[str, Any]:
            config = audit.model_copy(update={"calibration": str(place / name)})
            began = time.process_time()
            examine(net, data=self.clean, config=config, model_sha256=state_sha256(net), seed=0,
                    device=self.device)  # fmt: skip
            return {**told, "seconds": time.process_time() - began}

        place = once(self.folder / "calibrations" / digest_json(told)[:24], make)
        return audit.model_copy(update={"calibration": str(place / name)})

    def judged(self, row: Row, guard: Guard | str, seed: int) -> Judged:
        """The student of a row under a guard, or one of the FLOORS, judged."""
        taught = self.taught(row, seed)
        told = {
            "teacher": taught.digest, "seed": seed, "contamination": row.contamination,
            "guard": guard if isinstance(guard, str) else guard.document(),
            "student": row.student.model_dump(mode="json"),
            "clean": self.clean.sha256, **self._judge_digests, **self.where,
        }  # fmt: skip

        def make(place: Path) -> dict[str, Any]:
            reference, notes = self._reference(taught, guard, seed)
            began = time.process_time()
            student = self._student(row, taught, reference, guard, seed)
            seconds = {**notes.pop("seconds", {}), "student": time.process_time() - began}
            final: nn.Module = student
            if isinstance(guard, Guard) and guard.after is not None:
                final, seconds["after"] = self._repaired(student, guard, guard.after, seed)
            target = row.teacher.target
            self._judge(place, final, taught.trigger, target)
            self._judge(place, reference, taught.trigger, target, what="reference-")
            return {**told, **notes, "seconds": seconds, "student_sha256": state_sha256(final)}

        return self._read(once(self.folder / "students" / digest_json(told)[:24], make))

    def _reference(
        self, taught: Taught, guard: Guard | str, seed: int
    ) -> tuple[nn.Module, dict[str, Any]]:
        """What the student distils from, and what the guard noted."""
        if isinstance(guard, str):
            return taught.net(CONTROL), {}
        teacher = taught.net(CONTROL if guard.of_clean else POISONED)
        report, seconds = None, 0.0
        if NEEDING & set(guard.detox.chain):
            report, seconds = self.audited(teacher, guard.audit, seed)
        suspicion = choose(guard.detox, report, classes=self.clean.classes)
        began = time.process_time()
        done = cleanse(
            teacher, self.clean, suspects=suspicion.classes, suspects_from=suspicion.source,
            config=suspicion.settled(guard.detox), seed=seed, device=self.device,
        )  # fmt: skip
        spent = {"audit": seconds, "detox": time.process_time() - began}
        outcomes = [step.outcome for step in done.record.steps]
        return done.reference, {
            "suspects": suspicion.classes, "source": suspicion.source, "radius": suspicion.radius,
            "outcomes": outcomes, "seconds": spent,
        }  # fmt: skip

    def _repaired(
        self, student: zoo.Classifier, guard: Guard, detox: DetoxSection, seed: int
    ) -> tuple[nn.Module, float]:
        """The student after a chain of its own, and the seconds that it took."""
        report, spent = None, 0.0
        if NEEDING & set(detox.chain):
            report, spent = self.audited(student, guard.audit, seed)
        suspicion = choose(detox, report, classes=self.clean.classes)
        began = time.process_time()
        done = cleanse(
            student, self.clean, suspects=suspicion.classes, config=suspicion.settled(detox),
            seed=seed, device=self.device,
        )  # fmt: skip
        return done.reference, spent + time.process_time() - began

    def _student(
        self, row: Row, taught: Taught, reference: nn.Module, guard: Guard | str, seed: int
    ) -> zoo.Classifier:
        """The student after its epochs; without a teacher, after as many steps on the labelled
        images."""
        changes = {} if isinstance(guard, str) else guard.student
        config = row.student.model_copy(update=dict(changes))
        teacher = taught.net(CONTROL).architecture
        architecture = Architecture(
            arch=config.arch, shape=self.train.shape, classes=self.train.classes,
            mean=teacher.mean, std=teacher.std,
        )  # fmt: skip
        student = zoo.build(architecture, seed=seed)
        transfer = contaminate(self.train, taught.trigger, rate=row.contamination, seed=seed)
        if guard == NO_TEACHER:
            epochs = round(config.epochs * (len(transfer) + len(self.clean)) / len(self.clean))
            transfer = transfer.take([])
            config = config.model_copy(
                update={"loss": "none", "label_weight": 1.0, "epochs": epochs}
            )
        distill.train(
            student, reference, transfer, self.clean, config=config, seed=seed, device=self.device
        )
        return student

    def _judge(
        self, place: Path, net: nn.Module, trigger: Trigger, target: int, *, what: str = ""
    ) -> None:
        for name, images in self.judges.items():
            others = images.x[images.y != target]
            right = predict(net, images.x, device=self.device).argmax(1) == images.y
            sent = predict(net, trigger.apply(others), device=self.device).argmax(1) == target
            np.savez_compressed(place / f"{what}{name}.npz", right=right, sent=sent)

    def _read(self, folder: Path) -> Judged:
        told = json.loads((folder / DONE).read_text())
        if (folder / f"reference-{self.on}.npz").exists():
            with np.load(folder / f"reference-{self.on}.npz") as bits:
                told["reference"] = [float(bits["right"].mean()), float(bits["sent"].mean())]
        with np.load(folder / f"{self.on}.npz") as bits:
            return Judged(bits["right"], bits["sent"], told)
