"""How a server reads a version's bytes: through its own artifact store where clients go through it.

MLflow is imported where it is asked, since most judgements need little of it.
"""

import os
from pathlib import Path
from typing import Any, cast

from mlflow_kdguard.artifacts import Store, read_folder, read_store
from mlflow_kdguard.errors import RegistryError, UnsafeModelError
from mlflow_kdguard.plugin.server import content
from mlflow_kdguard.plugin.server.content import PROXIED
from mlflow_kdguard.plugin.server.places import Place
from mlflow_kdguard.plugin.server.settings import Settings

_SERVER = "_MLFLOW_SERVER_FILE_STORE"
"""Environment variable that MLflow sets in its server's processes."""


class Reading:
    """Reads through MLflow, for one registry and one request."""

    def __init__(self, registry: Any, settings: Settings, tracking_uri: str | None = None) -> None:
        self._registry, self._content = registry, settings.stated.content
        self._tracking_uri = tracking_uri

    def step(self, uri: str) -> str:
        """What a `runs:/` or `models:/` URI stands for now.

        Raises UnsafeModelError for one that is none or that moves (an alias, a stage, `latest`).
        """
        from mlflow.store.artifact.utils.models import _parse_model_uri

        if Place.of(uri).scheme == "runs":
            return self._run(Place.of(uri))
        parsed = _parse_model_uri(uri)
        if parsed.model_id is not None:
            return str(self._tracking().get_logged_model(parsed.model_id).artifact_location)
        if parsed.name is None or parsed.version is None:
            raise UnsafeModelError(f"{uri!r} does not name one version.")
        return str(self._registry.get_model_version_download_uri(parsed.name, parsed.version))

    def read(self, place: Place) -> dict[str, bytes]:
        """The files at a place; RegistryError, ModelError and what MLflow's stores raise."""
        if (digest := content.digest_at(place, self._content)) is not None:
            return content.take(digest, self._content, opened=opened)
        if place.scheme == "file":
            return _folder(place.path)
        if place.scheme == PROXIED and not place.authority and serving():
            return _proxied(place)
        return read_store(opened(str(place), self._tracking_uri), str(place))

    def _run(self, place: Place) -> str:
        if place.authority or not place.parts:
            raise UnsafeModelError(f"{place} does not name a run of this server.")
        run = self._tracking().get_run(place.parts[0])
        return "/".join((str(run.info.artifact_uri).rstrip("/"), *place.parts[1:]))

    def _tracking(self) -> Any:
        if serving():
            from mlflow.server.handlers import _get_tracking_store

            return _get_tracking_store()
        from mlflow.tracking._tracking_service.utils import _get_store

        return _get_store(self._tracking_uri)  # type: ignore[no-untyped-call]


def serving() -> bool:
    """Whether this process is an MLflow server's."""
    return bool(os.environ.get(_SERVER))


def opened(uri: str, tracking_uri: str | None = None) -> Store:
    """MLflow's artifact repository of a URI."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return cast(Store, get_artifact_repository(uri, tracking_uri=tracking_uri))


def _proxied(place: Place) -> dict[str, bytes]:
    """What clients are served under `mlflow-artifacts:`, read as the server itself does."""
    from mlflow.server import handlers
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    store = handlers._get_artifact_repo_mlflow_artifacts()  # type: ignore[no-untyped-call]
    path = handlers._get_workspace_scoped_repo_path_if_enabled(place.inner)
    if not path:
        raise UnsafeModelError(f"{place} is the whole artifact store.")
    if isinstance(store, LocalArtifactRepository):
        folder, root = Path(store.artifact_dir, path), Path(store.artifact_dir)
        if not folder.resolve().is_relative_to(root.resolve()):
            raise UnsafeModelError(f"{place} is a link that leads out of the artifact store.")
        return _folder(folder)
    return read_store(cast(Store, store), str(place), below=path)


def _folder(folder: Path) -> dict[str, bytes]:
    try:
        return read_folder(folder)
    except OSError as error:
        raise RegistryError(
            f"the version's folder cannot be read: {error.strerror or error}."
        ) from error
