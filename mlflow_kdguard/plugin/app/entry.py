"""`mlflow server --app-name kdguard`: what MLflow loads.

MLflow imports this module once in the process of the command line, before it starts workers, and
then in each worker. Only the first can still end the command with one clear error (a supervisor
starts workers that die over and over) and prepare users before workers race to do so, and MLflow
offers no other hook there: so importing this module under `mlflow server --app-name kdguard` checks
what the server needs. Anywhere else, importing it does nothing.
"""

import os
import secrets
from typing import Any

import click
from fastapi import FastAPI
from mlflow.environment_variables import _MLFLOW_INTERNAL_GATEWAY_AUTH_TOKEN
from mlflow.exceptions import MlflowException

from mlflow_kdguard.errors import KDGuardError
from mlflow_kdguard.plugin.app import startup
from mlflow_kdguard.plugin.app.access import Access, BasicAuth, Open
from mlflow_kdguard.plugin.app.gated import GatedServer, Reread
from mlflow_kdguard.plugin.app.guarded import Immutable
from mlflow_kdguard.plugin.app.middleware import ArtifactGuard
from mlflow_kdguard.plugin.app.routes import mount
from mlflow_kdguard.plugin.server import content
from mlflow_kdguard.plugin.server.settings import Settings, named


def create_app() -> FastAPI:
    """MLflow's app, on top of basic-auth unless KDGUARD_AUTH=none, with the guard in front of it.

    Raises MlflowException or KDGuardError where it could not enforce: another server than uvicorn,
    a registry store that does not gate, settings that cannot be read.
    """
    startup.refuse_other_servers(startup.server_name())
    path = named()
    settings = Reread(path)
    startup.refuse_unserved(settings())
    content.declare_served()
    app, access = _mlflow_app()
    from mlflow.server import handlers

    store = handlers._get_model_registry_store()
    startup.refuse_ungated(store)
    tracking = handlers._get_tracking_store()
    immutable = Immutable(store, tracking, settings, served=startup.destination())
    mount(app, GatedServer(store, settings, access, startup.static_prefix()))
    app.add_middleware(ArtifactGuard, immutable=immutable, access=access)
    return app


def _mlflow_app() -> tuple[FastAPI, Access]:
    if not startup.with_auth():
        from mlflow.server.fastapi_app import create_fastapi_app

        return create_fastapi_app(), Open()
    from mlflow.server import auth

    if os.environ.get(startup.BOOTSTRAPPED) != "true":
        startup.bootstrap_auth()
    return auth.create_app(), BasicAuth(auth)


def _before_workers(options: dict[str, Any]) -> None:
    """What the command line's process does once, before it starts any worker."""
    other = next((n for n in ("gunicorn", "waitress") if options.get(f"{n}_opts") is not None), "")
    startup.refuse_other_servers(other or "uvicorn")
    startup.refuse_unserved(Settings.load(named()))
    if options.get("artifacts_only"):
        raise startup.refusal("--artifacts-only serves no registry that could be gated.")
    from mlflow.server import handlers

    startup.refuse_ungated(handlers._get_model_registry_store())
    if startup.with_auth():
        startup.bootstrap_auth()
        # Workers and job processes share it, as MLflow arranges for --app-name basic-auth.
        os.environ.setdefault(_MLFLOW_INTERNAL_GATEWAY_AUTH_TOKEN.name, secrets.token_hex(32))


def _command_line() -> dict[str, Any] | None:
    """The options of the `mlflow server --app-name kdguard` that imports this module, if one is."""
    context = click.get_current_context(silent=True)
    options = {} if context is None else context.params
    return options if options.get("app_name") == startup.APP else None


if (_options := _command_line()) is not None:
    try:
        _before_workers(_options)
    except (MlflowException, KDGuardError) as _error:
        raise click.ClickException(str(_error)) from _error
