"""Where a version's bytes finally lie, and whether the operator allows to look there at all.

A place is compared in its parts, each unquoted until nothing is left to unquote, so that no
spelling of a path lies below a root that it leaves. Nothing here opens a connection.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mlflow_kdguard.errors import UnsafeModelError, UsageError

LONGEST_CHAIN = 8
"""Steps from a version's source to where its bytes lie; more are a circle."""

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_CHAINED = ("runs", "models")
_REMEDY = "Store the model below a root that the server's settings allow (allow:)."


@dataclass(frozen=True, slots=True)
class Place:
    """A scheme, an authority and the parts of a path, in their one normal form."""

    scheme: str
    authority: str
    parts: tuple[str, ...]

    @staticmethod
    def of(uri: str) -> "Place":
        """The place that a URI names; a plain absolute path is a file's.

        Raises UsageError for what has no place (relative, empty) or more than one reading:
        dots, backslashes, control characters, a user, a query, a fragment, an odd scheme.
        """
        if uri.startswith("/"):
            return Place("file", "", _parts(uri, uri))
        try:
            split = urlsplit(uri)
        except ValueError as error:
            raise _odd(uri, "is not a URI") from error
        if not _SCHEME.fullmatch(split.scheme):
            raise _odd(uri, "is neither a URI nor an absolute path")
        if "@" in split.netloc or split.query or split.fragment or "?" in uri or "#" in uri:
            raise _odd(uri, "holds a user, a query or a fragment")
        if not split.path.startswith("/") and (split.path or not split.netloc):
            raise _odd(uri, "is relative")
        authority = split.netloc.lower()
        if split.scheme == "file" and authority == "localhost":
            authority = ""
        return Place(split.scheme, authority, _parts(split.path, uri))

    def within(self, root: "Place") -> bool:
        """Whether this place is `root` or lies below it."""
        same = (self.scheme, self.authority) == (root.scheme, root.authority)
        return same and self.parts[: len(root.parts)] == root.parts

    @property
    def path(self) -> Path:
        """The path of a file's place."""
        return Path("/", *self.parts)

    @property
    def inner(self) -> str:
        """The parts, joined."""
        return "/".join(self.parts)

    def __str__(self) -> str:
        return f"{self.scheme}:{f'//{self.authority}' if self.authority else ''}/{self.inner}"


def resolve(source: str, step: Callable[[str], str]) -> Place:
    """The place at the end of the chain that starts at `source`.

    `step` gives what a `runs:/` or `models:/` URI stands for. Raises UsageError for a place that
    is none, UnsafeModelError for a chain that does not end.
    """
    for _ in range(LONGEST_CHAIN):
        place = Place.of(source)
        if place.scheme not in _CHAINED:
            return place
        source = step(source)
    raise UnsafeModelError("the version's source is a chain that does not end.", remedy=_REMEDY)


def refuse_outside(place: Place, roots: Iterable[Place]) -> None:
    """Raise UnsafeModelError unless `place` lies below one of `roots`.

    Folders are compared once more where they really are, so that no link leads out of a root.
    """
    found = [root for root in roots if place.within(root)]
    if place.scheme == "file":
        real = place.path.resolve()
        found = [root for root in found if real.is_relative_to(root.path.resolve())]
    if not found:
        raise UnsafeModelError(
            f"the version's bytes lie at {place}, outside of every allowed root.", remedy=_REMEDY
        )


def _parts(path: str, uri: str) -> tuple[str, ...]:
    parts = tuple(_unquoted(part) for part in path.split("/") if part)
    for part in parts:
        if part in (".", "..") or "/" in part or "\\" in part or not part.isprintable():
            raise _odd(uri, "has a path with more than one reading")
    return parts


def _unquoted(part: str) -> str:
    while (shorter := unquote(part)) != part:
        part = shorter
    return part


def _odd(uri: str, why: str) -> UsageError:
    return UsageError(f"the place {uri[:500]!r} {why}.", remedy=_REMEDY)
