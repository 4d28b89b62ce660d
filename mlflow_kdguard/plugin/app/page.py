"""The page at /kdguard: guarded models, their certificates, what was refused, and the log.

Written on the server, without a script. Every text that a client may have chosen is escaped by the
templates, and the browser is told to run and load nothing else.
"""

from importlib.resources import files
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import jinja2
from fastapi import APIRouter, Depends, Query
from starlette.responses import HTMLResponse, Response

from mlflow_kdguard.plugin import log
from mlflow_kdguard.plugin.app import facts, figures
from mlflow_kdguard.plugin.app.access import Asker
from mlflow_kdguard.plugin.app.api import readable_log
from mlflow_kdguard.plugin.app.gated import GatedServer, now
from mlflow_kdguard.plugin.app.shown import rules, shown

PAGE = "/kdguard"
ROWS = 50
"""Rows of a table on one page."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
ACTIONS = (
    ("", "everything"),
    (facts.REFUSALS, "refusals"),
    ("promote", "promotions"),
    ("demote", "demotions"),
    ("override", "overrides"),
    ("nonce", "attempts"),
    ("settings", "settings"),
)
_STATIC = {"page.css": "text/css", "icon.svg": "image/svg+xml"}


def router(server: GatedServer) -> APIRouter:
    """The routes of the page."""
    routes = APIRouter(prefix=PAGE)
    views = _Views(server)
    User = Annotated[Asker, Depends(server.access.asker)]

    @routes.get("")
    def models(
        asker: User, workspace: str = "", name: str = "", version: int | None = None
    ) -> Response:
        return views.models(asker, None if version is None else (workspace, name, version))

    @routes.get("/version")
    def one(
        asker: User,
        workspace: str,
        name: str,
        version: Annotated[int, Query(ge=0, le=2**31 - 1)],
    ) -> Response:
        return views.version(asker, (workspace, name, version))

    @routes.get("/log")
    def entries(
        asker: User,
        before: Annotated[int | None, Query(ge=1, le=2**63 - 1)] = None,
        model: str = "",
        action: str = "",
    ) -> Response:
        return views.log(asker, before, model, action)

    for name, kind in _STATIC.items():
        routes.add_api_route(f"/{name}", _static(name, kind))
    return routes


def _static(name: str, kind: str) -> Any:
    data = files("mlflow_kdguard.plugin.app").joinpath("static", name).read_bytes()
    headers = HEADERS | {"Cache-Control": "max-age=3600"}

    def serve() -> Response:
        return Response(data, media_type=kind, headers=headers)

    return serve


class _Views:
    def __init__(self, server: GatedServer) -> None:
        self._server = server
        self._root = server.prefix + PAGE
        self._templates = _environment()

    def models(self, asker: Asker, after: facts.Key | None) -> Response:
        settings, moment = self._server.readable(), now()
        with self._server.session() as session:
            found = facts.guarded(session, settings, after=after, limit=ROWS + 1)
        behind = found[ROWS - 1].key if len(found) > ROWS else None
        rows = [
            (one, shown(one.envelope, settings, one.key[0], one.key[1], moment))
            for one in found[:ROWS]
            if self._server.access.may_read(asker, one.key[0], one.key[1])
        ]
        refusals = self._log(asker, 10, action=facts.REFUSALS) if after is None else []
        return self._page(
            "models.html",
            asker,
            here="models",
            rows=rows,
            refusals=refusals,
            first=self._root if after is not None else None,
            following=self._root + _key(behind) if behind else None,
        )

    def version(self, asker: Asker, key: facts.Key) -> Response:
        settings, moment = self._server.readable(), now()
        workspace, model, number = key
        with self._server.session() as session:
            held = facts.held(session, settings, key)
            if held is None or not self._server.access.may_read(asker, workspace, model):
                return self._page("missing.html", asker, here="", status=404)
            one = shown(held.envelope, settings, workspace, model, moment)

            def handed_out(nonce: str) -> bool:
                found = log.nonces.find(session, nonce)
                return found is not None and (found.workspace, found.model) == (workspace, model)

            told = (
                ()
                if settings is None
                else rules(one, settings, model, now=moment, handed_out=handed_out)
            )
        return self._page(
            "version.html",
            asker,
            here="",
            held=held,
            one=one,
            rules=told,
            entries=self._log(asker, 20, model=model),
            log_link=f"{self._root}/log?{urlencode({'model': model})}",
            mlflow_link=f"{self._server.prefix}/#/models/{quote(model, safe='')}/versions/{number}",
        )

    def log(self, asker: Asker, before: int | None, model: str, action: str) -> Response:
        found, behind = readable_log(
            self._server, asker, before=before, limit=ROWS, model=model, action=action
        )
        filters = {key: value for key, value in (("model", model), ("action", action)) if value}
        path = f"{self._root}/log?"
        refused = action == facts.REFUSALS
        return self._page(
            "log.html",
            asker,
            here="refusals" if refused else "log",
            heading="Refusals" if refused else "Log",
            entries=found,
            model=model,
            action=action,
            actions=ACTIONS,
            first=path + urlencode(filters) if before is not None else None,
            following=path + urlencode(filters | {"before": behind}) if behind else None,
        )

    def _log(self, asker: Asker, limit: int, **filters: str) -> list[facts.LogEntry]:
        values = {"model": None, "action": None} | filters
        return readable_log(self._server, asker, before=None, limit=limit, **values)[0]

    def _page(
        self, name: str, asker: Asker, *, here: str, status: int = 200, **values: Any
    ) -> Response:
        nav = [
            ("Guarded models", self._root, "models"),
            ("Refusals", f"{self._root}/log?action={facts.REFUSALS}", "refusals"),
            ("Log", f"{self._root}/log", "log"),
        ]
        text = self._templates.get_template(name).render(
            root=self._root,
            nav=nav,
            here=here,
            asker=asker,
            settings=self._server.readable(),
            version_link=self._version_link,
            **values,
        )
        return HTMLResponse(text, status, headers=HEADERS)

    def _version_link(self, workspace: str, name: str, version: object) -> str:
        return f"{self._root}/version" + _key((workspace or "default", name, version))


def _key(key: tuple[str, str, object]) -> str:
    return "?" + urlencode(dict(zip(("workspace", "name", "version"), key, strict=True)))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mlflow_kdguard.plugin.app"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figures"] = figures.figures
    environment.filters["title_of"] = figures.title
    environment.filters["limits"] = figures.limits
    return environment
