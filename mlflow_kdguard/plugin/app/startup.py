"""What must hold before the app serves anything: it refuses to start where it cannot enforce."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow.environment_variables import _MLFLOW_AUTH_ADMIN_BOOTSTRAPPED, _MLFLOW_SGI_NAME
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from mlflow_kdguard.files import sha256
from mlflow_kdguard.plugin.app.access import AUTH
from mlflow_kdguard.plugin.app.redirects import CONTENT
from mlflow_kdguard.plugin.server.places import Place
from mlflow_kdguard.plugin.server.settings import Settings
from mlflow_kdguard.plugin.store.sql import GateMixin

APP = "kdguard"
BOOTSTRAPPED = _MLFLOW_AUTH_ADMIN_BOOTSTRAPPED.name
_REMEDY = "See docs/reference/app.md."


def with_auth() -> bool:
    """Whether users are asked for, as KDGUARD_AUTH says; MlflowException for another word."""
    stated = os.environ.get(AUTH, "basic").strip().lower()
    if stated not in ("basic", "none"):
        raise refusal(f"{AUTH} is {stated!r}; it says `basic` or `none`.")
    return stated == "basic"


def refuse_other_servers(name: str | None) -> None:
    """Only uvicorn runs all routes through ASGI: elsewhere a write would not pass the guard."""
    if name != "uvicorn":
        raise refusal(
            f"the app {APP} runs under uvicorn only, and this is {name or 'another server'}: "
            "nothing would stand between a client and the artifacts of guarded versions. Start "
            f"`mlflow server --app-name {APP}` without --gunicorn-opts and --waitress-opts."
        )


def refuse_ungated(store: Any) -> None:
    """Without a gated store anybody could set the aliases whose artifacts the app guards."""
    if not isinstance(store, GateMixin):
        raise refusal(
            f"the registry store is {type(store).__name__}, which does not gate. Start the server "
            "with --registry-store-uri kdguard+<database URI>."
        )


def refuse_unserved(settings: Settings) -> None:
    """Clients can only be sent to the one proxied folder that the app serves."""
    served = Place.of(settings.stated.content.served)
    if served.scheme == "mlflow-artifacts" and (served.authority, served.parts) != ("", (CONTENT,)):
        raise refusal(
            f"content.clients is {served}; the app serves mlflow-artifacts:/{CONTENT} only."
        )


def server_name() -> str | None:
    """The server that MLflow started this process under."""
    return os.environ.get(_MLFLOW_SGI_NAME.name)


def bootstrap_auth() -> None:
    """Create the users' database and the administrator, once: workers would race to do it.

    MLflow does so by itself for `--app-name basic-auth` only.
    """
    from mlflow.server import auth

    auth.get_flask_server_secret_key()
    with alone(str(auth.auth_config.database_uri)):
        auth.bootstrap_admin_user()
    os.environ[BOOTSTRAPPED] = "true"


@contextmanager
def alone(what: str) -> Iterator[None]:
    """Hold a lock of this machine that is named after `what`, so that workers do it in turn."""
    import fcntl

    name = f"kdguard-{os.getuid()}-{sha256(what.encode())[:16]}.lock"
    flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(Path(tempfile.gettempdir(), name), flags, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def refusal(why: str) -> MlflowException:
    """The error that ends the start of a server."""
    return MlflowException(f"kdguard does not start: {why} {_REMEDY}", INVALID_PARAMETER_VALUE)


def static_prefix() -> str:
    """MLflow's static prefix, without a slash at its end."""
    from mlflow.server.handlers import STATIC_PREFIX_ENV_VAR

    return os.environ.get(STATIC_PREFIX_ENV_VAR, "").rstrip("/")


def destination() -> str | None:
    """Where proxied artifacts are stored; None where this server serves none."""
    from mlflow.server.constants import ARTIFACTS_DESTINATION_ENV_VAR, SERVE_ARTIFACTS_ENV_VAR

    serving = os.environ.get(SERVE_ARTIFACTS_ENV_VAR) == "true"
    return os.environ.get(ARTIFACTS_DESTINATION_ENV_VAR) if serving else None
