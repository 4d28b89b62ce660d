"""Taking certificates and keys back, in the files that a running server reads."""

import fcntl
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import yaml

from mlflow_kdguard import plain_yaml
from mlflow_kdguard.attest.revocation import Revocations, certificate_digest
from mlflow_kdguard.attest.signing import Verifier
from mlflow_kdguard.errors import CertificateError, ConfigError, UsageError
from mlflow_kdguard.files import read_bytes, write_bytes
from mlflow_kdguard.plugin.server.settings import Settings
from mlflow_kdguard.records import format_time, parse_time

_HEX = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(rb"^version:[ \t]*([0-9]+)", re.MULTILINE)
_LARGEST = 1 << 20


def target(text: str, settings: Settings) -> tuple[str, str]:
    """What TEXT names: ("key", its id) or ("certificate", its digest).

    It is a record (.pub), a certificate's file, or 64 hex digits, which are a key's where one that
    is trusted has this id. Raises UsageError for anything else.
    """
    if _HEX.fullmatch(text):
        trusted = {verifier.key_id for verifier in settings.verifiers}
        return ("key" if text in trusted else "certificate", text)
    path = Path(text)
    data = read_bytes(path, what="what is revoked", at_most=_LARGEST)
    if path.suffix == ".pub":
        return ("key", Verifier.from_bytes(data, where=text).key_id)
    try:
        return ("certificate", certificate_digest(data))
    except CertificateError as error:
        raise UsageError(
            f"{text} is neither a certificate nor a key record (.pub): {error.message}",
            remedy="Name one of these files, or 64 hex digits.",
        ) from error


def revoke(
    path: Path, certificates: tuple[str, ...], keys: tuple[str, ...], *, since: datetime
) -> tuple[Revocations, int]:
    """Add certificates (digests) and keys (ids, known to others `since`) to what is revoked.

    `path` is the settings file. The list is written first, whole or not at all, then the settings'
    `version` is raised; whatever a running server reads in between, it refuses. What was revoked
    stays so; of two moments the earlier counts. Returns the list and the new version. Raises
    ConfigError where the settings name no list, or where their version cannot be raised.
    """
    with _alone(path):
        settings = Settings.load(path)
        if not settings.stated.revoked:
            raise ConfigError(
                f"{path} names no list of revocations.",
                remedy="Add `revoked: revoked.yaml` to it, and raise its version.",
            )
        file = path.parent / settings.stated.revoked
        known = Revocations.load(file) if file.exists() and file.stat().st_size else Revocations()
        changed = _with(known, certificates, keys, since)
        version, raised = _raised(path)
        write_bytes(file, _comments(file) + yaml.safe_dump(changed.document()).encode())
        write_bytes(path, raised)
        Settings.load(path)
        return changed, version


def _with(
    known: Revocations, certificates: tuple[str, ...], keys: tuple[str, ...], since: datetime
) -> Revocations:
    times = dict(known.keys)
    for key in keys:
        stated = times.get(key)
        if stated is None or since < parse_time(stated):
            times[key] = format_time(since)
    listed = dict.fromkeys((*known.certificates, *certificates))
    return Revocations(certificates=tuple(listed), keys=times)


def _comments(file: Path) -> bytes:
    """The comments that the list begins with; those further down do not survive."""
    if not file.exists():
        return b""
    lines = file.read_bytes().splitlines(keepends=True)
    kept = []
    for line in lines:
        if not line.lstrip().startswith(b"#") or not line.endswith(b"\n"):
            break
        kept.append(line)
    return b"".join(kept)


def _raised(path: Path) -> tuple[int, bytes]:
    """The settings file with a version that is one higher, and otherwise byte for byte the same."""
    data = read_bytes(path, what="the settings", at_most=_LARGEST)
    found = list(_VERSION.finditer(data))
    if len(found) == 1:
        version = int(found[0][1]) + 1
        start, end = found[0].span(1)
        raised = data[:start] + str(version).encode() + data[end:]
        if plain_yaml.parse(raised) == plain_yaml.parse(data) | {"version": version}:
            return version, raised
    raise ConfigError(
        f"the version in {path} cannot be raised: it is not in a line of its own.",
        remedy="Write `version: N` in one line, or edit both files by hand.",
    )


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One revocation at a time: each reads what the other has written."""
    try:
        with path.parent.joinpath(f".{path.name}.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise UsageError(f"cannot write beside {path}: {error.strerror or error}.") from error
