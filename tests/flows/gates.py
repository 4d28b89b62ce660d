"""Gated servers for tests: settings, keys and a content root in a folder, and certified versions.

    with gated(folder) as gate:
        version = gate.certified("digits")        # a toy network under a certificate that passes
        gate.client.set_registered_model_alias("digits", "champion", version)

No network is trained: a certificate is signed about whatever bytes a test likes.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from flows.operators import Operator, toy_bundle
from flows.servers import MlflowServer, free_port, serving
from mlflow_kdguard.artifacts import CERTIFICATE


@dataclass
class Gate:
    """A running gated server, its operator, and a client."""

    server: MlflowServer
    operator: Operator
    client: MlflowClient
    database: str

    @property
    def uri(self) -> str:
        """The server's URI."""
        return self.server.uri

    def registered(
        self, name: str, files: Mapping[str, bytes], *, tags: Mapping[str, str] | None = None
    ) -> tuple[str, str]:
        """Store files under a run of their own, and register them: version and run id."""
        with contextlib.suppress(MlflowException):
            self.client.create_registered_model(name)
        run = self.client.create_run("0").info
        self.upload(run.run_id, files)
        version = self.client.create_model_version(
            name, f"{run.artifact_uri}/model", run_id=run.run_id, tags=dict(tags or {}),
            await_creation_for=0,
        )  # fmt: skip
        return str(version.version), str(run.run_id)

    def upload(self, run_id: str, files: Mapping[str, bytes], folder: str = "model") -> None:
        """Write files below a folder of a run's artifacts, over whatever is there."""
        import tempfile

        with tempfile.TemporaryDirectory() as place:
            for path, data in files.items():
                (Path(place) / path).parent.mkdir(parents=True, exist_ok=True)
                (Path(place) / path).write_bytes(data)
            self.client.log_artifacts(run_id, place, folder)

    def certified(self, name: str, files: Mapping[str, bytes] | None = None, **changes: Any) -> str:
        """A new version with a certificate that passes, unless something in it is changed."""
        held = toy_bundle() if files is None else files
        version, _ = self.registered(name, held)
        self.certify(name, version, self.operator.sign(
            self.operator.certificate(held, name, **changes)
        ))  # fmt: skip
        return version

    def certify(self, name: str, version: str, envelope: bytes) -> None:
        """Store a certificate with a version."""
        self.client.set_model_version_tag(name, version, CERTIFICATE, envelope.decode())

    def promote(self, name: str, version: str, alias: str = "champion") -> None:
        """Ask for a guarded alias."""
        self.client.set_registered_model_alias(name, alias, version)

    def alias(self, name: str, alias: str = "champion") -> str | None:
        """The version that an alias stands for."""
        found = self.client.get_registered_model(name).aliases.get(alias)
        return None if found is None else str(found)

    def location(self, name: str, version: str) -> str:
        """The URI that clients are sent to."""
        return str(self.client.get_model_version_download_uri(name, version))


@contextlib.contextmanager
def gated(
    folder: Path,
    *,
    database: str | None = None,
    workers: int = 1,
    auth: bool = False,
    app: bool = False,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    **stated: Any,
) -> Iterator[Gate]:
    """Start a gated server in `folder`; `database` defaults to an SQLite file there.

    `auth` puts MLflow's basic-auth before it (admin / gate-password-1), `app` runs our own app.
    What is `stated` goes to the settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    operator = Operator.install(folder / "operator", f"http://127.0.0.1:{port}", **stated)
    backend = database or f"sqlite:///{folder / 'mlflow.db'}"
    name = "kdguard" if app else "basic-auth" if auth else ""
    extra = {"KDGUARD_SERVER": str(operator.settings)}
    if app and not auth:
        extra["KDGUARD_AUTH"] = "none"
    if auth:
        extra |= _with_users(folder)
    command = [
        *("--registry-store-uri", f"kdguard+{backend}", "--workers", str(workers)),
        *(("--app-name", name) if name else ()),
        # On a busy machine uvicorn takes workers that still import for dead, for ever anew.
        *("--uvicorn-opts", "--timeout-worker-healthcheck 300"),
        *options,
    ]
    with (
        serving(
            folder,
            backend=backend,
            port=port,
            options=command,
            environment=extra | dict(environment or {}),
        ) as server,
        _signed_in(auth),
    ):
        client = MlflowClient(server.uri, server.uri)
        yield Gate(server, operator, client, backend)


@contextlib.contextmanager
def answering_quickly() -> Iterator[None]:
    """Clients that do not try again for minutes."""
    with _environment({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}):
        yield


def reasons(error: MlflowException) -> str:
    """What a refusal says; it must be a 403."""
    assert error.error_code == "PERMISSION_DENIED", error
    return str(error.message)


def _with_users(folder: Path) -> dict[str, str]:
    config = folder / "auth.ini"
    config.write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = sqlite:///{folder / 'auth.db'}\n"
        "admin_username = admin\nadmin_password = gate-password-1\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    return {"MLFLOW_AUTH_CONFIG_PATH": str(config), "MLFLOW_FLASK_SERVER_SECRET_KEY": "a test's"}


@contextlib.contextmanager
def _signed_in(auth: bool) -> Iterator[None]:
    admin = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "gate-password-1"}
    with _environment(admin if auth else {}):
        yield


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def heads(operator: Operator) -> list[dict[str, Any]]:
    """The heads that were published."""
    if not operator.heads.exists():
        return []
    return [json.loads(line) for line in operator.heads.read_text().splitlines() if line]
