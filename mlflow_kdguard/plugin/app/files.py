"""Routes under which the content root is read: `middleware` sends MLflow's own reads of it here."""

from typing import Any

from fastapi import APIRouter, Request
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, RESOURCE_DOES_NOT_EXIST
from mlflow.store.model_registry.dbmodels.models import SqlModelVersion
from sqlalchemy import select
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse

from mlflow_kdguard.plugin.app import content
from mlflow_kdguard.plugin.app.access import Asker
from mlflow_kdguard.plugin.app.gated import GatedServer
from mlflow_kdguard.plugin.app.redirects import CONTENT, CONTENT_ROUTE

_VERSION: Any = SqlModelVersion
_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, no-cache"}


def router(server: GatedServer) -> APIRouter:
    """Download, list, and what stands for a presigned URL."""
    routes = APIRouter()

    @routes.get(CONTENT_ROUTE + "/{path:path}")
    def download(path: str, request: Request) -> Response:
        parts = _allowed(server, request, path)
        stated = server.settings().stated.content
        headers = _HEADERS | {"Content-Disposition": f'attachment; filename="{parts[-1]}"'}
        if stated.root.startswith(("/", "file:")):
            file = content.local(stated, parts)
            if file is None:
                raise _absent(path)
            return FileResponse(file, headers=headers, media_type="application/octet-stream")
        pieces = content.remote(stated, parts)
        first = next(pieces, b"")  # an error shows before the answer has begun
        return StreamingResponse(
            (piece for source in ((first,), pieces) for piece in source),
            headers=headers,
            media_type="application/octet-stream",
        )

    @routes.get(CONTENT_ROUTE + "-list")
    def listed(request: Request, path: str = "") -> Response:
        parts = _allowed(server, request, path)
        found = content.listing(server.settings().stated.content, parts)
        files = [
            {"path": f.name, "is_dir": f.folder, **({} if f.folder else {"file_size": f.size})}
            for f in found
        ]
        return JSONResponse({"files": files}, headers=_HEADERS)

    @routes.get(CONTENT_ROUTE + "-presigned")
    def presigned(request: Request, path: str = "") -> Response:
        """The proxied download itself: without a size, MLflow's client fetches it in one piece."""
        _allowed(server, request, path)
        url = f"/api/2.0/mlflow-artifacts/artifacts/{CONTENT}/{path}"
        return JSONResponse({"url": url, "headers": {}}, headers=_HEADERS)

    return routes


def _allowed(server: GatedServer, request: Request, path: str) -> tuple[str, ...]:
    """The parts of a path that the asker may read: with READ on a model that was promoted so."""
    asker = server.access.asker(request)
    parts = content.split(path)
    if parts is None:
        raise _absent(path)
    if not asker.everything and not _reads(server, asker, parts[0]):
        raise MlflowException("Permission denied", PERMISSION_DENIED)
    return parts


def _reads(server: GatedServer, asker: Asker, digest: str) -> bool:
    asked = (
        select(_VERSION.workspace, _VERSION.name, _VERSION.storage_location)
        .where(_VERSION.storage_location.like(f"%/{digest}"))
        .distinct()
    )
    with server.session() as session:
        found = session.execute(asked).all()
    return any(server.access.may_read(asker, workspace, name) for workspace, name, _ in found)


def _absent(path: str) -> MlflowException:
    return MlflowException(f"There is no {path!r} in the content root.", RESOURCE_DOES_NOT_EXIST)
