"""The only stage that talks to MLflow as a client: runs, model versions, certificates, aliases.

Nothing here reads a model through an MLflow flavor: what a version holds is bytes.
"""

import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from mlflow_kdguard.bundle import MODEL
from mlflow_kdguard.config import RegistrySection
from mlflow_kdguard.errors import RegistryError
from mlflow_kdguard.files import read_bytes, sha256, write_bytes
from mlflow_kdguard.records import Decision, Source
from mlflow_kdguard.registry import bundle, evidence
from mlflow_kdguard.registry.bundle import ARCHITECTURE, WEIGHTS, Bundle
from mlflow_kdguard.registry.client import Connection
from mlflow_kdguard.registry.evidence import EVIDENCE
from mlflow_kdguard.registry.metrics import RULES, metrics_of
from mlflow_kdguard.registry.nonces import Nonce, handed_out
from mlflow_kdguard.registry.runs import STAGE, WORK, WORK_DIR, Run, create, ended, search
from mlflow_kdguard.registry.system import watched
from mlflow_kdguard.registry.versions import Registered, Versions

__all__ = ["RULES", "Bundle", "Nonce", "Registered", "Registry", "Run", "metrics_of"]

log = logging.getLogger(__name__)

_PROJECT_RUN = "MLFLOW_RUN_ID"  # set by `mlflow run`
_TOKEN = "mlflow-token"  # noqa: S105  (the name of a file, not a secret)


class Registry:
    """MLflow, as the configuration's `registry` section names it.

    Raises RegistryError within seconds where nothing answers there; every method raises
    RegistryError where MLflow does not do what is asked.
    """

    def __init__(self, section: RegistrySection) -> None:
        self._connection = Connection(section)
        self._versions = Versions(self._connection)
        self._experiment = section.experiment

    @property
    def identity(self) -> str:
        """The registry's URI without credentials, as certificates name it."""
        return self._connection.identity

    # ── runs ────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def run(
        self,
        name: str,
        *,
        resume: str | None = None,
        parent: Run | None = None,
        work_dir: Path | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Iterator[Run]:
        """A pipeline's run, new or (with `resume`, a run id) continued; it ends as a stage's does.

        Whatever a killed process left RUNNING below it, or for the same `work_dir` (which the
        caller holds a lock on), is ended as KILLED first.
        """
        token = _token(work_dir)
        if token is not None:
            self._close_stale(token, keep=resume)
        if resume is not None:
            run = self._reopened(resume)
        else:
            marks = {STAGE: "pipeline", **(tags or {})}
            if work_dir is not None and token is not None:
                marks |= {WORK: token, WORK_DIR: str(work_dir.absolute())}
            above = parent.id if parent is not None else os.environ.get(_PROJECT_RUN)
            if above:
                marks[MLFLOW_PARENT_RUN_ID] = above
            run = create(self._connection, self.experiment_id(), name, marks)
        with ended(run), watched(run.id, self._connection.tracking_uri):
            yield run

    def experiment_id(self) -> str:
        """The experiment's id; it is created where it is missing.

        Inside `mlflow run`, it is the experiment of the project's run, below which ours nest.
        """
        client = self._connection.client
        if project := os.environ.get(_PROJECT_RUN):
            with self._connection.answering(f"find the project's run {project}"):
                return str(client.get_run(project).info.experiment_id)
        with self._connection.answering(f"open the experiment {self._experiment}"):
            found = client.get_experiment_by_name(self._experiment)
            if found is None:
                return _created(self._connection, self._experiment)
        if found.lifecycle_stage == "deleted":
            raise RegistryError(
                f"the experiment {self._experiment!r} is deleted.",
                remedy="Restore it, or name another (registry.experiment).",
            )
        return str(found.experiment_id)

    def has_run(self, run_id: str) -> bool:
        """Whether the server knows this run, and nobody deleted it."""
        with self._connection.answering(f"look for the run {run_id}"):
            try:
                found = self._connection.client.get_run(run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return False
        return bool(found.info.lifecycle_stage != "deleted")

    def work_dir(self, run_id: str) -> Path:
        """The folder that an interrupted run worked in; RegistryError where the run names none."""
        with self._connection.answering(f"find the run {run_id}"):
            found = self._connection.client.get_run(run_id).data.tags.get(WORK_DIR)
        if found is None:
            raise RegistryError(
                f"the run {run_id} is not one of a pipeline.", remedy="Name a parent run's id."
            )
        return Path(found)

    # ── models ──────────────────────────────────────────────────────────────────────────────────

    def register_student(
        self,
        name: str,
        onnx: bytes,
        *,
        run: Run,
        tags: Mapping[str, str] | None = None,
        held_against: Mapping[str, bytes] | None = None,
    ) -> Registered:
        """Store an exported student as a new version of `name`, byte for byte, without an alias.

        `mlflow.pyfunc.load_model(registered.uri)` serves it. `held_against` are the files that a
        verifier needs beside it (`evidence`). Raises ModelError where `onnx` is not a classifier
        of images.
        """
        marks = {"kdguard.kind": "student", "kdguard.sha256": sha256(onnx), **(tags or {})}
        files = bundle.student_files(onnx)
        if held_against is not None:
            marks[EVIDENCE] = evidence.store(self._versions, held_against, run=run)
        return self._versions.register(name, files, run=run, kind="student", tags=marks)

    def register_teacher(
        self,
        name: str,
        onnx: bytes,
        *,
        run: Run | None = None,
        weights: Path | None = None,
        data: Mapping[str, Source] | None = None,
        lineage: Mapping[str, str] | None = None,
    ) -> Registered:
        """Store a teacher: ONNX, and where known `weights`, a folder of `nets.load.save`.

        Lineage goes with it as tags: the run (its own where none is given), the SHA-256 of every
        part, the `data` it was made from by role, such as "train", and whatever `lineage` says.
        """
        if run is None:
            with self.run(f"register {name}") as own:
                return self.register_teacher(
                    name, onnx, run=own, weights=weights, data=data, lineage=lineage
                )
        files = bundle.student_files(onnx)
        marks = {"kdguard.kind": "teacher", "kdguard.sha256": sha256(onnx), **(lineage or {})}
        if weights is not None:
            for path in (WEIGHTS, ARCHITECTURE):
                files[path] = read_bytes(weights / path, what="the teacher's part")
                marks[f"kdguard.sha256/{path}"] = sha256(files[path])
        for role, source in (data or {}).items():
            marks[f"kdguard.data/{role}"] = f"{source.uri} sha256:{source.sha256}"
        return self._versions.register(name, files, run=run, kind="teacher", tags=marks)

    def resolve(self, uri: str) -> str:
        """`models:/name/version` of the version that `uri` stands for now; aliases move."""
        version = self._versions.find(uri)
        return f"models:/{version.name}/{version.version}"

    def download(self, uri: str, *, limit: int = bundle.LARGEST) -> Bundle:
        """The raw bytes of `models:/name/version`, `models:/name@alias` or a path (`Versions`)."""
        return self._versions.download(uri, limit=limit)

    def evidence(self, uri: str, *, limit: int = bundle.LARGEST) -> dict[str, bytes] | None:
        """What the version was registered with to be held against; None where there is nothing."""
        return evidence.fetch(self._versions, uri, limit=limit)

    def nonce(self, name: str, subject: str) -> Nonce | None:
        """A new nonce for the model with the SHA-256 `subject`; None where the server has none."""
        return handed_out(self._connection, name, subject)

    def fetch(self, uri: str, folder: Path, *, onnx: bool = False) -> Path:
        """Write a version's files below `folder`; the path of the one to read a network from.

        Only model files are written: safetensors with its architecture.json, ONNX or `.pt`; or,
        with `onnx`, the one ONNX file.
        """
        found = self.download(uri)
        if onnx:
            write_bytes(folder / MODEL, found.onnx)
            return folder / MODEL
        main = found.main
        sibling = str(Path(main).with_name(ARCHITECTURE))
        for path in (main, sibling):
            if path in found.files:
                write_bytes(folder / Path(path).name, found.files[path])
        return folder / Path(main).name

    def has_version(self, uri: str) -> bool:
        """Whether a model version is there; RegistryError where MLflow does not answer."""
        try:
            self._versions.find(uri)
        except RegistryError as error:
            if getattr(error.__cause__, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def store_certificate(self, uri: str, envelope: bytes) -> None:
        """Store a signed certificate with the version and its run (`Versions`)."""
        self._versions.store_certificate(uri, envelope)

    def record_decision(self, uri: str, decision: Decision) -> None:
        """Say on the version what the gate decided, and why."""
        self._versions.record_decision(uri, decision)

    def promote(self, uri: str, alias: str) -> None:
        """Give the version at `uri` the alias; whether it may have it was decided elsewhere."""
        version = self._versions.find(uri)
        self.set_alias(version.name, alias, str(version.version))

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Let `models:/name@alias` stand for `version`."""
        self._versions.set_alias(name, alias, version)

    def alias(self, name: str, alias: str) -> str | None:
        """The version that an alias stands for; None where the model has no such alias."""
        return self._versions.alias(name, alias)

    def _reopened(self, run_id: str) -> Run:
        with self._connection.answering(f"find the interrupted run {run_id}"):
            found = self._connection.client.get_run(run_id)
        if found.info.lifecycle_stage == "deleted":
            raise RegistryError(
                f"the run {run_id} is deleted.", remedy="Restore it, or start anew."
            )
        run = Run(self._connection, found)
        for closed in run.close_stale():
            log.warning("run %s was left RUNNING by a process that is gone: KILLED", closed)
        run.reopen()
        return run

    def _close_stale(self, token: str, keep: str | None) -> None:
        for found in search(self._connection, self.experiment_id(), WORK, token):
            if found.info.status == "RUNNING" and found.info.run_id != keep:
                stale = Run(self._connection, found)
                stale.close_stale()
                stale.end("KILLED")


def _created(connection: Connection, name: str) -> str:
    try:
        return str(connection.client.create_experiment(name, connection.artifact_location(name)))
    except MlflowException:  # another process may have been faster
        found = connection.client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def _token(work_dir: Path | None) -> str | None:
    """What marks the runs of one work folder, wherever it is mounted: a random file in it."""
    if work_dir is None:
        return None
    file = work_dir / _TOKEN
    if not file.exists():
        write_bytes(file, uuid.uuid4().hex.encode())
    return file.read_text().strip()
