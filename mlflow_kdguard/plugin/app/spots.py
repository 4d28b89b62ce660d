"""Where bytes lie, in one spelling.

Two URIs that any store could take for the same object must compare equal, or a write under the
second spelling would replace what is guarded under the first. So paths are decoded fully, folded
(NFKC, casefold), and read in every way that a store might: one reading that hits is a hit. That
takes a few different objects for one, which refuses too much and never too little.
"""

import os
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOCAL = "file:"
PROXIED = "mlflow-artifacts:"
ANCHOR = "mlflow-artifacts"
"""The segment of a route, or of an `http` artifact URI, that artifact paths come behind."""


@dataclass(frozen=True, slots=True)
class Spot:
    """A store (scheme and authority) and the parts of a path in it, both canonical."""

    store: str
    parts: tuple[str, ...]

    def above(self) -> Iterator["Spot"]:
        """Every folder that this spot lies in, the outermost first, without itself."""
        return (Spot(self.store, self.parts[:n]) for n in range(len(self.parts)))

    def below(self, parts: tuple[str, ...]) -> "Spot":
        """The spot of canonical `parts` in this folder."""
        return Spot(self.store, self.parts + parts)


def decoded(text: str) -> str:
    """`text` percent-decoded until nothing changes: MLflow and its stores decode repeatedly."""
    while (shorter := unquote(text)) != text:
        text = shorter
    return text


def splits_of(text: str) -> frozenset[tuple[str, ...]]:
    """Every way to split a decoded path into canonical parts.

    What splits for one store is part of a name for another: `\\`, a slash that only NFKC makes, a
    `..` that is followed or left out. Following it alone would lead a reader out of a folder that
    the store is still in.
    """
    if text.isascii() and "\\" not in text and ".." not in text:
        return frozenset({tuple(p for p in text.lower().split("/") if p not in ("", "."))})
    forms = {text, text.replace("\\", "/")}
    forms.add(unicodedata.normalize("NFKC", text).replace("\\", "/"))
    split = [[p for p in form.split("/") if p not in ("", ".")] for form in forms]
    return frozenset(_canonical(way(parts)) for parts in split for way in (_followed, _left_out))


def _canonical(parts: Iterable[str]) -> tuple[str, ...]:
    return tuple(unicodedata.normalize("NFKC", part).casefold() for part in parts)


def _followed(parts: list[str]) -> list[str]:
    kept: list[str] = []
    for part in parts:
        if part == "..":
            del kept[-1:]
        else:
            kept.append(part)
    return kept


def _left_out(parts: list[str]) -> list[str]:
    return [part for part in parts if part != ".."]


def readings(path: str) -> frozenset[tuple[str, ...]]:
    """Every way in which a server may read an artifact path that a request names.

    MLflow takes `file:1/x?y` for `1/x`: it decodes the path, then follows it as a URI.
    """
    plain = decoded(path)
    texts = {plain, plain.split("?")[0].split("#")[0]}
    texts |= {_without_scheme(text) for text in tuple(texts)}
    return frozenset(parts for text in texts for parts in splits_of(text))


def _without_scheme(text: str) -> str:
    head, colon, rest = text.lstrip("/").partition(":")
    return rest if colon and "/" not in head else text


def spots_of(uri: str, *, served: str | None) -> frozenset[Spot]:
    """Every spot that an artifact URI may name; `served` is the server's artifacts destination.

    A proxied URI (`mlflow-artifacts:`, or `http(s):` with the route in its path) lies below the
    destination; without one it lies nowhere that this server could write. A local path is also
    given with its links resolved.
    """
    split = urlsplit(uri)
    scheme = split.scheme.lower()
    if scheme in ("http", "https", ANCHOR):
        path = split.path if scheme == ANCHOR else _behind_anchor(split.path)
        roots = () if served is None or path is None else _roots(served)
        return frozenset(root.below(parts) for root in roots for parts in readings(path or ""))
    if scheme in ("", "file") or len(scheme) == 1:
        return frozenset(_local(split.path if scheme == "file" else uri))
    authority = unquote(split.netloc).casefold()
    return frozenset(Spot(f"{scheme}://{authority}", parts) for parts in readings(split.path))


@lru_cache(maxsize=4)
def _roots(served: str) -> frozenset[Spot]:
    return spots_of(served, served=None)


def _behind_anchor(path: str) -> str | None:
    _, found, rest = decoded(path).partition(f"/{ANCHOR}/artifacts/")
    return rest if found else None


def _local(path: str) -> Iterable[Spot]:
    for text in {path, unquote(path)}:
        absolute = os.path.normpath(Path.cwd() / text)
        for form in {absolute, os.path.realpath(absolute)}:
            yield from (Spot(LOCAL, parts) for parts in splits_of(form))


class Guarded:
    """Places that nobody writes to, asked in time that does not grow with their number."""

    def __init__(self, spots: Iterable[Spot]) -> None:
        self._spots = frozenset(spots)
        self._above = frozenset(folder for spot in self._spots for folder in spot.above())

    def __len__(self) -> int:
        return len(self._spots)

    def touched_by(self, target: Spot, *, recursive: bool) -> bool:
        """Whether writing `target` changes a guarded spot; `recursive` also from above it."""
        inside = target in self._spots or any(f in self._spots for f in target.above())
        return inside or (recursive and target in self._above)
