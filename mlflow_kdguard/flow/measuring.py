"""What builder and verifier do alike: figures of one student, taken on bytes, and their statement.

Nothing here knows where the bytes come from. The builder's stages (`judging`) take them from their
folder, the verifier (`verification`) downloads them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, TypeVar

import torch

from mlflow_kdguard.certify import certify
from mlflow_kdguard.certify.patch import certify_patch
from mlflow_kdguard.certify.smooth import certify_smooth
from mlflow_kdguard.config import CertifySection, GuardConfig, PatchSection, SmoothSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.errors import Interrupted
from mlflow_kdguard.flow.work import tools
from mlflow_kdguard.measure import Attack, measure, opened
from mlflow_kdguard.records import (
    AuditReport,
    Certificate,
    CertifyReport,
    Figures,
    Measurement,
    Model,
    PatchReport,
    Progress,
    SmoothReport,
    Source,
    Subject,
    format_time,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Nets:
    """ONNX bytes of a student, of what it is held against, and of a declared comparator."""

    student: bytes
    teacher: bytes
    reference: bytes
    baseline: bytes | None = None

    def measured(
        self,
        test: Dataset,
        attacks: Sequence[Attack],
        *,
        batch: int,
        device: torch.device,
        progress: Progress,
    ) -> Measurement:
        """Accuracy, attack success and reference gap of the student."""
        return measure(
            self.student,
            test,
            triggers=attacks,
            teacher=self.teacher,
            reference=self.reference,
            baseline=self.baseline,
            batch=batch,
            device=device,
            progress=progress,
        )

    def bounded(
        self,
        test: Dataset,
        section: CertifySection,
        *,
        nonce: str,
        device: torch.device,
        progress: Progress,
        proofs: Path | None = None,
    ) -> CertifyReport:
        """Bounds on the confidence gap between reference and student, with `proofs` in a folder."""
        return certify(
            self.reference,
            self.student,
            test,
            config=section,
            nonce=nonce,
            device=device,
            progress=progress,
            proofs=proofs,
        )

    def smoothed(
        self,
        test: Dataset,
        section: SmoothSection,
        *,
        nonce: str,
        entropy: str = "",
        device: torch.device,
        progress: Progress,
    ) -> SmoothReport | None:
        """Bounds on the gap of the smoothed pair; None where no noise is asked for.

        Raises Interrupted where the work was stopped: a part of the images certifies nothing.
        """
        if section.sigma is None:
            return None
        reference, student = (
            opened(blob, test, where=f"the {name}'s ONNX file", device=device)
            for name, blob in (("reference", self.reference), ("student", self.student))
        )
        report = certify_smooth(
            reference,
            student,
            test,
            config=section,
            nonce=nonce,
            entropy=entropy,
            progress=progress,
        )
        if not report.complete:
            raise Interrupted(
                "the certification of the smoothed pair was stopped.",
                remedy="Run it again; finished stages are kept.",
            )
        return report

    def patched(
        self,
        test: Dataset,
        section: PatchSection,
        *,
        nonce: str,
        device: torch.device,
        progress: Progress,
    ) -> tuple[PatchReport, ...]:
        """What patches of any content can do to the student, a report for each target.

        Raises Interrupted where the work was stopped: a part of the images certifies nothing.
        """
        reports = []
        for target in section.targets:
            report = certify_patch(
                self.student,
                test,
                target=target,
                config=section,
                nonce=nonce,
                device=device,
                progress=progress,
            )
            if not report.complete:
                raise Interrupted(
                    f"the certification of patches towards class {target} was stopped.",
                    remedy="Run it again; finished stages are kept.",
                )
            reports.append(report)
        return tuple(reports)


def crossing(
    teacher: tuple[AuditReport, Sequence[T]], student: tuple[AuditReport, Sequence[T]]
) -> list[T]:
    """Triggers inverted on the teacher, and on the student where its audit flagged a class.

    A universal perturbation can be found for any network; on an unflagged student it is that, and
    says nothing about a backdoor. The teacher's strongest one asks whether *that* crossed over.
    """
    report, found = student
    return [*teacher[1], *(found if report.verdict == "suspect" else ())]


@dataclass(frozen=True, slots=True)
class Stated:
    """What a certificate says beside its figures: files by digest, names, models, data."""

    files: Mapping[str, str]
    name: str
    registry: str
    reference: str
    teacher: str
    data: Sequence[Dataset]

    def certificate(
        self,
        figures: Figures,
        *,
        origin: Literal["recomputed", "imported"],
        config: GuardConfig,
        attempt: int = 1,
        proofs: Model | None = None,
    ) -> Certificate:
        """The certificate of these figures, issued now; `origin` is its `figures_from`."""
        now = datetime.now(UTC)
        return Certificate(
            subjects=tuple(Subject(path=path, sha256=sha) for path, sha in self.files.items()),
            model_name=self.name,
            registry=self.registry,
            reference=Model(sha256=self.reference),
            teacher=Model(sha256=self.teacher),
            data=tuple(Source(uri=data.uri, sha256=data.sha256) for data in self.data),
            triggers=tuple(figure.trigger for figure in figures.asr),
            figures=figures,
            figures_from=origin,
            attempt=attempt,
            config=config.digest,
            seed=config.run.seed,
            tools=tools(),
            proofs=proofs,
            issued=format_time(now),
            expires=format_time(now + timedelta(days=config.attest.expires_after_days)),
        )
