"""The gated server that the app stands in front of: its store, its settings, its users."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.utils.workspace_context import get_request_workspace
from mlflow.utils.workspace_utils import DEFAULT_WORKSPACE_NAME

from mlflow_kdguard.errors import KDGuardError
from mlflow_kdguard.plugin import log
from mlflow_kdguard.plugin.app.access import Access
from mlflow_kdguard.plugin.server.settings import Settings
from mlflow_kdguard.records import Decision


class Reread:
    """The settings as the files say now; every call reads them, and parses what has changed."""

    def __init__(self, path: Path) -> None:
        self._lock = Lock()
        self._settings = Settings.load(path)

    def __call__(self) -> Settings:
        """The settings; KDGuardError where they cannot be read any more."""
        with self._lock:
            self._settings = self._settings.current()
            return self._settings


def now() -> datetime:
    """The time, with its zone."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class GatedServer:
    """What the routes need. `prefix` is MLflow's static prefix, without a slash at its end."""

    store: Any
    settings: Callable[[], Settings]
    access: Access
    prefix: str = ""

    def session(self, *, write: bool = False) -> AbstractContextManager[Any]:
        """A transaction in the registry's database."""
        return self.store.ManagedSessionMaker(read_only=not write)  # type: ignore[no-any-return]

    def judge(self, name: str, version: str, alias: str) -> Decision:
        """The judgement that setting a guarded alias would come to now; nothing is written.

        Raises MLflow's own error where there is no such version.
        """
        settings = self.settings()
        facts, prompt = self.store.gate.facts(name, version)
        if prompt:
            raise MlflowException(f"{name!r} is a prompt, not a model.", INVALID_PARAMETER_VALUE)
        asked = alias or settings.policy_for(name).guarded.aliases[0]
        return self.store.gate.judged(facts, asked, settings).decision  # type: ignore[no-any-return]

    def nonce(self, name: str, subject: str, actor: str) -> log.Nonce:
        """Hand out a nonce, in one transaction with its entry in the log."""
        settings = self.settings()
        with self.store.gate.transactions.logged(f"a nonce for {name!r}", settings) as written:
            given = log.nonces.issue(
                written.session,
                name,
                workspace(),
                subject,
                written.now,
                actor=actor,
                signer=settings.signer,
                verifiers=settings.verifiers,
            )
            written.wrote(given.entry)
        return given

    def readable(self) -> Settings | None:
        """The settings, or None where they cannot be read."""
        try:
            return self.settings()
        except KDGuardError:
            return None


def workspace() -> str:
    """The workspace of the request that is being served."""
    return get_request_workspace() or DEFAULT_WORKSPACE_NAME
