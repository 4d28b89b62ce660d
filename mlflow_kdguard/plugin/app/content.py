"""Reads of the content root, as MLflow's artifact client asks for them.

Promoted versions name `mlflow-artifacts:/kdguard-content/<digest>`. That is no folder of the
artifacts destination: whoever can write there must not be able to stand in for it.
"""

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_kdguard.errors import RegistryError
from mlflow_kdguard.plugin.server.places import Place
from mlflow_kdguard.plugin.server.reading import opened
from mlflow_kdguard.plugin.server.settings import Content

_DIGEST = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")
_DEEPEST = 4


@dataclass(frozen=True, slots=True)
class Listed:
    """A file or folder in a bundle."""

    name: str
    folder: bool
    size: int | None


def split(path: str) -> tuple[str, ...] | None:
    """The digest and the inner parts of a path below the content root; None for no such path."""
    parts = tuple(path.strip("/").split("/"))
    inner = parts[1:]
    known = _DIGEST.fullmatch(parts[0]) is not None and all(map(_PART.fullmatch, inner))
    return parts if known and len(parts) <= _DEEPEST else None


def listing(content: Content, parts: tuple[str, ...]) -> list[Listed]:
    """What lies in a folder of the content root; nothing for a file or for what is not there."""
    root = Place.of(content.root)
    if root.scheme != "file":
        found = opened(content.root).list_artifacts("/".join(parts))
        return [Listed(Path(f.path).name, bool(f.is_dir), f.file_size) for f in found]
    folder = _inside(root.path, parts)
    if folder is None or not folder.is_dir():
        return []
    return [
        Listed(entry.name, entry.is_dir(), None if entry.is_dir() else entry.stat().st_size)
        for entry in sorted(folder.iterdir())
        if not entry.is_symlink()
    ]


def local(content: Content, parts: tuple[str, ...]) -> Path | None:
    """The file of the content root that `parts` name; None where there is none or no folder."""
    root = Place.of(content.root)
    if root.scheme != "file":
        return None
    file = _inside(root.path, parts)
    return file if file is not None and file.is_file() else None


def remote(content: Content, parts: tuple[str, ...]) -> Iterator[bytes]:
    """The bytes of a file of a content root in an object store, in pieces of 1 MiB.

    Raises RegistryError where the store does not give it.
    """
    with tempfile.TemporaryDirectory() as folder:
        store: Any = opened(content.root)
        try:
            path = Path(store.download_artifacts("/".join(parts), folder))
        except Exception as error:
            raise RegistryError(f"The content root has no {'/'.join(parts)}.") from error
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                yield piece


def _inside(root: Path, parts: tuple[str, ...]) -> Path | None:
    """The path below the root, unless a link leads elsewhere."""
    path = root.joinpath(*parts)
    return path if path.resolve() == root.resolve().joinpath(*parts) else None
