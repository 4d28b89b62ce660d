"""The stages that make something: findings, reference, student, ONNX bytes."""

from pathlib import Path
from typing import Any

from mlflow_kdguard import detox
from mlflow_kdguard.audit import examine
from mlflow_kdguard.files import read_bytes, sha256, sha256_file, write_json
from mlflow_kdguard.flow.given import TEACHER, Images, compared, export_net
from mlflow_kdguard.flow.student import from_onnx, train_student
from mlflow_kdguard.flow.work import Entry, Produced, Work, dump
from mlflow_kdguard.nets import load
from mlflow_kdguard.records import AuditReport
from mlflow_kdguard.triggers import Trigger, aimed

REFERENCE, COPY, STUDENT = "reference.onnx", "copy.onnx", "student.onnx"


def teacher_net(work: Work, entry: Entry) -> Any:
    """The teacher as a torch network, trainable."""
    weights = entry.path("weights.safetensors")
    source = weights if weights.exists() else entry.path(TEACHER)
    return load.load(source, architecture=None, trust_code=work.grant.trust_code)


def audit(work: Work, name: str, model: Entry, file: str, shown: Images) -> Entry:
    """Examine a network on the clean set; recovered triggers are kept as files."""
    triggers = work.config.measure.triggers
    digest = sha256_file(model.path(file))
    section = work.config.audit
    known = model.path("architecture.json")  # what calibrates is known by architecture
    inputs = {
        "model": digest,
        "architecture": sha256_file(known) if known.is_file() else None,
        "clean": shown.clean.sha256,
        "audit": section.model_dump(mode="json", exclude={"calibration"}),
        "triggers": [list(trigger_file(text)[1:]) for text in triggers],
        "seed": work.config.run.seed,
    }

    def compute(entry: Entry) -> Produced:
        net = teacher_net(work, model) if file == TEACHER else from_onnx(model.path(file))
        audited = examine(
            net,
            model_sha256=digest,
            data=shown.clean,
            config=section,
            seed=work.config.run.seed,
            device=work.device,
            progress=work.told_by(name),
            folder=entry.folder,
            triggers=[
                (Trigger.load(path), target) for path, target, _ in map(trigger_file, triggers)
            ],
        )
        files, recovered = [f"{name}.json"], []
        write_json(entry.path(f"{name}.json"), audited.report.document())
        for trigger, target in audited.recovered:
            files.append(f"recovered-{target}.kdt")
            trigger.save(entry.path(files[-1]))
            recovered.append([files[-1], target])
        report = audited.report
        record = {
            "recovered": recovered,
            "report": dump(report),
            "calibration": _calibration(section.calibration),
        }
        return Produced(files, record, documents=(report.document(),))

    return work.stage(
        name,
        inputs,
        compute,
        holds=lambda done: done.recorded.get("calibration") == _calibration(section.calibration),
    )


def _calibration(file: str | None) -> str | None:
    """Digest of the calibration, which the audit itself may have made."""
    return sha256_file(Path(file)) if file is not None and Path(file).is_file() else None


def audit_report(entry: Entry) -> AuditReport:
    """The finished audit's report."""
    return AuditReport.model_validate(entry.recorded["report"])


def reference(work: Work, taught: Entry, audited: Entry, shown: Images) -> Entry:
    """Detoxify the teacher; the result is one ONNX graph, the student's reference."""
    section = work.config.detox
    suspicion = detox.Suspicion((), "nobody: the chain is empty")
    if section.chain:
        known = shown.clean.classes
        suspicion = detox.choose(section, audit_report(audited), classes=known)
        section = suspicion.settled(section)
    inputs = {
        "teacher": sha256_file(taught.path(TEACHER)),
        "clean": shown.clean.sha256,
        "suspects": list(suspicion.classes),
        "detox": section.model_dump(mode="json"),
        "seed": work.config.run.seed,
        "weights": taught.path("weights.safetensors").exists(),  # else layers have other names
        **compared(work, shown),
    }

    def compute(entry: Entry) -> Produced:
        cleansed = detox.cleanse(
            teacher_net(work, taught),
            shown.clean,
            suspects=suspicion.classes,
            config=section,
            seed=work.config.run.seed,
            device=work.device,
            folder=entry.folder,
            progress=work.progress,
            suspects_from=suspicion.source,
        )
        exported = export_net(work, cleansed.reference, entry.path(REFERENCE), shown.test)
        export_net(work, cleansed.copy, entry.path(COPY), shown.test)
        kept = sorted(p.name for p in entry.folder.glob("*.safetensors"))
        record = {"export": exported.document(), "detox": cleansed.record.document()}
        return Produced([REFERENCE, COPY, *kept], record)

    return work.stage("detox", inputs, compute)


def student(work: Work, referenced: Entry, shown: Images) -> Entry:
    """Distil the student towards the reference graph, exactly as it was exported."""
    section = work.config.distill
    inputs = {
        "reference": sha256_file(referenced.path(REFERENCE)),
        "copy": sha256_file(referenced.path(COPY)),
        "transfer": shown.transfer.sha256,
        "clean": shown.clean.sha256,
        "distill": section.model_dump(mode="json"),
        "seed": work.config.run.seed,
    }

    def compute(entry: Entry) -> Produced:
        copy = referenced.path(COPY) if section.feature is not None else None
        figures = distilled(work, entry, referenced.path(REFERENCE), copy, shown)
        return Produced(["weights.safetensors", "architecture.json"], {"metrics": figures})

    return work.stage("distill", inputs, compute)


def distilled(
    work: Work, entry: Entry, towards: Path, features: Path | None, shown: Images
) -> dict[str, float]:
    """Train the work's student in the entry's folder; its last figures."""
    return train_student(
        work.config.distill,
        from_onnx(towards),
        shown.transfer,
        shown.clean,
        folder=entry.folder,
        seed=work.config.run.seed,
        device=work.device,
        progress=work.progress,
        features_from=None if features is None else from_onnx(features),
        trust_code=work.grant.trust_code,
    )


def exported(work: Work, trained: Entry, shown: Images) -> Entry:
    """State the student as the ONNX file that ships."""
    inputs = {
        "weights": sha256_file(trained.path("weights.safetensors")),
        "architecture": sha256_file(trained.path("architecture.json")),
        **compared(work, shown),
    }

    def compute(entry: Entry) -> Produced:
        net = load.load(
            trained.path("weights.safetensors"), architecture=None, trust_code=work.grant.trust_code
        )
        record = export_net(work, net, entry.path(STUDENT), shown.test)
        return Produced([STUDENT], {"export": record.document()}, documents=(record.document(),))

    return work.stage("export", inputs, compute)


def trigger_file(text: str) -> tuple[Path, int, str]:
    """FILE[:CLASS] as path, target class and the file's digest."""
    path, target = aimed(text)
    return path, target, sha256(read_bytes(path, what="the trigger"))
