"""Real servers for tests: an MLflow server and PostgreSQL, on free loopback ports.

`conftest.py` offers the fixtures to every flow. Everything that is started is killed at the end,
also where a test fails.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from requirements import postgres_program, require

PATIENCE = float(os.environ.get("KDGUARD_PATIENCE", "120"))
"""Seconds that a server may take to answer on a busy machine."""


@dataclass(frozen=True)
class MlflowServer:
    """A running `mlflow server`: its URI, its folder and its log."""

    uri: str
    folder: Path
    process: "subprocess.Popen[bytes]"

    @property
    def artifacts(self) -> Path:
        """Where the server keeps artifacts."""
        return self.folder / "artifacts"

    @property
    def log(self) -> str:
        """What the server has printed so far."""
        return (self.folder / "server.log").read_text(errors="replace")


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(
    folder: Path,
    *,
    backend: str | None = None,
    port: int | None = None,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[MlflowServer]:
    """Start `mlflow server`, by default on an SQLite file in `folder` and on a free port."""
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    command = [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", backend or f"sqlite:///{folder / 'mlflow.db'}"),
        *("--artifacts-destination", str(folder / "artifacts")),
        *options,
    ]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    unset = {"MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"}
    inherited = {key: value for key, value in os.environ.items() if key not in unset}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=inherited | quiet | dict(environment or {}),
            cwd=folder,
            start_new_session=True,
        )
    server = MlflowServer(f"http://127.0.0.1:{port}", folder, process)
    try:
        _wait_until_healthy(server)
        yield server
    finally:
        kill_group(process)


def kill_group(process: "subprocess.Popen[bytes]") -> None:
    """End a process that leads its own session, and everything that it started."""
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 30.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One MLflow server on SQLite for the whole session."""
    with serving(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """SQLAlchemy URI of an empty database of a PostgreSQL of our own, for the whole session."""
    with postgres(tmp_path_factory.mktemp("postgres")) as uri:
        yield uri


@pytest.fixture(scope="session")
def postgres_server(
    postgres_uri: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MlflowServer]:
    """One MLflow server on PostgreSQL for the whole session."""
    with serving(tmp_path_factory.mktemp("mlflow-pg"), backend=postgres_uri) as server:
        yield server


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Start PostgreSQL on a free loopback port, as an unprivileged user where we are root.

    The URI names its driver, because `postgresql://` means another one since SQLAlchemy 2.1.
    """
    found = {name: postgres_program(name) for name in ("initdb", "postgres")}
    require("postgres", all(found.values()), f"PostgreSQL's programs were not found: {found}")
    if os.geteuid() == 0:
        require("postgres", shutil.which("setpriv") is not None, "setpriv was not found")
    port, data = free_port(), _owned(folder)
    _run_as_owner(
        [
            str(found["initdb"]),
            "-D",
            str(data),
            "-U",
            "kdguard",
            "-A",
            "trust",
            "--no-sync",
            "-E",
            "UTF8",
        ]
    )
    command = [
        *(str(found["postgres"]), "-D", str(data), "-p", str(port)),
        *("-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={data}"),
        *("-c", "fsync=off", "-c", "full_page_writes=off", "-c", "max_connections=40"),
    ]
    with (folder / "postgres.log").open("wb") as log:
        process = subprocess.Popen(
            [*_owner_prefix(), *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd="/",
            start_new_session=True,
        )
    try:
        _wait_for_postgres(process, port, folder / "postgres.log")
        yield f"postgresql+psycopg2://kdguard@127.0.0.1:{port}/postgres"
    finally:
        kill_group(process)
        shutil.rmtree(data, ignore_errors=True)


def _owned(folder: Path) -> Path:
    """A data folder that PostgreSQL's user can reach: pytest's own are closed to others."""
    if os.geteuid() != 0:
        return folder / "data"
    import tempfile

    data = Path(tempfile.mkdtemp(prefix="kdguard-pg-"))
    user = _user()
    os.chown(data, user.pw_uid, user.pw_gid)
    return data


def _user() -> pwd.struct_passwd:
    known = {user.pw_name: user for user in pwd.getpwall()}
    found = [known[name] for name in ("postgres", "nobody") if name in known]
    require("postgres", bool(found), "there is no unprivileged user to run PostgreSQL as")
    return found[0]


def _owner_prefix() -> list[str]:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return []
    user = _user()
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


def _run_as_owner(command: Sequence[str]) -> None:
    done = subprocess.run(
        [*_owner_prefix(), *command], check=False, capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, f"{command[0]} failed: {done.stdout}\n{done.stderr}"


def _wait_for_postgres(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    import psycopg2

    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            psycopg2.connect(
                host="127.0.0.1", port=port, user="kdguard", dbname="postgres", connect_timeout=5
            ).close()
        except psycopg2.OperationalError as error:
            dead, late = process.poll() is not None, time.monotonic() > deadline
            if dead or late:
                text = log.read_text(errors="replace")
                raise AssertionError(f"PostgreSQL did not start:\n{text}") from error
            time.sleep(0.1)
        else:
            return


def _wait_until_healthy(server: MlflowServer) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and server.process.poll() is None:
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{server.uri}/health", timeout=5).ok:
                return
        time.sleep(0.2)
    raise AssertionError(f"the MLflow server did not start:\n{server.log}")
