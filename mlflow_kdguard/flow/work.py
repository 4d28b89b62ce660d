"""One pipeline at work: its configuration, its ledger on disk and its runs on MLflow.

A stage is computed inside its nested MLflow run, written to the ledger, then logged. Killed
anywhere, the next start finds either a finished stage (and logs it, if that had not happened) or
an unfinished one, which it goes on with.
"""

import fcntl
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from mlflow_kdguard import __version__, devices
from mlflow_kdguard.attest.signing import Signer
from mlflow_kdguard.config import GuardConfig
from mlflow_kdguard.errors import UsageError
from mlflow_kdguard.files import write_json
from mlflow_kdguard.ledger import Entry, Ledger
from mlflow_kdguard.policy import Policy
from mlflow_kdguard.records import Progress, Record
from mlflow_kdguard.registry import Registry, Run

log = logging.getLogger(__name__)

__all__ = ["Entry", "Grant", "Produced", "Work", "dump", "opened"]

RUN_FILE, CONFIG_FILE = "run.json", "config.json"


@dataclass(frozen=True, slots=True)
class Grant:
    """What only the caller may grant; no configuration can."""

    policy: Policy
    signer: Signer
    pins: tuple[str, ...] = ()
    panel: tuple[str, ...] = ()
    allow_unpinned: bool = False
    trust_code: bool = False
    download: bool = False


@dataclass(frozen=True, slots=True)
class Produced:
    """What a stage leaves: files in its folder, a record, and documents to take metrics from."""

    files: Sequence[str]
    record: Mapping[str, Any]
    documents: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class Work:
    """Everything that a stage's body needs."""

    config: GuardConfig
    grant: Grant
    folder: Path
    ledger: Ledger
    registry: Registry
    run: Run
    device: torch.device
    progress: Progress
    baseline: Path | None = None
    nonce: str = ""
    _entries: dict[str, Entry] = field(default_factory=dict)

    def stage(
        self, name: str, inputs: Mapping[str, Any], compute: Callable[[Entry], Produced]
    ) -> Entry:
        """Run a stage, or take it from the ledger; its nested MLflow run ends FINISHED."""
        entry = self.ledger.open(name, {"inputs": dict(inputs), "kdguard": __version__})
        if entry.record is not None and self.run.has_finished(name, entry.inputs):
            log.info("%s is finished already", name)
            return entry
        with self.run.stage(name, inputs=entry.inputs) as nested:
            if entry.record is None:
                produced = compute(entry)
                record = {**produced.record, "documents": list(produced.documents)}
                entry = self.ledger.finish(entry, produced.files, record)
            nested.log_documents(entry.recorded["documents"])
            nested.log_files(entry.folder, self.ledger.files(entry))
        return entry

    def told_by(self, name: str) -> Progress:
        """The progress listener, with `name` before what is going on."""
        return lambda what, *rest: self.progress(f"{name}: {what}", *rest)


def dump(record: Record) -> dict[str, Any]:
    """The record's own fields as JSON, from which it can be read back."""
    return record.model_dump(mode="json", by_alias=True)


@contextmanager
def opened(
    config: GuardConfig,
    grant: Grant,
    *,
    name: str,
    folder: Path,
    progress: Progress,
    parent: Run | None = None,
    baseline: Path | None = None,
) -> Iterator[Work]:
    """Open (or continue) the work under `folder`, and its MLflow run.

    Raises UsageError where another process works in the same folder, DeviceError where the device
    is missing, RegistryError where MLflow does not answer.
    """
    device = devices.pick(config.run.device)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    with _alone_in(folder):
        write_json(folder / CONFIG_FILE, config.model_dump(mode="json"))
        registry = Registry(config.registry)
        with registry.run(name, resume=_unfinished(folder), parent=parent, work_dir=folder) as run:
            write_json(folder / RUN_FILE, {"run_id": run.id, "status": "RUNNING"})
            yield Work(
                config, grant, folder, Ledger(folder), registry, run, device, progress, baseline
            )
        write_json(folder / RUN_FILE, {"run_id": run.id, "status": "FINISHED"})


def _unfinished(folder: Path) -> str | None:
    """The MLflow run that was interrupted here, if one was."""
    try:
        body = json.loads((folder / RUN_FILE).read_text())
    except (OSError, ValueError):
        return None
    return None if body.get("status") == "FINISHED" else body.get("run_id")


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock: IO[str] = (folder / ".lock").open("w")
    except OSError as error:
        raise UsageError(
            f"cannot work in {folder}: {error.strerror}.", remedy="Name another run.work_dir."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another process works in {folder}.",
                remedy="Wait for it, or name another run.work_dir.",
            ) from error
        yield
