"""/metrics and /health/ready: for machines that watch the server."""

import logging
import os

from fastapi import APIRouter, Request
from mlflow.exceptions import MlflowException
from mlflow.server.constants import PROMETHEUS_EXPORTER_ENV_VAR
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import JSONResponse, Response

from mlflow_kdguard.errors import KDGuardError
from mlflow_kdguard.plugin import log
from mlflow_kdguard.plugin.app.gated import GatedServer, now
from mlflow_kdguard.plugin.app.metrics import CONTENT_TYPE, Metrics
from mlflow_kdguard.plugin.server import content

_logger = logging.getLogger(__name__)

PROBES = "KDGUARD_PROBES"
"""Environment variable: `open` (default), or `users`, whose names are asked for on both routes."""


def router(server: GatedServer) -> APIRouter:
    """Both routes; MLflow's own exporter keeps /metrics where it is switched on."""
    routes = APIRouter()
    metrics = Metrics(server)

    def figures(request: Request) -> Response:
        _asked(server, request)
        return Response(metrics.text(now()), media_type=CONTENT_TYPE)

    @routes.get("/health/ready", summary="Whether this server can judge and log")
    def ready(request: Request) -> Response:
        _asked(server, request)
        checks = _checks(server)
        fine = all(checks.values())
        return JSONResponse({"ready": fine, "checks": checks}, 200 if fine else 503)

    taken = bool(os.environ.get(PROMETHEUS_EXPORTER_ENV_VAR))
    for path in ("/kdguard/metrics", *(() if taken else ("/metrics",))):
        routes.add_api_route(path, figures, summary="Figures for Prometheus")
    return routes


def _asked(server: GatedServer, request: Request) -> None:
    if os.environ.get(PROBES, "open") != "open":
        server.access.asker(request)


def _checks(server: GatedServer) -> dict[str, bool]:
    settings = server.readable()
    checks = {"settings": settings is not None, "database": False, "log": False, "content": False}
    try:
        with server.session() as session:
            checks["log"] = log.read_head(session) is not None
            checks["database"] = True
        if settings is not None:
            content.prepare(settings.stated.content)
            checks["content"] = True
    except (MlflowException, SQLAlchemyError, KDGuardError) as error:
        _logger.warning("The server is not ready: %s", error)
    return checks
