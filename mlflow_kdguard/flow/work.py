"""One pipeline at work: its configuration, its ledger on disk and its runs on MLflow.

A stage is computed inside its nested MLflow run, written to the ledger, then logged. Killed
anywhere, the next start finds either a finished stage (and logs it, if that had not happened) or
an unfinished one, which it goes on with.
"""

import json
import logging
import platform
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mlflow_kdguard import __version__, devices
from mlflow_kdguard.attest import Signer, Verifier, require_verifier
from mlflow_kdguard.config import GuardConfig
from mlflow_kdguard.files import sha256_file, write_json
from mlflow_kdguard.flow.places import anchored
from mlflow_kdguard.ledger import Entry, Ledger, alone_in
from mlflow_kdguard.policy import Policy
from mlflow_kdguard.records import Progress, Record
from mlflow_kdguard.registry import Registry, Run

log = logging.getLogger(__name__)

__all__ = ["Entry", "Grant", "Produced", "Reached", "Work", "begun", "dump", "opened", "tools"]

RUN_FILE, CONFIG_FILE = "run.json", "config.json"


@dataclass(frozen=True, slots=True)
class Grant:
    """What only the caller may grant; no configuration can.

    With a `verifier`, a key of that role, the student is measured again as `kdguard verify` does.
    Raises UsageError for a key of another role.
    """

    policy: Policy
    signer: Signer
    verifier: Signer | None = None
    pins: tuple[str, ...] = ()
    panel: tuple[str, ...] = ()
    allow_unpinned: bool = False
    trust_code: bool = False
    download: bool = False

    def __post_init__(self) -> None:
        if self.verifier is not None:
            require_verifier(self.verifier)

    @property
    def verifiers(self) -> tuple[Verifier, ...]:
        """The keys that the decision believes."""
        signers = (self.signer, self.verifier)
        return tuple(signer.verifier for signer in signers if signer is not None)


@dataclass(frozen=True, slots=True)
class Produced:
    """What a stage leaves: files in its folder, a record, and documents to take metrics from."""

    files: Sequence[str]
    record: Mapping[str, Any]
    documents: Sequence[Mapping[str, Any]] = ()


class Reached(Exception):  # noqa: N818  (a place, not an error)
    """The stage that the work was to stop at is finished."""


@dataclass(frozen=True, slots=True)
class Work:
    """Everything that a stage's body needs; with `until`, `stage` raises Reached after that one."""

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
    until: str | None = None

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        compute: Callable[[Entry], Produced],
        *,
        holds: Callable[[Entry], bool] | None = None,
        above: bool = False,
    ) -> Entry:
        """Run a stage, or take it from the ledger; its nested MLflow run ends FINISHED.

        `holds` says whether a finished stage's outcome still stands outside the folder. `above`
        shows the stage's figures on the parent run, too.
        """
        entry = self._stage(name, inputs, compute, holds=holds, above=above)
        if name == self.until:
            raise Reached(name)
        return entry

    def _stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        compute: Callable[[Entry], Produced],
        *,
        holds: Callable[[Entry], bool] | None,
        above: bool,
    ) -> Entry:
        ran_on = {"kdguard": __version__, "device": self.device.type, "tools": tools()}
        entry = self.ledger.open(name, {"inputs": dict(inputs), **ran_on})
        if entry.record is not None and holds is not None and not holds(entry):
            log.info("what %s left does not hold any more: it is run again", name)
            entry = self.ledger.reopen(entry)
        elif entry.record is not None and self.run.has_finished(name, entry.inputs):
            log.info("%s is finished already", name)
            return entry
        with self.run.stage(name, inputs=entry.inputs) as nested:
            if entry.record is None:
                produced = compute(entry)
                record = {**produced.record, "documents": list(produced.documents)}
                entry = self.ledger.finish(entry, produced.files, record)
            nested.log_documents(entry.recorded["documents"])
            if above:
                self.run.log_documents(entry.recorded["documents"])
            nested.log_files(entry.folder, self.ledger.files(entry))
        return entry

    def told_by(self, name: str) -> Progress:
        """The progress listener, with `name` before what is going on."""
        return lambda what, *rest: self.progress(f"{name}: {what}", *rest)


def tools() -> dict[str, str]:
    """Versions of what the figures are taken with; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in ("mlflow-kdguard", "torch", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


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
    above = None if parent is None else parent.id
    with (
        alone_in(folder, lock=".lock", who="another process", setting="run.work_dir"),
        _terminable(),
    ):
        write_json(folder / CONFIG_FILE, anchored(config).model_dump(mode="json"))
        registry = Registry(config.registry)
        resume = _unfinished(folder, registry, above)
        with registry.run(name, resume=resume, parent=parent, work_dir=folder) as run:
            state = {"run_id": run.id, "parent": above}
            write_json(folder / RUN_FILE, {**state, "status": "RUNNING"})
            _describe(run, config, folder)
            yield Work(
                config, grant, folder, Ledger(folder), registry, run, device, progress, baseline
            )
        write_json(folder / RUN_FILE, {**state, "status": "FINISHED"})


def begun(folder: Path) -> str | None:
    """The MLflow run whose work is in the folder."""
    try:
        run_id = json.loads((folder / RUN_FILE).read_text())["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return run_id if isinstance(run_id, str) else None


def _describe(run: Run, config: GuardConfig, folder: Path) -> None:
    """The configuration on the run: every value as a parameter, and the whole as a file.

    Parameters cannot be changed: those of a continued run stay as they were first; the file and
    the digest are those of the last start.
    """
    run.log_params(dict(_flat(config.model_dump(mode="json", exclude={"teach"}))))
    run.log_files(folder, {CONFIG_FILE: sha256_file(folder / CONFIG_FILE)})
    run.set_tags({"kdguard.config": config.digest})


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _unfinished(folder: Path, registry: Registry, parent: str | None) -> str | None:
    """The MLflow run that goes on here: an interrupted one, or the one of this very parent."""
    try:
        body = json.loads((folder / RUN_FILE).read_text())
        run_id, status, above = body["run_id"], body["status"], body.get("parent")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(run_id, str) or above != parent or (status == "FINISHED" and parent is None):
        return None
    if not registry.has_run(run_id):
        log.warning("the interrupted run %s is not on this server: a new one begins", run_id)
        return None
    return run_id


@contextmanager
def _terminable() -> Iterator[None]:
    """Within the block SIGTERM ends the work as Ctrl-C does, so that no run is left RUNNING."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
