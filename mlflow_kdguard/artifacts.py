"""Stored files as bytes: digests, and reading them within limits, from folders and from stores.

Nothing here reads a model or needs MLflow: a store is whatever lists and downloads as MLflow's
artifact repositories do.
"""

import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import yaml

from mlflow_kdguard.errors import ModelError, RegistryError, UnsafeModelError
from mlflow_kdguard.files import digest_json, sha256

CERTIFICATE = "kdguard.certificate"
"""Tag of a version that holds its signed certificate."""
OVERRIDE = "kdguard.override"
"""Tag of a version that holds a signed override: break-glass (`attest.overrides`)."""
DECISION, REASON = "kdguard.decision", "kdguard.reason"
"""Tags that say what the gate decided last, and why."""
ADDED_BY_CLIENT = "registered_model_meta"
"""MLflow's client writes this into a folder that it downloads; it is never part of a version."""
LARGEST = 2 << 30
"""Bytes that a bundle may hold (an ONNX file cannot hold more)."""
MOST_FILES = 1000


class Store(Protocol):
    """What is asked of an artifact repository of MLflow's."""

    def list_artifacts(self, path: str | None = None) -> Any:
        """FileInfos directly below `path`."""

    def download_artifacts(self, artifact_path: str, dst_path: str | None = None) -> Any:
        """Copy one artifact below the folder `dst_path`."""

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> Any:
        """Store one file below the folder `artifact_path`."""


def digests(files: Mapping[str, bytes]) -> dict[str, str]:
    """SHA-256 of every file, by path."""
    return {path: sha256(data) for path, data in sorted(files.items())}


def bundle_digest(files: Mapping[str, bytes]) -> str:
    """One SHA-256 for paths and bytes together."""
    return digest_json(digests(files))


def without_mark(files: Mapping[str, bytes], name: str, version: str) -> dict[str, bytes]:
    """The files without the note that MLflow's client leaves of this very version.

    Loading a model from an artifact store on this machine writes it into the stored folder. Its
    bytes follow from name and version, so that nothing can be hidden in it; a note that differs
    by one byte stays, and is refused like every other additional file.
    """
    notes = {
        yaml.safe_dump({"model_name": name, "model_version": number}, allow_unicode=True).encode()
        for number in (version, int(version))
    }
    return {k: v for k, v in files.items() if not (k == ADDED_BY_CLIENT and v in notes)}


def read_folder(folder: Path, *, limit: int = LARGEST) -> dict[str, bytes]:
    """All files below `folder`, by relative path.

    Raises UnsafeModelError at a link or a device, ModelError where there are too many bytes.
    """
    files: dict[str, bytes] = {}
    room = limit
    for path in _walk(folder):
        if len(files) >= MOST_FILES:
            raise too_large(str(folder), limit)
        data = _read(path, room, limit)
        room -= len(data)
        if room < 0:
            raise too_large(str(folder), limit)
        files[path.relative_to(folder).as_posix()] = data
    return files


def read_store(
    store: Store, where: str, *, below: str | None = None, limit: int = LARGEST
) -> dict[str, bytes]:
    """All files of a store, or of its folder `below`, by path relative to it.

    `where` names it in errors. Raises as read_folder does, RegistryError where the files change
    meanwhile, and whatever the store's own client raises.
    """
    sizes = listed(store, below)
    if sum(sizes.values()) > limit or len(sizes) > MOST_FILES:
        raise too_large(where, limit)
    with tempfile.TemporaryDirectory() as folder:
        for path in sizes:
            store.download_artifacts(path, folder)
        files = read_folder(Path(folder), limit=limit)
    if set(files) != set(sizes):
        raise RegistryError(f"the files of {where} changed while they were fetched.")
    skipped = len(below.strip("/")) + 1 if below else 0
    return {path[skipped:]: data for path, data in files.items()}


def listed(store: Store, below: str | None = None) -> dict[str, int]:
    """Paths and sizes of all files of a store; UnsafeModelError at a path outside of it."""
    root = PurePosixPath(below or ".")
    sizes: dict[str, int] = {}
    folders: list[str | None] = [below]
    while folders and len(sizes) + len(folders) <= MOST_FILES:
        for item in store.list_artifacts(folders.pop()):
            path = PurePosixPath(item.path)
            odd = path.is_absolute() or ".." in path.parts or "\\" in item.path
            if odd or not path.is_relative_to(root):
                raise UnsafeModelError(f"the artifact {item.path!r} lies outside its folder.")
            if item.is_dir:
                folders.append(item.path)
            else:
                sizes[item.path] = int(item.file_size or 0)
    if folders:
        raise ModelError(f"there are more than {MOST_FILES} artifacts.")
    return sizes


def too_large(where: str, limit: int) -> ModelError:
    """The error for a bundle past its limits."""
    return ModelError(
        f"{where} holds more than {limit} bytes or {MOST_FILES} files.",
        remedy="Only small bundles of one model are read.",
    )


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise _special(path)
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def _read(path: Path, room: int, limit: int) -> bytes:
    """The file that was seen, at most one byte beyond `room`; never one that a link leads to."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise _special(path)
        if found.st_size > room:  # said before a file of terabytes without content is read
            raise too_large(str(path.parent), limit)
        return file.read(room + 1)


def _special(path: Path) -> UnsafeModelError:
    return UnsafeModelError(
        f"{path} is a link or a device.", remedy="A bundle holds plain files only."
    )
