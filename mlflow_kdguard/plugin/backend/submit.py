"""The backend: from `mlflow run` to a run that is FINISHED, FAILED or KILLED."""

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.exceptions import ExecutionException
from mlflow.projects.backend.abstract_backend import AbstractBackend
from mlflow.projects.submitted_run import SubmittedRun
from mlflow.projects.utils import _fetch_project
from mlflow.utils.git_utils import get_git_commit

from mlflow_kdguard import policy
from mlflow_kdguard.config import RegistrySection
from mlflow_kdguard.errors import KDGuardError
from mlflow_kdguard.plugin.backend import manifest, plan, settings
from mlflow_kdguard.plugin.backend.parent import Parent, alone
from mlflow_kdguard.plugin.backend.steps import Failed, Steps
from mlflow_kdguard.plugin.backend.watch import Stopped, disturbed, terminable, undisturbed

log = logging.getLogger(__name__)


class Finished(SubmittedRun):
    """A project that is done: the backend blocks, so there is nothing to wait for or to cancel."""

    def __init__(self, run_id: str) -> None:
        super().__init__()
        self._run_id = run_id

    @property
    def run_id(self) -> str:
        """The project's MLflow run."""
        return self._run_id

    def wait(self) -> bool:
        """True: it has succeeded."""
        return True

    def get_status(self) -> str:
        """FINISHED."""
        return "FINISHED"

    def cancel(self) -> None:
        """Nothing: it has ended."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """What MLflow hands on."""

    uri: str
    entry_point: str
    parameters: Mapping[str, str]
    version: str | None
    settings: settings.BackendConfig
    tracking_uri: str
    experiment_id: str


class Backend(AbstractBackend):
    """Runs a project's stages in this environment, and returns once they are done."""

    def run(  # noqa: PLR0917  (MLflow's own signature)
        self,
        project_uri: str,
        entry_point: str,
        params: Mapping[str, str] | None,
        version: str | None,
        backend_config: Mapping[str, Any],
        tracking_uri: str,
        experiment_id: str,
    ) -> SubmittedRun:
        """Run the project up to `entry_point` (a stage, or "main") and block until it is done.

        Raises ExecutionException, which `mlflow run` answers with exit code 1, where a stage
        fails, breaks a limit or refuses the student, and on SIGTERM; KeyboardInterrupt on Ctrl-C.
        """
        _hear()
        try:
            asked = _Asked(
                project_uri,
                entry_point,
                params or {},
                version,
                settings.read(backend_config),
                tracking_uri,
                str(experiment_id),
            )
            with terminable():
                return Finished(_run(asked))
        except Stopped as stop:
            raise ExecutionException(f"stopped by {stop}; run it again to go on.") from stop
        except KDGuardError as error:
            raise ExecutionException(str(error)) from error


def _run(asked: _Asked) -> str:
    project = Path(_fetch_project(asked.uri, asked.version))  # type: ignore[no-untyped-call]
    found = manifest.load(project)
    work = Path(asked.settings.work_dir).absolute()
    made = plan.make(
        found,
        asked.entry_point,
        asked.parameters,
        folder=project,
        work_dir=work,
        tracking_uri=asked.tracking_uri,
    )
    chosen = asked.settings.policy
    floor = policy.load(Path(chosen) if chosen is not None else None)
    narrowed, loose = plan.policies(floor, found, str(project / manifest.FILE))
    if loose:
        log.warning("the operator's policy is tighter than the project's in %s", ", ".join(loose))
    with alone(work):
        section = RegistrySection.model_validate(made.values["registry"])
        parent = Parent(section, work, asked.experiment_id)
        commit = get_git_commit(str(project))
        with undisturbed():  # a run that was created is a run that will be ended
            parent.begin(found.name, asked.uri, asked.entry_point, commit)
            _ended(Steps(asked.settings, project, parent, made, narrowed), parent)
    return parent.run.id


def _ended(steps: Steps, parent: Parent) -> None:
    """Run every step; whatever happens, the run ends with the status that it deserves."""
    try:
        with disturbed():
            steps.run()
    except KeyboardInterrupt as stop:
        parent.end("KILLED", f"stopped by {str(stop) or 'Ctrl-C'}")
        log.warning("stopped; `mlflow run` with the same work_dir goes on in %s", parent.folder)
        raise
    except Failed as failure:
        parent.end("FAILED", str(failure))
        raise ExecutionException(str(failure)) from failure
    except BaseException as error:
        parent.end("FAILED", f"{type(error).__name__}: {error}")
        raise
    parent.end("FINISHED")


def _hear() -> None:
    """Our own log is shown where nobody has said otherwise: MLflow shows only its own."""
    ours = logging.getLogger("mlflow_kdguard")
    if not ours.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("kdguard: %(message)s"))
        ours.addHandler(handler)
        ours.setLevel(os.environ.get("MLFLOW_LOGGING_LEVEL", "INFO"))
