"""The project's run on MLflow, above one nested run a stage, and the folder that it goes on in."""

import json
import logging
from contextlib import AbstractContextManager
from pathlib import Path

from mlflow.entities import SourceType
from mlflow.utils.mlflow_tags import (
    MLFLOW_GIT_COMMIT,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_PROJECT_BACKEND,
    MLFLOW_PROJECT_ENTRY_POINT,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
    MLFLOW_USER,
)

from mlflow_kdguard.config import RegistrySection
from mlflow_kdguard.errors import RegistryError
from mlflow_kdguard.files import sha256_file, write_json
from mlflow_kdguard.ledger import alone_in
from mlflow_kdguard.registry.client import Connection
from mlflow_kdguard.registry.runs import ERROR, INPUTS, STAGE, WORK_DIR, Run, create

log = logging.getLogger(__name__)

STATE, LOCK, LOGS = "project.json", ".project.lock", "logs"


class Parent:
    """The project's run: it is created or continued, and ends as the project does.

    Raises RegistryError where MLflow does not answer.
    """

    def __init__(self, section: RegistrySection, folder: Path, experiment: str) -> None:
        self._connection = Connection(section)
        self._experiment = experiment
        self.folder = folder
        self.run: Run

    def begin(self, name: str, uri: str, entry_point: str, commit: str | None) -> None:
        """Continue the folder's unfinished run; where there is none, create one."""
        unfinished = self._unfinished()
        if unfinished is not None:
            self.run = unfinished
            for closed in self.run.close_stale():
                log.warning("run %s was left RUNNING by a process that is gone: KILLED", closed)
            self.run.reopen()
            log.info("going on with run %s in %s", self.run.id, self.folder)
        else:
            self.run = create(
                self._connection,
                self._experiment,
                name,
                _tags(uri, entry_point, commit) | {WORK_DIR: str(self.folder)},
            )
        self._write("RUNNING")

    def nested(self, stage: str, inputs: str) -> Run:
        """A run for a stage of the project's own, below this one; RUNNING."""
        tags = {STAGE: stage, INPUTS: inputs, MLFLOW_PARENT_RUN_ID: self.run.id}
        return create(self._connection, self.run.experiment_id, stage, tags)

    def running(self) -> None:
        """RUNNING again: a part that finished its own work ended the run."""
        self.run.reopen()

    def end(self, status: str, why: str = "") -> None:
        """End the run and whatever was left RUNNING below it, with its logs stored.

        A project that failed or was stopped says why in a tag. Where MLflow does not answer any
        more, that is a warning: what went wrong first is what the caller must see.
        """
        try:
            self.run.refuse_unreachable()
            self._store_logs()
            if status != "FINISHED":
                self.run.close_stale()
                self.run.set_tags({ERROR: why[:500]})
            self.run.end(status)
            self._write(status)
        except RegistryError as failure:
            if status == "FINISHED":
                raise
            log.warning("%s", failure)

    def _store_logs(self) -> None:
        logs = sorted((self.folder / LOGS).glob("*.log"))
        names = [f"{LOGS}/{path.name}" for path in logs if path.stat().st_size]
        self.run.log_files(self.folder, {name: sha256_file(self.folder / name) for name in names})

    def _unfinished(self) -> Run | None:
        try:
            state = json.loads((self.folder / STATE).read_text())
            run_id, status = str(state["run_id"]), state["status"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if status == "FINISHED":
            return None
        with self._connection.answering(f"look for the run {run_id}"):
            found = self._connection.client.search_runs(
                [self._experiment], f"attributes.run_id = '{run_id}'", max_results=1
            )
        if not found:
            log.warning("run %s is not in this experiment: a new one begins", run_id)
            return None
        return Run(self._connection, found[0])

    def _write(self, status: str) -> None:
        write_json(self.folder / STATE, {"run_id": self.run.id, "status": status})


def alone(folder: Path) -> AbstractContextManager[None]:
    """Hold the folder's lock; UsageError where another `mlflow run` works in it."""
    setting = "work_dir in the backend configuration"
    return alone_in(folder, lock=LOCK, who="another `mlflow run`", setting=setting)


def _tags(uri: str, entry_point: str, commit: str | None) -> dict[str, str]:
    from mlflow.tracking.context.default_context import _get_user

    tags = {
        STAGE: "project",
        MLFLOW_USER: _get_user(),  # type: ignore[no-untyped-call]
        MLFLOW_SOURCE_NAME: uri,
        MLFLOW_SOURCE_TYPE: SourceType.to_string(SourceType.PROJECT),
        MLFLOW_PROJECT_ENTRY_POINT: entry_point,
        MLFLOW_PROJECT_BACKEND: "kdguard",
    }
    return tags if commit is None else tags | {MLFLOW_GIT_COMMIT: commit}
