"""Attempts with the way in: other routes and methods, bodies that are read in two ways."""

import gzip
import json
from typing import Any

from flows.attacks.table import PLAIN, Attempt, Scene, attack
from flows.attacks.world import Version, World

NO_ROUTE = (400, 403, 404, 405, 415)
"""What a server answers to a request that reaches no store, or that the store refuses."""


def _pair(w: World) -> tuple[Version, Version]:
    """A model whose champion is certified, and a version of it that is not."""
    return w.standing(), w.rival()


PATHS = {
    "ajax": "/ajax-api/2.0/mlflow/registered-models/alias",
    "preview": "/api/2.0/preview/mlflow/registered-models/alias",
    "ajax-preview": "/ajax-api/2.0/preview/mlflow/registered-models/alias",
    "version-3": "/api/3.0/mlflow/registered-models/alias",
    "trailing-slash": "/api/2.0/mlflow/registered-models/alias/",
    "double-slash": "/api/2.0/mlflow//registered-models/alias",
    "leading-double-slash": "//api/2.0/mlflow/registered-models/alias",
    "dot": "/api/2.0/./mlflow/registered-models/alias",
    "dots": "/api/2.0/x/../mlflow/registered-models/alias",
    "dots-encoded": "/api/2.0/x/%2e%2e/mlflow/registered-models/alias",
    "slash-encoded": "/api/2.0/mlflow/registered-models%2falias",
    "letter-encoded": "/api/2.0/mlflow/registered-models/%61lias",
    "upper-case": "/API/2.0/mlflow/registered-models/alias",
    "semicolon": "/api/2.0/mlflow/registered-models/alias;x=1",
    "null": "/api/2.0/mlflow/registered-models/alias%00",
}


@attack(15, variants=PATHS)
def other_path(w: World, path: str) -> Scene:
    good, bad = _pair(w)
    body = {"name": bad.name, "alias": "champion", "version": bad.number}
    # requests would tidy the path: it is sent as it is.
    yield Attempt(lambda: _raw(w, "POST", path, json.dumps(body).encode()),
                  status=NO_ROUTE, logged=None, serves=(good,))  # fmt: skip


def _raw(w: World, method: str, path: str, body: bytes, **headers: str) -> Any:
    import requests

    base = requests.Request(
        method, w.server.uri, data=body, headers={"Content-Type": "application/json"} | headers
    )
    prepared = w.http.prepare_request(base)
    prepared.url = f"{w.server.uri}{path}"
    return w.http.send(prepared, timeout=60)


METHODS = ("PUT", "PATCH", "GET", "HEAD", "OPTIONS", "TRACE", "MERGE")


@attack(15, variants={m: m for m in METHODS})
def other_method(w: World, method: str) -> Scene:
    good, bad = _pair(w)
    body = json.dumps({"name": bad.name, "alias": "champion", "version": bad.number}).encode()
    yield Attempt(lambda: _raw(w, method, PATHS["ajax"].replace("/ajax-api", "/api"), body),
                  status=(*NO_ROUTE, 200, 204), logged=None, serves=(good,))  # fmt: skip


OVERRIDES = {
    "method-override": {"X-HTTP-Method-Override": "POST"},
    "method": {"X-HTTP-Method": "POST"},
    "original-url": {"X-Original-URL": "/api/2.0/mlflow/registered-models/alias"},
    "rewrite-url": {"X-Rewrite-URL": "/api/2.0/mlflow/registered-models/alias"},
    "forwarded": {"X-Forwarded-For": "127.0.0.1", "Forwarded": "for=127.0.0.1"},
    "workspace": {"X-MLFLOW-WORKSPACE": "elsewhere"},
    "workspace-default": {"X-MLFLOW-WORKSPACE": "default"},
    "text": {"Content-Type": "text/plain"},
    "form": {"Content-Type": "application/x-www-form-urlencoded"},
    "kdguard": {"X-Kdguard-Override": "true", "X-Kdguard-Actor": "admin"},
}


@attack(15, variants=OVERRIDES)
def odd_headers(w: World, headers: dict[str, str]) -> Scene:
    good, bad = _pair(w)
    body = json.dumps({"name": bad.name, "alias": "champion", "version": bad.number}).encode()
    yield Attempt(
        lambda: _raw(w, "POST", "/api/2.0/mlflow/registered-models/alias", body, **headers),
        status=(*NO_ROUTE, PLAIN), logged=None, serves=(good,),
    )  # fmt: skip


BODIES: dict[str, Any] = {
    "harmless-first": lambda n, v: (
        f'{{"name":"{n}","alias":"x","version":"{v}","alias":"champion"}}'
    ),
    "harmless-last": lambda n, v: (
        f'{{"name":"{n}","alias":"champion","version":"{v}","version":"{v}"}}'
    ),
    "version-twice": lambda n, v: (
        f'{{"name":"{n}","alias":"champion","version":"1","version":"{v}"}}'
    ),
    "name-twice": lambda n, v: f'{{"name":"x","alias":"champion","version":"{v}","name":"{n}"}}',
    "escaped": lambda n, v: f'{{"name":"{n}","alias":"\\u0063hampion","version":"{v}"}}',
    "escaped-key": lambda n, v: f'{{"name":"{n}","\\u0061lias":"champion","version":"{v}"}}',
    "as-text": lambda n, v: json.dumps(json.dumps({"name": n, "alias": "champion", "version": v})),
    "key-upper": lambda n, v: f'{{"Name":"{n}","name":"{n}","alias":"champion","version":"{v}"}}',
    "more-keys": lambda n, v: json.dumps(
        {"name": n, "alias": "champion", "version": v, "certificate": "x", "force": True}
    ),
    "bom": lambda n, v: "\ufeff" + json.dumps({"name": n, "alias": "champion", "version": v}),
    "list": lambda n, v: json.dumps([{"name": n, "alias": "champion", "version": v}]),
    "number-alias": lambda n, v: json.dumps({"name": n, "alias": 7, "version": v}),
    "trailing": lambda n, v: json.dumps({"name": n, "alias": "champion", "version": v}) + "//",
}


@attack(15, variants=BODIES)
def body_that_reads_two_ways(w: World, body: Any) -> Scene:
    good, bad = _pair(w)
    data = body(bad.name, bad.number).encode()
    yield Attempt(
        lambda: _raw(w, "POST", "/api/2.0/mlflow/registered-models/alias", data),
        status=(400, 403, 404, PLAIN), logged=None, serves=(good,),
    )  # fmt: skip


ENCODINGS = {
    "utf-16": lambda b: (b.decode().encode("utf-16"), {}),
    "utf-32": lambda b: (b.decode().encode("utf-32"), {}),
    "gzip": lambda b: (gzip.compress(b), {"Content-Encoding": "gzip"}),
    "empty": lambda b: (b"", {}),
}


@attack(15, variants=ENCODINGS)
def body_in_another_encoding(w: World, encode: Any) -> Scene:
    good, bad = _pair(w)
    fields = {"name": bad.name, "alias": "champion", "version": bad.number}
    data, headers = encode(json.dumps(fields).encode())
    query = "&".join(f"{k}={v}" for k, v in fields.items())
    path = f"/api/2.0/mlflow/registered-models/alias?{query}"
    yield Attempt(
        lambda: _raw(w, "POST", path, data, **headers),
        status=(400, 403, 404), logged=None, serves=(good,),
    )  # fmt: skip


# ── Stages ──────────────────────────────────────────────────────────────────────────────────────


@attack(15, variants={s: s for s in ("Production", "production", "PRODUCTION", "pRoDuCtIoN")})
def stage_route(w: World, stage: str) -> Scene:
    version = w.version(certified=False)
    yield Attempt(lambda: w.stage(version, stage), says=("certificate",))


STAGES = {
    "accent": "Prod\u00faction",
    "space": "Production ",
    "newline": "Production\n",
    "full-width": "\uff30roduction",
    "zero-width": "Prod\u200buction",
    "nobody": "Live",
}


@attack(15, variants=STAGES)
def odd_stage(w: World, stage: str) -> Scene:
    version = w.version(certified=False)
    yield Attempt(lambda: w.stage(version, stage), status=(400, 403), logged=None)


@attack(15)
def stage_that_archives_the_certified(w: World) -> Scene:
    good = w.version()
    assert w.stage(good).ok
    bad = w.version(good.name, seed=1, certified=False)
    yield Attempt(lambda: w.stage(bad, archive=True), says=("certificate",), serves=(good,))


@attack(15)
def stage_by_the_ajax_route(w: World) -> Scene:
    version = w.version(certified=False)
    body = {"name": version.name, "version": version.number, "stage": "Production",
            "archiveExistingVersions": False}  # fmt: skip
    yield Attempt(
        lambda: w.call("model-versions/transition-stage", body, api="/ajax-api/2.0/mlflow/")
    )


@attack(15)
def stage_with_both_spellings_of_a_key(w: World) -> Scene:
    good = w.version()
    assert w.stage(good).ok
    bad = w.version(good.name, seed=1, certified=False)
    body = {"name": bad.name, "version": bad.number, "stage": "Production",
            "archive_existing_versions": False, "archiveExistingVersions": True}  # fmt: skip
    yield Attempt(lambda: w.call("model-versions/transition-stage", body),
                  status=(400, 403), logged=None, serves=(good,))  # fmt: skip


# ── Neighbours ──────────────────────────────────────────────────────────────────────────────────


@attack(15)
def graphql(w: World) -> Scene:
    good, bad = _pair(w)
    query = (
        f"mutation {{ setRegisteredModelAlias(input: {{name: {json.dumps(bad.name)}, "
        f'alias: "champion", version: {json.dumps(bad.number)}}}) {{ apiError {{ message }} }} }}'
    )
    yield Attempt(lambda: w.call("", {"query": query}, api="/graphql"),
                  status=(200, 400, 403, 404, 405), logged=None, serves=(good,))  # fmt: skip


@attack(15)
def alias_of_an_mcp_server(w: World) -> Scene:
    """MLflow keeps aliases of MCP servers, too: not among those of models."""
    good, bad = _pair(w)
    body = {"alias": "champion", "version": bad.number}
    yield Attempt(
        lambda: w.call(f"mcp-servers/{bad.name}/aliases", body, api="/api/3.0/mlflow/"),
        status=(200, 400, 403, 404, 422), logged=None, serves=(good,),
    )  # fmt: skip


@attack(15)
def version_with_both_spellings_of_the_run(w: World) -> Scene:
    good = w.champion()
    body = {"name": good.name, "source": good.source, "run_id": good.run_id, "runId": "other",
            "tags": []}  # fmt: skip
    yield Attempt(lambda: w.call("model-versions/create", body), status=(400,), logged=None,
                  serves=(good,))  # fmt: skip
