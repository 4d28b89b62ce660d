"""Teachers, audits and students as files: each is made once, and found again by what it is made of.

A cell's notes are written last, so that a run that was killed repeats the cell that it was at.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks.guard import bounds
from benchmarks.guard.kept import CONTROL, DONE, POISONED, Judged, Taught, once
from benchmarks.guard.rows import Guard, Row
from benchmarks.guard.teachers import Teachers
from mlflow_kdguard import distill
from mlflow_kdguard.audit import examine
from mlflow_kdguard.config import AuditSection, CertifySection, DetoxSection
from mlflow_kdguard.detox import choose, cleanse
from mlflow_kdguard.detox.suspects import NEEDING
from mlflow_kdguard.files import digest_json
from mlflow_kdguard.nets import zoo
from mlflow_kdguard.nets.architecture import Architecture
from mlflow_kdguard.records import AuditReport
from mlflow_kdguard.redteam import contaminate
from mlflow_kdguard.training import predict, state_sha256
from mlflow_kdguard.triggers import Trigger

CLEAN_TEACHER, NO_TEACHER, NONE = "clean teacher", "no teacher", "none"
FLOORS = (CLEAN_TEACHER, NO_TEACHER)
THRESHOLDS = frozenset({"lead", "lead_twice", "lead_own", "alpha"})
"""Fields of audits on which no calibration depends."""


class Cells(Teachers):
    """The cells of one folder; figures are taken `on` the test or the validation images.

    Whatever is made is judged on both, so that what was tuned on one need not be made again.
    """

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
                "audit": audit.model_dump(mode="json", exclude=set(THRESHOLDS)),
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
            **({} if row.bounds is None else {"exported": True}),
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
            if row.bounds is not None:
                bounds.export(place, reference, final, self.clean)
                raw = taught.net(CONTROL if isinstance(guard, str) or guard.of_clean else POISONED)
                notes["gap"] = bounds.gap(reference, raw, self.clean, self.device)
            return {**told, **notes, "seconds": seconds, "student_sha256": state_sha256(final)}

        place = once(self.folder / "students" / digest_json(told)[:24], make)
        found = self._read(place)
        if row.bounds is not None and guard != NO_TEACHER:
            found.told["bounds"] = self._bounded(place, row.bounds, taught)
        return found

    def _bounded(self, place: Path, config: CertifySection, taught: Taught) -> dict[str, Any]:
        """Bounds on images that the clean teacher gets right: the same ones for every guard."""
        told = {"student": place.name, "config": config.model_dump(mode="json"), "on": self.on}

        def make(_: Path) -> dict[str, Any]:
            net, images = taught.net(CONTROL), self.judges[self.on]
            shown = bounds.known(net, images, config.samples, self.device)
            began = time.process_time()
            found = bounds.bounded(place, shown, config)
            return {**told, **found, "seconds": time.process_time() - began}

        kept = once(self.folder / "bounds" / digest_json(told)[:24], make) / DONE
        found: dict[str, Any] = json.loads(kept.read_text())
        return found

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
