"""The stages that look at the bytes that ship: measure, certify, attest, decide, promote."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mlflow_kdguard import attest
from mlflow_kdguard.files import read_bytes, sha256_file, write_bytes, write_json
from mlflow_kdguard.flow.decision import judge
from mlflow_kdguard.flow.evidence import pack
from mlflow_kdguard.flow.given import TEACHER, Images
from mlflow_kdguard.flow.making import REFERENCE, STUDENT, audit_report, trigger_file
from mlflow_kdguard.flow.measuring import Nets, Stated, crossing
from mlflow_kdguard.flow.work import Entry, Produced, Work, dump
from mlflow_kdguard.measure import Attack
from mlflow_kdguard.records import (
    Certificate,
    CertifyReport,
    Decision,
    Figures,
    Measurement,
    Parity,
    PatchReport,
    SmoothReport,
    parse_time,
)
from mlflow_kdguard.records.gather import figures_of
from mlflow_kdguard.registry import Registered
from mlflow_kdguard.triggers import Trigger

MEASURE, CERTIFY, CERTIFICATE, DECISION = (
    "measure.json",
    "certify.json",
    "certificate.dsse.json",
    "decision.json",
)
PROOFS = "proofs"
"""Folder of the proofs of bounds, under the stage's."""


@dataclass(frozen=True, slots=True)
class Made:
    """What the making stages left: one entry each."""

    teacher: Entry
    audit: Entry
    reference: Entry
    student: Entry
    exported: Entry

    @property
    def student_file(self) -> Path:
        """The ONNX file that ships."""
        return self.exported.path(STUDENT)

    def nets(self, baseline: Path | None = None) -> Nets:
        """The bytes of the networks that are judged."""
        return Nets(
            student=read_bytes(self.student_file, what="the student"),
            teacher=read_bytes(self.teacher.path(TEACHER), what="the teacher"),
            reference=read_bytes(self.reference.path(REFERENCE), what="the reference"),
            baseline=None if baseline is None else read_bytes(baseline, what="the baseline"),
        )


def measured(work: Work, made: Made, audits: Sequence[Entry], shown: Images) -> Entry:
    """Accuracy, attack success and reference gap on the exported bytes."""
    supplied = [trigger_file(text) for text in work.config.measure.triggers]
    recovered = _recovered(audits) if work.config.measure.recovered else []
    inputs = {
        "student": sha256_file(made.student_file),
        "teacher": sha256_file(made.teacher.path(TEACHER)),
        "reference": sha256_file(made.reference.path(REFERENCE)),
        "test": shown.test.sha256,
        "triggers": [[digest, target] for _, target, digest in supplied],
        "recovered": [[sha256_file(path), target] for path, target in recovered],
        "baseline": None if work.baseline is None else sha256_file(work.baseline),
    }

    def compute(entry: Entry) -> Produced:
        triggers: list[Attack] = [
            *((Trigger.load(path), target, "supplied") for path, target, _ in supplied),
            *((Trigger.load(path), target, "recovered") for path, target in recovered),
        ]
        result = made.nets(work.baseline).measured(
            shown.test,
            triggers,
            batch=work.config.measure.batch,
            device=work.device,
            progress=work.progress,
        )
        write_json(entry.path(MEASURE), result.document())
        return Produced([MEASURE], {"measure": dump(result)}, documents=(result.document(),))

    return work.stage("measure", inputs, compute, above=True)


def certified(work: Work, made: Made, shown: Images) -> Entry:
    """Bounds on the confidence gap between reference and student, from the exported bytes."""
    section = work.config.certify
    inputs = {
        "student": sha256_file(made.student_file),
        "reference": sha256_file(made.reference.path(REFERENCE)),
        "test": shown.test.sha256,
        "certify": section.model_dump(mode="json"),
        "nonce": work.nonce,
    }

    def compute(entry: Entry) -> Produced:
        proofs = entry.path(PROOFS) if section.proofs else None
        if proofs is not None:
            # What an interrupted run left is not continued.
            shutil.rmtree(proofs, ignore_errors=True)
        report = made.nets().bounded(
            shown.test,
            section,
            nonce=work.nonce,
            device=work.device,
            progress=work.progress,
            proofs=proofs,
        )
        write_json(entry.path(CERTIFY), report.document())
        kept = [] if proofs is None else sorted(proofs.iterdir())
        files = [CERTIFY, *(f"{PROOFS}/{path.name}" for path in kept)]
        return Produced(files, {"certify": dump(report)}, documents=(report.document(),))

    return work.stage("certify", inputs, compute, above=True)


def figures(
    made: Made,
    measure: Entry,
    bounds: Entry,
    student_audit: Entry,
    *,
    patches: Entry | None,
    smooth: Entry | None,
) -> Figures:
    """Everything that the gate decides on, read from the finished stages."""
    recorded = [] if patches is None else patches.recorded["patches"]
    return figures_of(
        measurement=Measurement.model_validate(measure.recorded["measure"]),
        bounds=CertifyReport.model_validate(bounds.recorded["certify"]),
        smooth=None if smooth is None else SmoothReport.model_validate(smooth.recorded["smooth"]),
        patches=[PatchReport.model_validate(report) for report in recorded],
        audits={"teacher": audit_report(made.audit), "student": audit_report(student_audit)},
        parity=Parity.model_validate(made.exported.recorded["export"]["parity"]),
    )


def registered(work: Work, made: Made) -> Entry:
    """Store the exported student as a model version; it gets no alias here.

    What it is held against is stored beside it, for a verifier in another place.
    """
    lineage = {
        "kdguard.reference": sha256_file(made.reference.path(REFERENCE)),
        "kdguard.teacher": sha256_file(made.teacher.path(TEACHER)),
    }
    supplied = [trigger_file(text) for text in work.config.measure.triggers]
    inputs = {
        "student": sha256_file(made.student_file),
        "name": work.config.registry.model_name,
        "registry": work.registry.identity,
        "lineage": lineage,
        "triggers": [[digest, target] for _, target, digest in supplied],
    }

    def compute(_entry: Entry) -> Produced:
        nets = made.nets()
        version = work.registry.register_student(
            work.config.registry.model_name,
            nets.student,
            run=work.run,
            tags=lineage,
            held_against=pack(
                nets.student,
                reference=nets.reference,
                teacher=nets.teacher,
                triggers=[
                    (read_bytes(path, what="the trigger"), target) for path, target, _ in supplied
                ],
            ),
        )
        return Produced([], {"version": dump(version)})

    return work.stage(
        "register",
        inputs,
        compute,
        holds=lambda entry: work.registry.has_version(version_of(entry).uri),
    )


def version_of(entry: Entry) -> Registered:
    """The version that the register stage made."""
    return Registered.model_validate(entry.recorded["version"])


def attested(
    work: Work, made: Made, taken: Figures, version: Registered, shown: Images, *, bounds: Entry
) -> Entry:
    """Sign who states what about which bytes, and store it with the version.

    Stated again where anything that it says has changed, or where it is too old by now.
    """
    certificate = _certificate(work, made, taken, version, shown, bounds=bounds)
    inputs = {
        "stated": {k: v for k, v in dump(certificate).items() if k not in ("issued", "expires")},
        "version": version.uri,
        "key": work.grant.signer.key_id,
        "attest": work.config.attest.model_dump(mode="json"),
    }

    def compute(entry: Entry) -> Produced:
        envelope = attest.issue(certificate, work.grant.signer)
        write_bytes(entry.path(CERTIFICATE), envelope)
        work.registry.store_certificate(version.uri, envelope)
        return Produced([CERTIFICATE], {"issued": certificate.issued})

    return work.stage("attest", inputs, compute, holds=lambda entry: valid(work, entry))


def valid(work: Work, entry: Entry) -> bool:
    """Whether the stored certificate is young enough for itself and for the policy."""
    limits = (
        work.config.attest.expires_after_days,
        work.grant.policy.certificate.expires_after_days,
    )
    days = min(limit for limit in limits if limit is not None)
    age = datetime.now(UTC) - parse_time(entry.recorded["issued"])
    return age < timedelta(days=days)


def decided(work: Work, version: Registered, *, nonce: str) -> Decision:
    """Decide about the stored version under the operator's policy; act on a pass.

    `nonce` is the one that was handed out to whoever signed. The decision is taken anew each time:
    it depends on the clock and on the caller's grant.
    """
    grant = work.grant
    with work.run.stage("gate") as nested:
        decision = judge(
            work.registry,
            version.uri,
            policy=grant.policy,
            verifiers=grant.verifiers,
            now=datetime.now(UTC),
            pins=grant.pins,
            panel=grant.panel,
            allow_unpinned=grant.allow_unpinned,
            nonce=nonce,
        )
        write_json(work.folder / DECISION, decision.document())
        nested.log_files(work.folder, {DECISION: sha256_file(work.folder / DECISION)})
        work.registry.record_decision(version.uri, decision)
        work.run.set_tags({"kdguard.decision": decision.decision})
    return decision


def promoted(work: Work, version: Registered) -> str:
    """Give the version the alias; only ever called on a pass."""
    alias = work.config.registry.alias
    with work.run.stage("promote"):
        work.registry.set_alias(version.name, alias, version.version)
    return alias


def _certificate(
    work: Work, made: Made, taken: Figures, version: Registered, shown: Images, *, bounds: Entry
) -> Certificate:
    proofs = CertifyReport.model_validate(bounds.recorded["certify"]).proofs
    stated = Stated(
        version.files,
        version.name,
        version.registry,
        reference=sha256_file(made.reference.path(REFERENCE)),
        teacher=sha256_file(made.teacher.path(TEACHER)),
        data=(shown.transfer, shown.clean, shown.test),
    )
    return stated.certificate(taken, origin="imported", config=work.config, proofs=proofs)


def _recovered(audits: Sequence[Entry]) -> list[tuple[Path, int]]:
    teacher, student = (
        (
            audit_report(entry),
            [(entry.path(file), target) for file, target in entry.recorded["recovered"]],
        )
        for entry in audits
    )
    return crossing(teacher, student)
