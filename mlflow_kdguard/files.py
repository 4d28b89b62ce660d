"""Bytes on disk: digests, and writes that are whole or absent."""

import hashlib
import json
import os
import stat
import tempfile
from io import FileIO
from pathlib import Path
from typing import Any

from mlflow_kdguard.errors import UsageError

_CHUNK = 1 << 20
LARGEST = 2 << 30
"""Bytes of the largest file that is read into memory; an ONNX file cannot hold more."""


def sha256(data: bytes) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one UTF-8 encoding of a JSON value: sorted keys, no spaces, no NaN or infinity.

    Raises ValueError where `value` holds a number that is not finite.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest_json(value: Any) -> str:
    """Hex SHA-256 of `canonical_json(value)`."""
    return sha256(canonical_json(value))


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` whole or not at all (temporary file, fsync, rename).

    Raises UsageError where the place cannot be written, naming it and the reason; what is neither
    a plain file nor a link to one (a device, such as /dev/stdout) is never replaced.
    """
    temporary: str | None = None
    try:
        _refuse_special(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"
        )
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException as error:  # Ctrl-C, too, leaves nothing half-written
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}.",
            remedy="Name a place that is writable and has room; nothing was left half-written.",
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document for people to read, atomically (indented, keys in given order)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def read_bytes(path: Path, *, what: str, at_most: int = LARGEST) -> bytes:
    """The bytes of a file that the user named; UsageError says what is wrong with the path.

    No more than `at_most` bytes are read: a device such as /dev/zero has no end.
    """
    try:
        with path.open("rb", buffering=0) as file:
            data = _read(file, at_most)
    except OSError as error:
        raise UsageError(
            f"cannot read {what} {path}: {error.strerror or error}.", remedy="Check the path."
        ) from error
    if not data:
        raise UsageError(f"{what} {path} is empty.", remedy="Name the file that was meant.")
    if len(data) > at_most:
        raise UsageError(
            f"{what} {path} has more than {at_most} bytes.", remedy="Name the file that was meant."
        )
    return data


def holds(path: str, data: bytes) -> bool:
    """Whether a file holds exactly these bytes; OSError where it cannot be read."""
    handle = os.open(path, os.O_RDONLY)
    try:
        return os.read(handle, len(data) + 1) == data
    finally:
        os.close(handle)


def _refuse_special(path: Path) -> None:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UsageError(f"cannot write {path}: it is no plain file.", remedy="Name a file.")


def _read(file: FileIO, at_most: int) -> bytes:
    """All of a file, or the first bytes beyond `at_most` of one that is larger."""
    state = os.fstat(file.fileno())
    if stat.S_ISREG(state.st_mode) and state.st_size <= at_most:
        return file.read()
    parts, room = [], at_most
    while room >= 0 and (part := file.read(_CHUNK)):
        parts.append(part)
        room -= len(part)
    return b"".join(parts)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
