"""The keys that a server believes: a folder of records, less what was revoked."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow_kdguard.attest import Verifier
from mlflow_kdguard.attest.revocation import Revocations
from mlflow_kdguard.errors import ConfigError, UsageError
from mlflow_kdguard.files import read_bytes

SUFFIX = ".pub"
_LARGEST = 1 << 16


@dataclass(frozen=True, slots=True)
class Keys:
    """Trusted keys, each with the earliest time from which it counts as compromised."""

    verifiers: tuple[Verifier, ...]
    revocations: Revocations


def files(folder: Path) -> dict[str, bytes]:
    """The key records (`*.pub`) of a folder by name; ConfigError where it cannot be read."""
    try:
        found = sorted(names(folder))
    except OSError as error:
        raise ConfigError(
            f"cannot read the folder of keys {folder}: {error.strerror or error}.",
            remedy="Name the folder that holds the trusted .pub records (keys:).",
        ) from error
    return {
        name: read_bytes(folder / name, what="the key record", at_most=_LARGEST) for name in found
    }


def names(folder: Path) -> set[str]:
    """The names of a folder's key records; OSError where it cannot be read."""
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.name.endswith(SUFFIX)}


def trusted(records: Mapping[str, bytes], revoked: bytes | None, *, where: str) -> Keys:
    """The keys of these records, less what the list of revocations takes back.

    Raises UsageError for a record that is none and for two records of one key that differ,
    ConfigError for a list of revocations that cannot be read: it would revoke nothing.
    """
    revocations = Revocations() if revoked is None else Revocations.parse(revoked, where="revoked")
    verifiers: dict[str, Verifier] = {}
    for name, data in records.items():
        verifier = Verifier.from_bytes(data, where=f"{where}/{name}")
        known = verifiers.setdefault(verifier.key_id, verifier)
        if known.record != verifier.record:
            raise UsageError(
                f"{where}: two records of the key {verifier.key_id[:16]}… disagree.",
                remedy="Keep the newer one only.",
            )
    return Keys(tuple(map(revocations.applied, verifiers.values())), revocations)
