"""What a guarded distillation is given: images, and the teacher that nobody here trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mlflow_kdguard import data
from mlflow_kdguard.config import TeacherSection, explain
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.errors import ConfigError, DataError, UsageError
from mlflow_kdguard.files import read_bytes, sha256, sha256_file
from mlflow_kdguard.flow.student import export_on
from mlflow_kdguard.flow.work import Entry, Produced, Work, dump
from mlflow_kdguard.nets import load
from mlflow_kdguard.nets.architecture import Architecture
from mlflow_kdguard.records import Exported, Source

TEACHER = "teacher.onnx"


@dataclass(frozen=True, slots=True)
class Images:
    """The three data sets of a guarded distillation."""

    transfer: Dataset
    clean: Dataset
    test: Dataset


def images(work: Work) -> Images:
    """Load the data sets, hold them against each other, and name them on the run."""
    section = work.config.data
    shown = Images(*(load_data(work, u) for u in (section.transfer, section.clean, section.test)))
    for name, other in (("clean", shown.clean), ("test", shown.test)):
        if other.shape != shown.transfer.shape or other.classes != shown.clean.classes:
            raise DataError(
                f"data.{name} ({other.uri}) holds {other.classes} classes of {other.shape} images, "
                f"data.transfer ({shown.transfer.uri}) {shown.transfer.shape} images, "
                f"data.clean ({shown.clean.uri}) {shown.clean.classes} classes.",
                remedy="All three data sets must show the same kind of images.",
            )
    if not section.labelled:
        shown = Images(shown.transfer.unlabelled(), shown.clean, shown.test)
    for context, each in (("transfer", shown.transfer), ("clean", shown.clean)):
        work.run.log_data(named(each), context=context, size=len(each))
    work.run.log_data(named(shown.test), context="test", size=len(shown.test))
    return shown


def load_data(work: Work, uri: str) -> Dataset:
    """The images that `uri` names, from where the work's configuration and its caller allow."""
    root = work.config.data.root
    place = Path(root) if root is not None else None
    return data.load(uri, root=place, download=work.grant.download)


def named(shown: Dataset) -> Source:
    """The data set as records name it."""
    return Source(uri=shown.uri, sha256=shown.sha256)


def teacher(work: Work, shown: Images) -> Entry:
    """Load the teacher without executing anything from it, and state it as ONNX."""
    path, architecture, origin = _source(work, shown)
    beside = path.parent / "architecture.json"
    inputs = {
        "bytes": sha256(read_bytes(path, what="the teacher")),
        "architecture": architecture and architecture.document(),
        "beside": sha256_file(beside) if beside.is_file() else None,
        **compared(work, shown),
    }

    def compute(entry: Entry) -> Produced:
        net = load.load(path, architecture=architecture, trust_code=work.grant.trust_code)
        exported = export_net(work, net, entry.path(TEACHER), shown.test)
        files = [TEACHER]
        known = getattr(net, "architecture", None)
        if isinstance(known, Architecture):
            load.save(net, entry.folder)
            files += ["weights.safetensors", "architecture.json"]
        return Produced(files, {"export": exported.document()})

    entry = work.stage("teacher", inputs, compute)
    digest = sha256_file(entry.path(TEACHER))
    work.run.set_tags({"kdguard.teacher": digest, "kdguard.teacher_source": origin[:5000]})
    if work.config.teacher.name is not None:
        _registered(work, entry, shown, work.config.teacher.name, origin)
    return entry


def _registered(work: Work, entry: Entry, shown: Images, name: str, origin: str) -> Entry:
    """Store the teacher as a version of the registered model `name`, with where it came from."""
    weights = entry.folder if entry.path("weights.safetensors").exists() else None
    inputs = {
        "teacher": sha256_file(entry.path(TEACHER)),
        "name": name,
        "registry": work.registry.identity,
        "origin": origin,
    }

    def compute(_entry: Entry) -> Produced:
        version = work.registry.register_teacher(
            name,
            read_bytes(entry.path(TEACHER), what="the teacher"),
            run=work.run,
            weights=weights,
            data={"parity": named(shown.test)},
            lineage={"kdguard.source": origin[:5000]},
        )
        return Produced([], {"version": dump(version)})

    return work.stage(
        "register-teacher",
        inputs,
        compute,
        holds=lambda done: work.registry.has_version(done.recorded["version"]["uri"]),
    )


def compared(work: Work, shown: Images) -> dict[str, Any]:
    """What an exported file depends on beside the network: settings, and images to compare on."""
    return {"test": shown.test.sha256, "export": work.config.export.model_dump(mode="json")}


def export_net(work: Work, net: Any, path: Path, test: Dataset) -> Exported:
    """Export a network as the work's configuration says, compared on its test images."""
    return export_on(net, path, test, device=work.device, section=work.config.export)


def _source(work: Work, shown: Images) -> tuple[Path, Architecture | None, str]:
    """The teacher's file, its architecture where the configuration names one, and its origin."""
    section = work.config.teacher
    if section.model is None:
        raise UsageError("no teacher is named.", remedy="Set teacher.model: a file or models:/….")
    path, origin = Path(section.model), section.model
    if section.model.startswith("models:/"):
        origin = work.registry.resolve(section.model)
        place = origin.removeprefix("models:/").replace("/", "-")
        path = work.registry.fetch(origin, work.folder / "source" / place)
    if section.arch is None:
        if section.mean or section.std:
            raise ConfigError("teacher.mean and teacher.std belong to teacher.arch.")
        return path, None, origin
    return path, _architecture(section, shown), origin


def _architecture(section: TeacherSection, shown: Images) -> Architecture:
    try:
        return Architecture(
            arch=section.arch or "",
            shape=shown.clean.shape,
            classes=shown.clean.classes,
            mean=section.mean,
            std=section.std,
        )
    except ValidationError as error:
        raise ConfigError(f"teacher: {explain(error)}") from error
