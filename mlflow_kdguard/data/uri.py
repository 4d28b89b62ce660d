"""The grammar of data URIs (`docs/reference/data.md`): `SOURCE[?OPTIONS][#SPLIT][[a:b]]`."""

import re
from dataclasses import dataclass
from pathlib import Path

from mlflow_kdguard.errors import DataError

_FRAGMENT = re.compile(r"(?P<split>[a-z]*)(?:\[(?P<start>[0-9]{0,12}):(?P<stop>[0-9]{0,12})\])?")
_ESCAPES = {"%23": "#", "%3f": "?", "%25": "%"}
_OPTIONS = {"size": "[0-9]{1,9}", "order": "shuffled"}
_LARGEST_SIDE = 4096


@dataclass(frozen=True, slots=True)
class Request:
    """A data URI, taken apart."""

    uri: str
    name: str
    path: Path | None = None
    size: int | None = None
    shuffled: bool = False
    split: str = ""
    start: int = 0
    stop: int | None = None

    def error(self, what: str, *, remedy: str) -> DataError:
        """A DataError that names this URI."""
        return DataError(f"data {self.uri}: {what}.", remedy=remedy)


def quote(path: str | Path) -> str:
    """`path` as it is written inside a URI: `%`, `#` and `?` escaped, everything else as it is.

    >>> quote("/data/take #2")
    '/data/take %232'
    """
    text = str(path)
    for escape, character in reversed(_ESCAPES.items()):
        text = text.replace(character, escape)
    return text


def parse(uri: str) -> Request:
    """Take a URI apart; DataError where it does not follow the grammar."""
    body, _, fragment = uri.partition("#")
    body, asks, query = body.partition("?")
    name, has_path, path = body.partition(":")
    request = Request(uri, name, Path(_unquote(path)) if path else None)
    if has_path and not path:
        raise request.error("no path follows the colon", remedy="Write for example npz:FILE.")
    split, start, stop = _fragment(request, fragment if "#" in uri else None)
    told = _options(request, query) if asks else {}
    size = _size(request, told["size"]) if "size" in told else None
    return Request(uri, name, request.path, size, "order" in told, split, start, stop)


def _unquote(path: str) -> str:
    # Only the three escapes that the grammar needs: any other % stands for itself.
    return re.sub(r"%(23|3[fF]|25)", lambda match: _ESCAPES[match[0].lower()], path)


def _fragment(request: Request, fragment: str | None) -> tuple[str, int, int | None]:
    if fragment is None:
        return "", 0, None
    match = _FRAGMENT.fullmatch(fragment)
    if not fragment or match is None:
        raise request.error(
            f"#{fragment} is neither a split nor a slice",
            remedy="Write #train, #test, #test[:200] or #[100:200]; a # in a path is written %23.",
        )
    start, stop = match["start"], match["stop"]
    return match["split"], int(start or 0), int(stop) if stop else None


def _options(request: Request, query: str) -> dict[str, str]:
    """`KEY=VALUE`, with & between two."""
    told: dict[str, str] = {}
    for each in query.split("&"):
        key, _, value = each.partition("=")
        fits = re.fullmatch(_OPTIONS.get(key, ""), value)
        if key not in _OPTIONS or key in told or fits is None:
            raise request.error(
                f"?{query} is not understood",
                remedy="Options are size=PIXELS and order=shuffled, with & between them; a ? in a "
                "path is written %3F.",
            )
        told[key] = value
    return told


def _size(request: Request, value: str) -> int:
    if not 1 <= int(value) <= _LARGEST_SIDE:
        raise request.error(
            f"size={value} is not between 1 and {_LARGEST_SIDE}", remedy="Choose a smaller image."
        )
    return int(value)
