"""One connection to MLflow: explicit URIs, no global state, answers within seconds."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import SplitResult, quote, urlsplit, urlunsplit

import mlflow
import requests
from mlflow.tracking import MlflowClient

from mlflow_kdguard.config import RegistrySection
from mlflow_kdguard.errors import KDGuardError, RegistryError
from mlflow_kdguard.registry.database import make_whole

_SECONDS = 5.0
"""How long a server may take to accept a connection before it counts as not there."""

# MLflow retries a server that is down for minutes, prints links among our JSON, and draws bars.
# Whatever the user has set stays.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_OURS = "kdguard+"
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


class Connection:
    """A client, and the two URIs that it speaks to.

    Raises RegistryError naming the URI where nothing answers there within seconds.
    """

    def __init__(self, section: RegistrySection) -> None:
        for key, value in _ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        self.tracking_uri = section.tracking_uri or mlflow.get_tracking_uri()
        chosen = section.registry_uri or os.environ.get("MLFLOW_REGISTRY_URI")
        self.registry_uri = chosen or self.tracking_uri
        for uri in dict.fromkeys((self.tracking_uri, self.registry_uri)):
            refuse_unreachable(uri)
        with self.answering("open the stores"):
            make_whole(self.tracking_uri)
            self.client = MlflowClient(self.tracking_uri, self.registry_uri)

    @property
    def identity(self) -> str:
        """The registry's URI without credentials: what a certificate binds itself to."""
        return without_password(self.registry_uri.removeprefix(_OURS))

    def artifact_location(self, experiment: str) -> str | None:
        """Where a new experiment's artifacts go: beside an SQLite file; else the server's choice.

        MLflow itself would put them below whatever folder the command was started in.
        """
        parts = urlsplit(self.tracking_uri)
        file = _database(parts)
        if parts.scheme != "sqlite" or file is None:
            return None
        place = file.absolute().parent / "mlartifacts"
        return str(place / quote(experiment, safe=""))

    @contextmanager
    def answering(self, request: str) -> Iterator[None]:
        """Turn whatever MLflow raises while asked to `request` into a RegistryError."""
        try:
            yield
        except KDGuardError:
            raise
        except Exception as error:  # artifact stores raise the errors of their own clients
            where = without_password(self.tracking_uri)
            if self.registry_uri != self.tracking_uri:
                where += f" (registry {without_password(self.registry_uri)})"
            raise RegistryError(
                f"MLflow at {where} did not {request}: {_first_line(error)}",
                remedy="Check the URI, the server's log and your permissions.",
            ) from error


def refuse_unreachable(uri: str) -> None:
    """Ask once whether anything listens at `uri`, since MLflow itself asks for minutes.

    Raises RegistryError; files and schemes that cannot be asked cheaply are left to MLflow.
    """
    try:
        parts = urlsplit(uri.removeprefix(_OURS))
    except ValueError as error:
        raise RegistryError(f"{uri!r} is not the URI of an MLflow server.") from error
    scheme = parts.scheme.partition("+")[0]
    try:
        if scheme in ("http", "https"):
            requests.get(uri.removeprefix(_OURS).rstrip("/") + "/health", timeout=_SECONDS)
        elif scheme in _DATABASE_PORTS and parts.hostname:
            port = parts.port or _DATABASE_PORTS[scheme]
            socket.create_connection((parts.hostname, port), timeout=_SECONDS).close()
        elif scheme == "sqlite":
            _refuse_no_folder(parts)
    except (OSError, ValueError) as error:  # every error of requests is an OSError
        raise RegistryError(
            f"MLflow cannot be reached at {without_password(uri)} ({type(error).__name__}).",
            remedy="Start the server, or name the right URI (--tracking-uri, MLFLOW_TRACKING_URI).",
        ) from error


def without_password(uri: str) -> str:
    """The URI as it may be shown and recorded: no user, no password, no query."""
    parts = urlsplit(uri)
    if not parts.netloc:
        return uri
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _refuse_no_folder(parts: SplitResult) -> None:
    file = _database(parts)
    if file is None:
        return
    place = next((p for p in (file, *file.parents) if p.exists()), Path())
    if not os.access(place, os.W_OK) or place.is_dir() is (place == file):
        raise PermissionError(str(place))


def _database(parts: SplitResult) -> Path | None:
    """The file of an SQLite URI; None for a database in memory."""
    file = parts.path[1:] + (f"#{parts.fragment}" if parts.fragment else "")
    return None if file in ("", ":memory:") else Path(file)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:500]
