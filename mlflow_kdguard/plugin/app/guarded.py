"""Which places nobody may write to: where the bytes of guarded versions came from, and lie.

A version is guarded while it carries a guarded alias or stage. Its source stays immutable, too,
although what it serves is a copy: the next promotion, and anyone who compares, reads it.

The answer is kept until the log or the settings move: every change of a guarded alias or stage
writes an entry of the log in its own transaction.
"""

import logging
from collections.abc import Callable, Iterator
from threading import Lock
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.store.artifact.utils.models import _parse_model_uri
from mlflow.store.model_registry.dbmodels.models import SqlModelVersion
from mlflow.utils.workspace_context import ServerWorkspaceContext
from sqlalchemy import select

from mlflow_kdguard.errors import KDGuardError
from mlflow_kdguard.plugin.app.facts import candidates, marks_of
from mlflow_kdguard.plugin.app.spots import Guarded, Spot, spots_of
from mlflow_kdguard.plugin.log.chain import read_head
from mlflow_kdguard.plugin.server.settings import Settings

_logger = logging.getLogger(__name__)

_LONGEST_CHAIN = 16
_VERSION: Any = SqlModelVersion
Key = tuple[int, str, str]


class Immutable:
    """The places that guard artifacts now. `store` is the gated registry store of this server."""

    def __init__(
        self,
        store: Any,
        tracking: Any,
        settings: Callable[[], Settings],
        *,
        served: str | None,
    ) -> None:
        self._store, self._tracking, self._settings = store, tracking, settings
        self.served = served
        self._lock = Lock()
        self._content = _content(settings())
        self._known: tuple[Key, Guarded] | None = None

    def now(self) -> Guarded:
        """Every guarded place; SQLAlchemy's errors where the database does not answer."""
        settings = self._readable()
        # The primary database: a replica may not have heard of the last promotion yet.
        with self._store.ManagedSessionMaker(read_only=False) as session:
            head = read_head(session)
            digest = "" if settings is None else settings.digest
            key = None if head is None else (head.seq, head.digest, digest)
            with self._lock:
                if key is not None and self._known is not None and self._known[0] == key:
                    return self._known[1]
            spots = Guarded(self._spots(session, settings))
        with self._lock:
            self._known = None if key is None else (key, spots)
        return spots

    def _readable(self) -> Settings | None:
        """The settings; None where they cannot be read, so that every alias counts as guarded."""
        try:
            return self._settings()
        except KDGuardError:
            _logger.exception("Settings cannot be read; every alias counts as guarded.")
            return None

    def _spots(self, session: Any, settings: Settings | None) -> Iterator[Spot]:
        if settings is not None:
            self._content = _content(settings)
        for uri in self._content:
            yield from spots_of(uri, served=self.served)
        seen: set[tuple[str, str]] = set()
        for found in candidates(session):
            if marks_of(settings, found):
                for uri in (found.source, found.storage):
                    for location in self._locations(session, found.key[0], uri, seen):
                        yield from spots_of(location, served=self.served)

    def _locations(
        self, session: Any, workspace: str, uri: str, seen: set[tuple[str, str]], depth: int = 0
    ) -> Iterator[str]:
        """Where a source ends: itself, or all that a `models:` or `runs:` chain passes."""
        if not uri or (workspace, uri) in seen or depth > _LONGEST_CHAIN:
            return
        seen.add((workspace, uri))
        scheme = uri.partition(":")[0].lower()
        if scheme == "models":
            ends = self._model(session, workspace, uri)
        elif scheme == "runs":
            ends = self._run(workspace, uri)
        else:
            yield uri
            return
        for end in ends:
            yield from self._locations(session, workspace, end, seen, depth + 1)

    def _model(self, session: Any, workspace: str, uri: str) -> list[str]:
        try:
            parsed = _parse_model_uri(uri)
            if parsed.model_id is not None:
                return [self.logged_model(workspace, parsed.model_id)]
        except MlflowException:
            return []
        asked = select(_VERSION.source, _VERSION.storage_location).where(
            _VERSION.workspace == workspace,
            _VERSION.name == parsed.name,
            _VERSION.version == int(parsed.version or 0),
        )
        return [uri for row in session.execute(asked) for uri in row if uri]

    def _run(self, workspace: str, uri: str) -> list[str]:
        run, _, path = uri.partition(":")[2].strip("/").partition("/")
        try:
            return [f"{self.run(workspace, run).info.artifact_uri.rstrip('/')}/{path}"]
        except MlflowException:
            return []

    def storage(self, workspace: str, name: str, version: str) -> str:
        """Where clients are sent for a model version; MlflowException where there is none."""
        with ServerWorkspaceContext(workspace):
            return str(self._store.get_model_version_download_uri(name, version))

    def logged_model(self, workspace: str, model_id: str) -> str:
        """Where a logged model's artifacts lie; MlflowException where there is none."""
        with ServerWorkspaceContext(workspace):
            return str(self._tracking.get_logged_model(model_id).artifact_location)

    def experiment(self, workspace: str, experiment_id: str) -> str:
        """Where an experiment's runs put artifacts; MlflowException where there is none."""
        with ServerWorkspaceContext(workspace):
            return str(self._tracking.get_experiment(experiment_id).artifact_location)

    def run(self, workspace: str, run_id: str) -> Any:
        """A run; MlflowException where there is none."""
        with ServerWorkspaceContext(workspace):
            return self._tracking.get_run(run_id)


def _content(settings: Settings) -> tuple[str, ...]:
    return (settings.stated.content.root, settings.stated.content.served)
