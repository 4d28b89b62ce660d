"""`mlflow run PROJECT -b kdguard`: the stages that a project's `plugin.yaml` declares, watched.

MLflow asks `build` for a backend. It blocks until the project is done, keeps one parent run with
a nested run a stage, and leaves no process and no run behind, whatever ends it
(docs/how-to/mlflow-run.md).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow_kdguard.plugin.backend.submit import Backend

__all__ = ["build"]


def build() -> "Backend":
    """The backend, as MLflow's entry point `mlflow.project_backend` asks for it."""
    from mlflow_kdguard.plugin.backend.submit import Backend

    return Backend()
