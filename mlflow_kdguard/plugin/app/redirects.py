"""Reads of promoted bytes, sent to our own route of the content root.

MLflow would look for them in the artifacts destination: there, whoever may write could stand in.
"""

import re
from collections.abc import Callable
from urllib.parse import parse_qsl, urlencode

from starlette.types import Scope

from mlflow_kdguard.plugin.app.spots import readings
from mlflow_kdguard.plugin.app.writes import proxied_path

CONTENT = "kdguard-content"
"""First part of proxied paths that name the content root."""
CONTENT_ROUTE = "/api/2.0/kdguard/content"
SERVED = f"mlflow-artifacts:/{CONTENT}/"
"""How the URI of a promoted version begins, where the app serves it."""
_VERSION_FILE = "/model-versions/get-artifact"
_ROUTE_ROOT = re.compile(r"^(.*?)/(?:ajax-)?api/2\.0/", re.IGNORECASE)


def names_content(path: str) -> bool:
    """Whether an artifact path may be read as one of the content root."""
    return any(parts[:1] == (CONTENT,) for parts in readings(path))


def of_content(scope: Scope) -> Scope:
    """A read of the content root, as MLflow's artifact client asks for it, on our own route."""
    path, query = str(scope["path"]), _query(scope)
    named = proxied_path(path)
    root = _ROUTE_ROOT.match(path)
    if named is None or root is None:
        return scope
    listed = not named
    if listed:
        named = next((v for k, v in query if k == "path" and names_content(v)), "")
    if not names_content(named):
        return scope
    inner = _inner(named)
    if "/presigned/" in path:
        return _sent(scope, f"{root.group(1)}{CONTENT_ROUTE}-presigned", path=inner)
    if listed:
        return _sent(scope, f"{root.group(1)}{CONTENT_ROUTE}-list", path=inner)
    return _sent(scope, f"{root.group(1)}{CONTENT_ROUTE}/{inner}")


def names_version(path: str) -> bool:
    """Whether this is the route on which MLflow's pages download a file of a model version."""
    return path.endswith(_VERSION_FILE)


def of_version(scope: Scope, storage: Callable[[str, str], str]) -> Scope:
    """A download of a promoted version's file on our own route; `storage` says where one lies."""
    asked = dict(reversed(_query(scope)))
    location = storage(asked.get("name", ""), asked.get("version", ""))
    if not location.startswith(SERVED):
        return scope
    prefix = str(scope["path"]).removesuffix(_VERSION_FILE)
    inner = f"{location.removeprefix(SERVED)}/{asked.get('path', '')}"
    return _sent(scope, f"{prefix}{CONTENT_ROUTE}/{inner}")


def _inner(named: str) -> str:
    return named.strip("/").partition("/")[2]


def _query(scope: Scope) -> list[tuple[str, str]]:
    return parse_qsl(scope["query_string"].decode("latin-1"))


def _sent(scope: Scope, target: str, **query: str) -> Scope:
    return {
        **scope,
        "path": target,
        "raw_path": target.encode("utf-8", "surrogatepass"),
        "query_string": urlencode(query).encode(),
    }
