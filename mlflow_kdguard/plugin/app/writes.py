"""What a request would write: the routes of an MLflow server that change artifacts.

One table says which routes those are; a test holds it against every route that MLflow serves, so
that a new one fails there. `writes_of` reads a request as MLflow will, and in every way that is
ambiguous (repeated parameters, camelCase beside snake_case, encodings): all of it counts.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import product
from urllib.parse import parse_qsl

from mlflow_kdguard.errors import ModelError
from mlflow_kdguard.plugin.app.spots import ANCHOR, decoded

READ_ONLY = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
BODY_LIMIT = 1 << 20
"""Bytes of a JSON body that are read to see what it names; MLflow's own bodies are far smaller."""


class Owner(Enum):
    """What a written path is relative to."""

    PROXY = "proxy"
    RUN = "run"
    LOGGED_MODEL = "logged model"
    EXPERIMENT = "experiment"
    URI = "uri"


@dataclass(frozen=True, slots=True)
class Write:
    """A write of `path` below what `owner` names (`key`); `recursive` changes all below it, too."""

    owner: Owner
    key: str
    path: str
    recursive: bool = False


@dataclass(frozen=True, slots=True)
class BodyRoute:
    """A route whose JSON body names what is written: fields (snake_case) by owner."""

    suffix: str
    owners: tuple[tuple[str, Owner], ...]
    path: str = ""


BODY_ROUTES = (
    BodyRoute(
        "/mlflow/artifacts/presigned-upload-url",
        (("run_id", Owner.RUN), ("model_id", Owner.LOGGED_MODEL)),
        path="path",
    ),
    BodyRoute("/mlflow/experiments/create", (("artifact_location", Owner.URI),)),
    BodyRoute("/mlflow/runs/create-promptlab-run", (("experiment_id", Owner.EXPERIMENT),)),
)
UPLOAD = "/mlflow/upload-artifact"
PROXY_VERBS = {"artifacts": 1, "presigned": 1, "mpu": 2}
"""Segments between `mlflow-artifacts` and the artifact's path, by the first of them."""


def body_route(method: str, path: str) -> BodyRoute | None:
    """The route whose body must be read before `writes_of` can answer."""
    if method in READ_ONLY:
        return None
    plain = _route(path)
    return next((route for route in BODY_ROUTES if plain.endswith(route.suffix)), None)


def writes_of(method: str, path: str, query: str, body: bytes = b"") -> tuple[Write, ...]:
    """Everything that a request may write to; nothing for a request that writes no artifact.

    `path` is the routed path, `query` the raw query string. Raises ModelError for a body that
    cannot be read.
    """
    if method in READ_ONLY:
        return ()
    plain = _route(path)
    if plain.endswith(UPLOAD):
        return tuple(_uploads(query))
    if (route := body_route(method, path)) is not None:
        return tuple(_named(route, body))
    return tuple(_proxied(method, path))


def proxied_path(path: str) -> str | None:
    """What a request on the proxied artifacts names, or None where its path has no such route."""
    segments = decoded(path).replace("\\", "/").split("/")
    for index, segment in enumerate(segments):
        rest = [part for part in segments[index + 1 :] if part]
        if segment.casefold() == ANCHOR and rest and rest[0].casefold() in PROXY_VERBS:
            return "/".join(rest[PROXY_VERBS[rest[0].casefold()] :])
    return None


def _route(path: str) -> str:
    return "/" + "/".join(part for part in decoded(path).casefold().split("/") if part)


def _proxied(method: str, path: str) -> Iterator[Write]:
    named = proxied_path(path)
    if named is not None:
        yield Write(Owner.PROXY, "", named, recursive=method == "DELETE")


def _uploads(query: str) -> Iterator[Write]:
    pairs = parse_qsl(query, keep_blank_values=True)
    runs = [value for key, value in pairs if key in ("run_uuid", "run_id")]
    paths = [value for key, value in pairs if key == "path"]
    return (Write(Owner.RUN, run, path) for run, path in product(runs, paths))


def _named(route: BodyRoute, body: bytes) -> Iterator[Write]:
    pairs = _pairs(body)
    paths = _values(pairs, route.path) if route.path else [""]
    for field, owner in route.owners:
        for key, path in product(_values(pairs, field), paths):
            yield Write(owner, key, path)


def _pairs(body: bytes) -> Sequence[tuple[str, object]]:
    """Every member of a JSON object, repeated ones too; an old client's JSON in a JSON string."""
    try:
        read = json.loads(body or b"{}", object_pairs_hook=_Members)
        if isinstance(read, str):
            read = json.loads(read, object_pairs_hook=_Members)
    except (ValueError, RecursionError) as error:
        raise ModelError("the request's body is not JSON.") from error
    return read if isinstance(read, _Members) else ()


class _Members(list[tuple[str, object]]):
    """The members of a JSON object, in order."""


def _values(pairs: Sequence[tuple[str, object]], field: str) -> list[str]:
    head, *rest = field.split("_")
    camel = head + "".join(word.capitalize() for word in rest)
    return [str(value) for key, value in pairs if key in (field, camel) and value not in (None, "")]
