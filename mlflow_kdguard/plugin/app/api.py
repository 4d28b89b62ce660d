"""The API: /api/2.0/kdguard/verify, nonces, log, status, openapi.json."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    PERMISSION_DENIED,
    RESOURCE_DOES_NOT_EXIST,
)
from pydantic import BaseModel, ConfigDict, Field

from mlflow_kdguard import __version__
from mlflow_kdguard.plugin import log
from mlflow_kdguard.plugin.app import facts
from mlflow_kdguard.plugin.app.access import Asker
from mlflow_kdguard.plugin.app.gated import GatedServer, workspace
from mlflow_kdguard.records import Decision

API = "/api/2.0/kdguard"
PAGE = 100
"""Entries of the log on one page, at most."""


Text = Annotated[str, Field(max_length=256, pattern=r"^[^\x00]*$")]
"""What every database takes: PostgreSQL has no text with a NUL in it."""
Name = Annotated[Text, Field(min_length=1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class VersionAsked(_Body):
    """A model version, and the guarded alias or stage that it is judged for."""

    name: Name
    version: str = Field(pattern=r"^[0-9]{1,10}$")
    alias: Text = Field("", description="empty: the model's first guarded alias")


class NonceAsked(_Body):
    """The model, and the SHA-256 of the `model.onnx` that is about to be measured."""

    name: Name
    subject: str = Field(pattern=r"^[0-9a-f]{64}$")


class NonceGiven(BaseModel):
    """A nonce for one measurement, and the how-manieth attempt at this model it is."""

    nonce: str
    attempt: int
    name: str
    subject: str
    issued: str


class LogPage(BaseModel):
    """Entries of the log, the newest first; `next` is the `before` of the page behind them."""

    entries: list[dict[str, Any]]
    next: int | None


class Status(BaseModel):
    """What this server enforces, and where its log stands."""

    version: str
    mode: str
    settings_version: int
    settings_sha256: str
    policy_sha256: str
    nonces: str
    content: str
    log: dict[str, Any] | None


def router(server: GatedServer, app: FastAPI) -> APIRouter:
    """The routes of the API."""
    routes = APIRouter(prefix=API)
    _asked(routes, server)
    _told(routes, server)

    @routes.get("/openapi.json", include_in_schema=False)
    def openapi(_asker: Annotated[Asker, Depends(server.access.asker)]) -> dict[str, Any]:
        return app.openapi()

    return routes


def _asked(routes: APIRouter, server: GatedServer) -> None:
    """What verifiers ask for."""
    User = Annotated[Asker, Depends(server.access.asker)]

    @routes.post("/verify", summary="Judge a model version as promotion would, without acting")
    def verify(asked: VersionAsked, asker: User, _json: _Json) -> Decision:
        _must_read(server, asker, asked.name)
        return server.judge(asked.name, asked.version, asked.alias)

    @routes.post("/nonces", summary="Hand out a nonce: one attempt at measuring a model")
    def nonces(asked: NonceAsked, asker: User, _json: _Json) -> NonceGiven:
        # Every nonce makes the next attempt stricter: not for whoever may only look.
        if not server.access.may_edit(asker, workspace(), asked.name):
            raise MlflowException("Permission denied", PERMISSION_DENIED)
        _must_exist(server, asked.name)
        given = server.nonce(asked.name, asked.subject, asker.name)
        return NonceGiven(
            nonce=given.nonce,
            attempt=given.attempt,
            name=given.model,
            subject=given.subject,
            issued=given.issued,
        )


def _told(routes: APIRouter, server: GatedServer) -> None:
    """What the server tells about itself."""
    User = Annotated[Asker, Depends(server.access.asker)]

    @routes.get("/log", summary="The log of guarded changes, the newest entries first")
    def entries(
        asker: User,
        before: Annotated[int | None, Query(ge=1)] = None,
        limit: Annotated[int, Query(ge=1, le=PAGE)] = 50,
        model: Text | None = None,
        action: Text | None = None,
    ) -> LogPage:
        found, behind = readable_log(
            server, asker, before=before, limit=limit, model=model, action=action
        )
        rows = [{name: getattr(e, name) for name in facts.LogEntry.__slots__} for e in found]
        return LogPage(entries=rows, next=behind)

    @routes.get("/status", summary="What this server enforces")
    def status(_asker: User) -> Status:
        settings = server.settings()
        with server.session() as session:
            head = log.read_head(session)
        return Status(
            version=__version__,
            mode=settings.stated.mode,
            settings_version=settings.version,
            settings_sha256=settings.digest,
            policy_sha256=settings.policy.digest,
            nonces=settings.stated.nonces,
            content=settings.stated.content.served,
            log=None if head is None else head.document(),
        )


def readable_log(
    server: GatedServer,
    asker: Asker,
    *,
    before: int | None,
    limit: int,
    model: str | None,
    action: str | None,
) -> tuple[list[facts.LogEntry], int | None]:
    """A page of the log without the models that the asker may not read, and where it goes on."""
    with server.session() as session:
        found = facts.log(session, before=before, limit=limit, model=model, action=action)
    known: dict[tuple[str, str], bool] = {}
    readable = [entry for entry in found if _shown_to(server, asker, entry, known)]
    return readable, found[-1].seq if len(found) == limit else None


def _shown_to(
    server: GatedServer, asker: Asker, entry: facts.LogEntry, known: dict[tuple[str, str], bool]
) -> bool:
    if asker.everything or not entry.model:
        return True
    key = (entry.workspace, entry.model)
    if key not in known:
        known[key] = server.access.may_read(asker, *key)
    return known[key]


def _json(request: Request) -> None:
    """JSON only: no form of another site can send it without the browser asking first."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise MlflowException("Content-Type must be application/json.", INVALID_PARAMETER_VALUE)


_Json = Annotated[None, Depends(_json)]


def _must_read(server: GatedServer, asker: Asker, model: str) -> None:
    if not server.access.may_read(asker, workspace(), model):
        raise MlflowException("Permission denied", PERMISSION_DENIED)


def _must_exist(server: GatedServer, model: str) -> None:
    """Attempts are counted for models that there are: nobody fills the log with names."""
    try:
        server.store.get_registered_model(model)
    except MlflowException as error:
        why = f"There is no registered model {model!r}."
        raise MlflowException(why, RESOURCE_DOES_NOT_EXIST) from error
