"""Counts that grow batch by batch, and the records that they become."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard import intervals
from mlflow_kdguard.measure.session import Floats, Session, softmax
from mlflow_kdguard.records import Asr, Model, Paired, Rate, ReferenceGap
from mlflow_kdguard.triggers import Trigger

Ints = NDArray[np.int64]
Attack = tuple[Trigger, int, Literal["supplied", "recovered"]]
"""A trigger, the class that it is accused of sending images to, and where it comes from."""


@dataclass(frozen=True)
class Images:
    """One batch: pixels N×C×H×W, labels N, and their indices in the data set."""

    x: Floats
    y: Ints
    indices: Ints

    def other_than(self, label: int) -> "Images":
        """The images whose label is not `label`."""
        keep = self.y != label
        return Images(self.x[keep], self.y[keep], self.indices[keep])


@dataclass
class AttackTally:
    """One trigger: images of other classes asked, sent to the target, altered at all."""

    trigger: Trigger
    target: int
    source: Literal["supplied", "recovered"]
    asked: int = 0
    hits: int = 0
    changed: int = 0
    baseline_hits: int = 0

    def count(self, nets: Mapping[str, Session], images: Images, batch: int) -> None:
        """Add the images of `images` whose label is not the target."""
        others = images.other_than(self.target)
        if not len(others.x):
            return
        attacked = np.ascontiguousarray(self.trigger.apply(others.x), np.float32)
        self.asked += len(attacked)
        self.changed += self.trigger.changed(others.x).k
        self.hits += self._hits(nets["student"], attacked, others.indices, batch)
        if "baseline" in nets:
            self.baseline_hits += self._hits(nets["baseline"], attacked, others.indices, batch)

    def _hits(self, net: Session, attacked: Floats, indices: Ints, batch: int) -> int:
        answers = net.logits(attacked, batch, indices=indices).argmax(axis=1)
        return int((answers == self.target).sum())

    def record(self, confidence: float, *, has_baseline: bool) -> Asr:
        """The figure, with its one-sided bound at `confidence`."""
        return Asr(
            trigger=self.trigger.sha256,
            name=self.trigger.name,
            target=self.target,
            source=self.source,
            k=self.hits,
            n=self.asked,
            changed=Rate(k=self.changed, n=self.asked),
            confidence=confidence,
            baseline=Rate(k=self.baseline_hits, n=self.asked) if has_baseline else None,
        )


@dataclass
class Tally:
    """Everything that one pass over the images counts."""

    attacks: tuple[AttackTally, ...] = ()
    n: int = 0
    both: int = 0
    only_teacher: int = 0
    only_student: int = 0
    neither: int = 0
    gap_sum: float = 0.0
    student_gap: float = 0.0

    @classmethod
    def of(cls, triggers: Sequence[Attack]) -> "Tally":
        """An empty tally of these attacks."""
        return cls(tuple(AttackTally(*row) for row in triggers))

    def count(self, nets: Mapping[str, Session], images: Images, batch: int) -> None:
        """Add one batch, asked of every network in `nets` (at least "student")."""
        logits = {
            name: nets[name].logits(images.x, batch, indices=images.indices)
            for name in ("student", "teacher", "reference")
            if name in nets
        }
        self._count_right({k: v.argmax(axis=1) == images.y for k, v in logits.items()})
        if "reference" in logits:
            self._count_gaps({k: softmax(v) for k, v in logits.items()})
        for attack in self.attacks:
            attack.count(nets, images, batch)

    def _count_right(self, right: Mapping[str, NDArray[np.bool_]]) -> None:
        student = right["student"]
        teacher = right.get("teacher", np.zeros_like(student))
        self.n += len(student)
        self.both += int((teacher & student).sum())
        self.only_teacher += int((teacher & ~student).sum())
        self.only_student += int((~teacher & student).sum())
        self.neither += int((~teacher & ~student).sum())

    def _count_gaps(self, softmaxes: Mapping[str, NDArray[np.float64]]) -> None:
        r = softmaxes["reference"]
        self.gap_sum += float(np.abs(r - softmaxes["teacher"]).max(axis=1).sum())
        self.student_gap = max(self.student_gap, float(np.abs(r - softmaxes["student"]).max()))

    def accuracy(self) -> Rate:
        """How often the student was right."""
        return Rate(k=self.both + self.only_student, n=self.n)

    def paired(self) -> Paired:
        """Teacher and student on the same images."""
        return Paired(
            both=self.both,
            only_teacher=self.only_teacher,
            only_student=self.only_student,
            neither=self.neither,
        )

    def gap(self, reference: Model) -> ReferenceGap:
        """The reference against the original teacher, and against the student."""
        return ReferenceGap(
            model=reference,
            gap_mean=self.gap_sum / self.n,
            student_gap_max=self.student_gap,
            n=self.n,
        )

    def asr(self, confidence: float, *, has_baseline: bool) -> tuple[Asr, ...]:
        """The attacks, each bounded so that all bounds hold together at `confidence`."""
        if not self.attacks:
            return ()
        each = intervals.bonferroni(confidence, len(self.attacks))
        return tuple(attack.record(each, has_baseline=has_baseline) for attack in self.attacks)
