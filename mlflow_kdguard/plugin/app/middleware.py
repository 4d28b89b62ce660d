"""The guard in front of an MLflow server: artifacts of guarded versions are read-only.

It stands outside of everything that MLflow serves, because MLflow answers artifact routes in two
frameworks, and only here do both pass. It decides by what a request names (`writes`) and where that
may lie (`spots`); bodies of artifacts stream through untouched.
"""

import logging
from collections.abc import Iterable, Iterator
from functools import partial

from anyio.to_thread import run_sync
from mlflow.exceptions import MlflowException
from mlflow.server.workspace_helpers import resolve_workspace_for_request_if_enabled
from mlflow.utils.workspace_utils import DEFAULT_WORKSPACE_NAME, WORKSPACE_HEADER_NAME
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlflow_kdguard.errors import ModelError
from mlflow_kdguard.plugin.app import redirects
from mlflow_kdguard.plugin.app.access import Access, Refused
from mlflow_kdguard.plugin.app.guarded import Immutable
from mlflow_kdguard.plugin.app.spots import PROXIED, Guarded, Spot, readings, spots_of
from mlflow_kdguard.plugin.app.writes import (
    BODY_LIMIT,
    Owner,
    Write,
    body_route,
    writes_of,
)

_logger = logging.getLogger(__name__)


class ArtifactGuard:
    """ASGI middleware: refuses writes to guarded artifacts, and serves reads of the content root.

    A refusal is a 403 with MLflow's own error document, or the 401 of basic-auth for whoever does
    not say who they are.
    """

    def __init__(self, app: ASGIApp, *, immutable: Immutable, access: Access) -> None:
        self._app, self._immutable, self._access = app, immutable, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] in ("GET", "HEAD"):
            await self._app(await self._redirected(scope), receive, send)
            return
        refusal, receive = await self._judged(scope, receive)
        await (refusal or self._app)(scope, receive, send)

    async def _redirected(self, scope: Scope) -> Scope:
        if redirects.names_version(scope["path"]):
            return await run_sync(redirects.of_version, scope, partial(self._storage, scope))
        return redirects.of_content(scope)

    def _storage(self, scope: Scope, name: str, version: str) -> str:
        try:
            return self._immutable.storage(_workspace(Request(scope)), name, version)
        except MlflowException:
            return ""  # MLflow says why

    async def _judged(self, scope: Scope, receive: Receive) -> tuple[Response | None, Receive]:
        method, path = scope["method"], scope["path"]
        body = b""
        if body_route(method, path) is not None:
            body, complete = await _read(receive)
            receive = _replayed(body, receive)
            if not complete:
                return _denied(f"The request's body is larger than {BODY_LIMIT} bytes."), receive
        try:
            writes = writes_of(method, path, scope["query_string"].decode("latin-1"), body)
        except ModelError as error:
            return _denied(f"Artifacts of guarded versions cannot change: {error}"), receive
        if not writes:
            return None, receive
        return await run_sync(self._refusal, Request(scope), writes), receive

    def _refusal(self, request: Request, writes: Iterable[Write]) -> Response | None:
        why = self._why_not(request, writes)
        if why is None:
            return None
        try:
            asker = self._access.asker(request)
        except Refused as refused:
            return refused.response
        _logger.warning("Refused %s %r for %s: %s", request.method, request.url.path, asker, why)
        return _denied(why)

    def _why_not(self, request: Request, writes: Iterable[Write]) -> str | None:
        try:
            guarded: Guarded | None = None
            workspace = _workspace(request)
            for write in writes:
                if write.owner is Owner.PROXY and redirects.names_content(write.path):
                    return f"'{redirects.CONTENT}' holds what was promoted; no route writes there."
                guarded = guarded or self._immutable.now()
                spots = self._spots(write, workspace)
                if any(guarded.touched_by(spot, recursive=write.recursive) for spot in spots):
                    return (
                        "The artifacts of a model version with a guarded alias or stage cannot "
                        f"change: {write.path or write.key!r}. Register a new version."
                    )
        except (SQLAlchemyError, MlflowException):
            _logger.exception("Cannot tell what is guarded.")
            return "The registry's database does not say which artifacts are guarded. Try again."
        return None

    def _spots(self, write: Write, workspace: str) -> Iterator[Spot]:
        """Every place that a write may reach."""
        paths = readings(write.path)
        for base in self._bases(write, workspace):
            for spot in spots_of(base, served=self._immutable.served):
                yield from (spot.below(parts) for parts in paths)

    def _bases(self, write: Write, workspace: str) -> list[str]:
        """URIs that the write's path may be relative to; none where its owner does not exist."""
        immutable, key = self._immutable, write.key
        roots = [f"{PROXIED}/", f"{PROXIED}/workspaces/{workspace}"]
        if write.owner is Owner.PROXY:
            return roots
        if write.owner is Owner.URI:
            return [key]
        try:
            if write.owner is Owner.LOGGED_MODEL:
                return [immutable.logged_model(workspace, key)]
            if write.owner is Owner.EXPERIMENT:
                return [immutable.experiment(workspace, key)]
            info = immutable.run(workspace, key).info
        except MlflowException:
            return []
        usual = f"{info.experiment_id}/{info.run_id}/artifacts"
        return [str(info.artifact_uri), *(f"{root.rstrip('/')}/{usual}" for root in roots)]


def _workspace(request: Request) -> str:
    """The workspace that MLflow will serve the request in; MlflowException where it will not."""
    asked = request.headers.get(WORKSPACE_HEADER_NAME)
    found = resolve_workspace_for_request_if_enabled(request.scope["path"], asked)
    return DEFAULT_WORKSPACE_NAME if found is None else str(found.name)


async def _read(receive: Receive) -> tuple[bytes, bool]:
    chunks: list[bytes] = []
    size = 0
    while size <= BODY_LIMIT:
        message = await receive()
        chunk = message.get("body", b"")
        chunks.append(chunk)
        size += len(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks), size <= BODY_LIMIT
    return b"".join(chunks), False


def _replayed(body: bytes, receive: Receive) -> Receive:
    replies: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return replies.pop() if replies else await receive()

    return again


def _denied(why: str) -> Response:
    return JSONResponse({"error_code": "PERMISSION_DENIED", "message": why}, 403)
