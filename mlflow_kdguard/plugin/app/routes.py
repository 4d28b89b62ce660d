"""Our own routes inside of MLflow's app, before everything that MLflow serves.

They are an application of their own, with its own error documents and OpenAPI, that MLflow's
middleware (host check, CORS, workspaces) still stands in front of.
"""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, PERMISSION_DENIED
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from mlflow_kdguard import __version__
from mlflow_kdguard.errors import KDGuardError
from mlflow_kdguard.plugin.app import api, files, page, probes
from mlflow_kdguard.plugin.app.access import Refused
from mlflow_kdguard.plugin.app.gated import GatedServer

_logger = logging.getLogger(__name__)


def mount(app: FastAPI, server: GatedServer) -> None:
    """Serve our routes from `app`; MLflow's catch-all stands behind them."""
    app.router.routes.insert(0, _Own(own_app(server)))


def own_app(server: GatedServer) -> FastAPI:
    """The application that holds our routes, below the static prefix and without it."""
    app = FastAPI(
        title="mlflow-kdguard",
        version=__version__,
        summary="Judgements, nonces and the log of a gated MLflow registry.",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    probes_of = probes.router(server)
    for prefix in dict.fromkeys(("", server.prefix)):
        shown = prefix == server.prefix
        app.include_router(api.router(server, app), prefix=prefix, include_in_schema=shown)
        app.include_router(files.router(server), prefix=prefix, include_in_schema=False)
        app.include_router(page.router(server), prefix=prefix, include_in_schema=False)
        app.include_router(probes_of, prefix=prefix, include_in_schema=shown)
    _answer_errors(app)
    return app


class _Own(BaseRoute):
    """Whatever our application has a path for, whichever the method."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """FULL where one of our routes has the path, so that MLflow never sees it."""
        if scope["type"] != "http":
            return Match.NONE, {}
        known = (route.matches(scope)[0] for route in self._app.routes)
        return (Match.NONE, {}) if all(m is Match.NONE for m in known) else (Match.FULL, {})

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request."""
        await self._app(scope, receive, send)


def _answer_errors(app: FastAPI) -> None:
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(MlflowException, _mlflow)
    app.add_exception_handler(KDGuardError, _ours)
    app.add_exception_handler(SQLAlchemyError, _database)
    app.add_exception_handler(RequestValidationError, _malformed)


def document(error: MlflowException) -> Response:
    """An error as MLflow's REST API writes it."""
    headers: Mapping[str, str] = {"Content-Type": "application/json"}
    told: Any = error
    return Response(told.serialize_as_json(), told.get_http_status_code(), headers)


def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response


def _mlflow(_request: Request, error: Exception) -> Response:
    assert isinstance(error, MlflowException)
    return document(error)


def _ours(_request: Request, error: Exception) -> Response:
    """A 403: clients of MLflow try every 5xx again, for minutes."""
    return document(MlflowException(str(error), PERMISSION_DENIED))


def _database(_request: Request, error: Exception) -> Response:
    _logger.error("The registry's database does not answer.", exc_info=error)
    message = "The registry's database does not answer."
    return JSONResponse({"error_code": "TEMPORARILY_UNAVAILABLE", "message": message}, 503)


def _malformed(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    told = "; ".join(f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors())
    return document(MlflowException(f"{told}.", INVALID_PARAMETER_VALUE))
