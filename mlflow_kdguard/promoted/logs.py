"""Where a sweep reads the log: from the registry's database, or from the server that shows it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from mlflow_kdguard.attest.signing import Verifier
from mlflow_kdguard.errors import RegistryError, UsageError
from mlflow_kdguard.plugin import log
from mlflow_kdguard.promoted.history import History
from mlflow_kdguard.promoted.report import LogState
from mlflow_kdguard.registry import listing
from mlflow_kdguard.registry.client import Connection, without_password
from mlflow_kdguard.registry.database import sqlite_file

_SHOWN = (
    "the server shows entries, not the chain: name the database (--log-uri) to verify it, and use "
    "an account that may read every model"
)


@dataclass(frozen=True, slots=True)
class Database:
    """The log in a registry's database, checked with the keys that may have signed its heads.

    `heads` is the file that heads are published to: without it a cut tail does not show.
    """

    uri: str
    verifiers: Sequence[Verifier]
    heads: Path | None

    def state(self) -> LogState:
        """Verify the whole log. Raises RegistryError where it cannot be read."""
        with _connected(self.uri) as connection:
            report = log.verify(connection, verifiers=self.verifiers, heads=self.heads)
        return LogState(
            source=without_password(self.uri),
            entries=report.entries,
            verified=True,
            problems=report.problems,
            notes=report.notes,
        )

    def history(self) -> History:
        """What the entries tell. Raises RegistryError where they cannot be read."""
        with _connected(self.uri) as connection:
            head = log.read_head(connection)
            until = 0 if head is None else head.seq
            return _told(map(dict, log.entries(connection, until=until)), self.uri)


@dataclass(frozen=True, slots=True)
class Server:
    """The log as kdguard's app shows it to whoever may read the models."""

    connection: Connection

    def state(self) -> LogState | None:
        """How much of it is shown; None where the server shows none."""
        found = listing.log_entries(self.connection)
        if found is None:
            return None
        where = self.connection.identity
        return LogState(source=where, entries=len(found), verified=False, notes=(_SHOWN,))

    def history(self) -> History:
        """What the entries tell."""
        where = self.connection.identity
        return _told(listing.log_entries(self.connection) or (), where)


def _told(rows: Iterable[Mapping[str, Any]], where: str) -> History:
    try:
        return History.of(rows)
    except (KeyError, TypeError, ValueError) as error:
        raise RegistryError(
            f"the log at {without_password(where)} holds an entry that nobody can have logged.",
            remedy="Run `kdguard server log verify`.",
        ) from error


class _connected:  # noqa: N801  (read as a word in a with statement)
    """A connection to a database that is there, for reading."""

    def __init__(self, uri: str) -> None:
        self._uri = uri.removeprefix("kdguard+")

    def __enter__(self) -> Any:
        file = sqlite_file(self._uri)
        if file is not None and not file.exists():  # SQLite would create it
            raise UsageError(f"there is no database {file}.", remedy="Check --log-uri.")
        try:
            self._engine = create_engine(self._uri, poolclass=NullPool)
            self._connection = self._engine.connect()
            log.require_current(self._connection)
        except (ArgumentError, ImportError, SQLAlchemyError) as error:
            raise _unreadable(self._uri, error) from error
        return self._connection

    def __exit__(self, kind: Any, error: BaseException | None, _trace: Any) -> None:
        self._connection.close()
        if isinstance(error, SQLAlchemyError):
            raise _unreadable(self._uri, error) from error


def _unreadable(uri: str, error: Exception) -> RegistryError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return RegistryError(
        f"the log at {without_password(uri)} cannot be read: {first}",
        remedy="Name the registry's database, with its driver: postgresql+psycopg2://….",
    )
