"""Bytes on disk: digests, and writes that are whole or absent."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from mlflow_kdguard.errors import UsageError

_CHUNK = 1 << 20


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

    Raises UsageError where the place cannot be written, naming it and the reason.
    """
    temporary: str | None = None
    try:
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


def read_bytes(path: Path, *, what: str) -> bytes:
    """The bytes of a file that the user named; UsageError says what is wrong with the path."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read {what} {path}: {error.strerror or error}.", remedy="Check the path."
        ) from error
    if not data:
        raise UsageError(f"{what} {path} is empty.", remedy="Name the file that was meant.")
    return data


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
