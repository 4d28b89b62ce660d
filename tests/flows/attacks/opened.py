"""Starting a registry to attack, and asking it with a clock at hand."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import requests

from flows.attacks.settled import SERVED, settled
from flows.attacks.world import ADMIN, World
from flows.servers import serving

SLOWEST = 5.0
"""Seconds within which an attempt must be over."""


@contextlib.contextmanager
def gated(
    folder: Path,
    database: str,
    *,
    app: bool = False,
    auth: bool = False,
    guarded: bool = True,
    workers: int = 2,
    kind: type[World] = World,
    options: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
    **changes: Any,
) -> Iterator[World]:
    """Start a gated server on `database`. `app`: with our app; `auth`: with basic-auth.

    Without `guarded` it is MLflow's own server, to compare with.
    """
    content = {"root": (folder / "content").as_uri()} | ({"clients": SERVED} if app else {})
    registry = ["--registry-store-uri", f"kdguard+{database}"] if guarded else []
    settings, keys = settled(folder, folder / "artifacts", **{"content": content} | changes)
    name = ["--app-name", "kdguard"] if app else ["--app-name", "basic-auth"] if auth else []
    users = _users(folder)
    serve = partial(
        serving,
        folder,
        backend=database,
        options=[
            *(*registry, "--workers", str(workers)),
            # On a busy machine uvicorn takes workers that still import for dead, for ever anew.
            *("--uvicorn-opts", "--timeout-worker-healthcheck 300"),
            *(*name, *options),
        ],
        environment={
            "KDGUARD_SERVER": str(settings),
            "KDGUARD_AUTH": "basic" if auth else "none",
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "not a secret",
            "MLFLOW_AUTH_CONFIG_PATH": str(users),
            **dict(environment or {}),
        },
    )
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serve())
        world = kind(server, database, settings, keys, app=app, auth=auth)
        world.again = lambda: stack.enter_context(serve())
        yield world
        world.engine.dispose()
        world.http.close()


def _users(folder: Path) -> Path:
    """Basic-auth's configuration, with an administrator."""
    place = folder / "auth.ini"
    # One hash of a password costs more than a whole promotion: it is remembered for the test.
    place.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder / 'auth.db'}\n"
        f"admin_username = {ADMIN[0]}\nadmin_password = {ADMIN[1]}\nauth_cache_ttl_seconds = 3600\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    return place


def parsed(answer: requests.Response) -> dict[str, Any]:
    """The JSON of an answer; an empty mapping where it is none."""
    with contextlib.suppress(json.JSONDecodeError):
        value = answer.json()
        return value if isinstance(value, dict) else {}
    return {}


def timed(call: Any) -> tuple[requests.Response, float]:
    """An answer and the seconds that it took."""
    begin = time.monotonic()
    return call(), time.monotonic() - begin
