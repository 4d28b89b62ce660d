"""The stages that make something: teacher, findings, reference, student, ONNX bytes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_kdguard import data, detox
from mlflow_kdguard.audit import examine
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.errors import DataError, UsageError
from mlflow_kdguard.files import read_bytes, sha256_file, write_json
from mlflow_kdguard.flow.student import export_on, from_onnx, train_student
from mlflow_kdguard.flow.work import Entry, Produced, Work, dump
from mlflow_kdguard.nets import load
from mlflow_kdguard.nets.architecture import Architecture
from mlflow_kdguard.records import AuditReport, Exported
from mlflow_kdguard.triggers import Trigger

REFERENCE, COPY, STUDENT, TEACHER = "reference.onnx", "copy.onnx", "student.onnx", "teacher.onnx"


@dataclass(frozen=True, slots=True)
class Images:
    """The three data sets of a guarded distillation."""

    transfer: Dataset
    clean: Dataset
    test: Dataset


def images(work: Work) -> Images:
    """Load the data sets and hold them against each other."""
    section = work.config.data
    root = Path(section.root) if section.root is not None else None
    loaded = Images(
        *(
            data.load(uri, root=root, download=work.grant.download)
            for uri in (section.transfer, section.clean, section.test)
        )
    )
    for name, other in (("clean", loaded.clean), ("test", loaded.test)):
        if other.shape != loaded.transfer.shape or other.classes != loaded.clean.classes:
            raise DataError(
                f"data.{name} ({other.uri}) holds {other.classes} classes of {other.shape} images, "
                f"data.transfer ({loaded.transfer.uri}) {loaded.transfer.shape} images.",
                remedy="All three data sets must show the same kind of images.",
            )
    if section.labelled:
        return loaded
    return Images(loaded.transfer.unlabelled(), loaded.clean, loaded.test)


def teacher(work: Work, shown: Images) -> Entry:
    """Load the teacher without executing anything from it, and state it as ONNX."""
    path, architecture = _source(work, shown)
    inputs = {"bytes": sha256_file(path), "architecture": architecture and architecture.document()}

    def compute(entry: Entry) -> Produced:
        net = load.load(path, architecture=architecture, trust_code=work.grant.trust_code)
        exported = export_net(work, net, entry.path(TEACHER), shown.test)
        files = [TEACHER]
        known = getattr(net, "architecture", None)
        if isinstance(known, Architecture):
            load.save(net, entry.folder)
            files += ["weights.safetensors", "architecture.json"]
        return Produced(files, {"export": exported.document()})

    return work.stage("teacher", inputs, compute)


def teacher_net(work: Work, entry: Entry) -> Any:
    """The teacher as a torch network, trainable."""
    weights = entry.path("weights.safetensors")
    source = weights if weights.exists() else entry.path(TEACHER)
    return load.load(source, architecture=None, trust_code=work.grant.trust_code)


def audit(work: Work, name: str, model: Entry, file: str, shown: Images) -> Entry:
    """Examine a network on the clean set; recovered triggers are kept as files."""
    triggers = work.config.measure.triggers
    digest = sha256_file(model.path(file))
    inputs = {
        "model": digest,
        "clean": shown.clean.sha256,
        "audit": work.config.audit.model_dump(mode="json"),
        "triggers": [trigger_file(text)[2] for text in triggers],
    }

    def compute(entry: Entry) -> Produced:
        net = teacher_net(work, model) if file == TEACHER else from_onnx(model.path(file))
        audited = examine(
            net,
            model_sha256=digest,
            data=shown.clean,
            config=work.config.audit,
            seed=work.config.run.seed,
            device=work.device,
            progress=work.progress,
            triggers=[
                (Trigger.load(path), target) for path, target, _ in map(trigger_file, triggers)
            ],
        )
        files, recovered = [f"{name}.json"], []
        write_json(entry.path(f"{name}.json"), audited.report.document())
        for trigger, target in audited.recovered:
            files.append(f"recovered-{target}.npz")
            trigger.save(entry.path(files[-1]))
            recovered.append([files[-1], target])
        report = audited.report
        return Produced(
            files, {"recovered": recovered, "report": dump(report)}, documents=(report.document(),)
        )

    return work.stage(name, inputs, compute)


def audit_report(entry: Entry) -> AuditReport:
    """The finished audit's report."""
    return AuditReport.model_validate(entry.recorded["report"])


def reference(work: Work, taught: Entry, audited: Entry, shown: Images) -> Entry:
    """Detoxify the teacher; the result is one ONNX graph, the student's reference."""
    section = work.config.detox
    classes, why = detox.choose(section, audit_report(audited)) if section.chain else ((), "")
    inputs = {
        "teacher": sha256_file(taught.path(TEACHER)),
        "clean": shown.clean.sha256,
        "suspects": list(classes),
        "detox": section.model_dump(mode="json"),
        "seed": work.config.run.seed,
    }

    def compute(entry: Entry) -> Produced:
        cleansed = detox.cleanse(
            teacher_net(work, taught),
            shown.clean,
            suspects=classes,
            config=section,
            seed=work.config.run.seed,
            device=work.device,
            folder=entry.folder,
            progress=work.progress,
            suspects_from=why or "nobody: the chain is empty",
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
        "test": shown.test.sha256,
        "export": work.config.export.model_dump(mode="json"),
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
    name, _, target = text.rpartition(":")
    path, number = (Path(name), int(target)) if name and target.isdigit() else (Path(text), 0)
    read_bytes(path, what="the trigger")
    return path, number, sha256_file(path)


def _source(work: Work, shown: Images) -> tuple[Path, Architecture | None]:
    """The teacher's file, and its architecture where the configuration names one."""
    section = work.config.teacher
    if section.model is None:
        raise UsageError("no teacher is named.", remedy="Set teacher.model: a file or models:/….")
    path = Path(section.model)
    if section.model.startswith("models:/"):
        path = work.registry.fetch(section.model, work.folder / "source")
    if section.arch is None:
        return path, None
    named = Architecture(
        arch=section.arch,
        shape=shown.clean.shape,
        classes=shown.clean.classes,
        mean=section.mean,
        std=section.std,
    )
    return path, named


def export_net(work: Work, net: Any, path: Path, test: Dataset) -> Exported:
    """Export a network as the work's configuration says, compared on its test images."""
    return export_on(net, path, test, device=work.device, section=work.config.export)
