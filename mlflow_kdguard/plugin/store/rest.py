"""A store that judges on the client before it asks a server: a convenience, not a guard.

Anybody can speak to the server without it. It tells a user early, and with all reasons, what a
gated server would say; the settings are the operator's own file.
"""

from datetime import UTC, datetime
from functools import partial
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.store.model_registry.rest_store import RestStore
from mlflow.utils.credentials import get_default_host_creds

from mlflow_kdguard.errors import KDGuardError
from mlflow_kdguard.plugin.server.judge import VersionFacts, judge
from mlflow_kdguard.plugin.server.reading import Reading
from mlflow_kdguard.plugin.server.settings import DEFAULT_WORKSPACE, Settings, named
from mlflow_kdguard.plugin.store.gate import canonical
from mlflow_kdguard.plugin.store.refusal import Refused, refusing


def opened(uri: str, tracking_uri: str | None = None) -> "GatedRestStore":
    """A store for the server at `uri`. Raises MlflowException without settings that hold."""
    try:
        return GatedRestStore(uri, Settings.load(named()), tracking_uri)
    except KDGuardError as error:
        raise MlflowException(f"the gated registry does not open: {error}") from error


class GatedRestStore(RestStore):
    """MLflow's client store, which asks for a guarded name only where the judgement is yes."""

    def __init__(self, uri: str, settings: Settings, tracking_uri: str | None) -> None:
        super().__init__(partial(get_default_host_creds, uri))  # type: ignore[no-untyped-call]
        self._settings = settings
        self._tracking_uri = (tracking_uri or uri).removeprefix("kdguard+")

    def set_registered_model_alias(self, name: Any, alias: Any, version: Any) -> None:
        """Judged here first where the alias is guarded."""
        if self._settings.policy_for(str(name)).guards_alias(str(alias)):
            self._judge(name, version, str(alias))
        super().set_registered_model_alias(name, alias, version)  # type: ignore[no-untyped-call]

    def transition_model_version_stage(
        self, name: Any, version: Any, stage: Any, archive_existing_versions: Any
    ) -> Any:
        """Judged here first where the stage is guarded."""
        if self._settings.policy_for(str(name)).guards_stage(str(stage)):
            self._judge(name, version, canonical(stage))
        return super().transition_model_version_stage(  # type: ignore[no-untyped-call]
            name, version, stage, archive_existing_versions
        )

    def _judge(self, name: str, version: str, alias: str) -> None:
        from mlflow.utils.workspace_context import get_request_workspace

        server: Any = super()
        what = f"{alias!r} for version {version} of {name!r}"
        with refusing(what):
            self._settings = self._settings.current()
            found = server.get_model_version(name, version)
            facts = VersionFacts(
                name=name,
                version=str(version),
                workspace=get_request_workspace() or DEFAULT_WORKSPACE,
                source=str(found.source),
                storage_location=server.get_model_version_download_uri(name, version),
                tags=dict(found.tags),
            )
            reading = Reading(self, self._settings, self._tracking_uri)
            judged = judge(facts, alias, self._settings, now=datetime.now(UTC), fetch=reading)
            if not judged.passed and self._settings.enforcing:
                raise Refused(what, judged.reasons)
