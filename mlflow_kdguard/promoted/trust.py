"""Whom a consumer believes: trusted keys, and what was taken back since they were handed out."""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote

from mlflow_kdguard.attest.envelope import Envelope
from mlflow_kdguard.attest.revocation import Revocations
from mlflow_kdguard.attest.signing import Verifier
from mlflow_kdguard.errors import UsageError
from mlflow_kdguard.files import sha256
from mlflow_kdguard.records import parse_time

KEYS, REVOKED = "KDGUARD_KEYS", "KDGUARD_REVOKED"
"""Environment variables: key records or folders of them (separated as in PATH), and one file."""

Key = str | Path | Verifier
Revoked = Revocations


@dataclass(frozen=True, slots=True)
class Trust:
    """Keys that are believed, each with the earliest time at which it was called compromised."""

    verifiers: tuple[Verifier, ...]
    certificates: frozenset[str] = field(default_factory=frozenset)
    compromised: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @staticmethod
    def of(keys: Iterable[Verifier], revoked: Revoked | None = None) -> "Trust":
        """Trust in `keys`, less what was revoked."""
        taken = revoked or Revoked()
        verifiers = tuple(map(taken.applied, keys))
        times = {v.key_id: v.record.compromised for v in verifiers if v.record.compromised}
        return Trust(verifiers, frozenset(taken.certificates), MappingProxyType(times))

    def revocation(self, envelope: bytes, now: datetime) -> str | None:
        """Why the certificate in `envelope` was taken back by `now`; None where it was not.

        Raises CertificateError where the envelope cannot be read.
        """
        opened = Envelope.from_bytes(envelope)
        digests = {sha256(envelope), sha256(opened.payload)}
        if digests & self.certificates:
            return f"the certificate {sha256(envelope)[:16]}… is revoked"
        for signature in opened.signatures:
            since = self.compromised.get(signature.key)
            if since is not None and parse_time(since) <= now:
                return f"the key {signature.key[:16]}… that signed it is compromised since {since}"
        return None


def trusted(
    keys: Key | Iterable[Key] | None = None, revoked: str | Path | Revoked | None = None
) -> Trust:
    """Trust in `keys`: records (.pub), folders of them, or Verifiers; else what KDGUARD_KEYS names.

    `revoked` is a list of revocations or its file; else what KDGUARD_REVOKED names. Raises
    UsageError where no key is named, or where a file is missing or is not what it should be: an
    unreadable list of revocations revokes everything.
    """
    named = _listed(keys)
    if not named:
        raise UsageError(
            "no trusted key is named, so that no certificate means anything.",
            remedy=f"Name the .pub records whose owners you trust (keys=…, --key, or {KEYS}).",
        )
    once = {v.to_bytes(): v for key in named for v in _verifiers(key)}
    return Trust.of(once.values(), _revoked(revoked))


def identities(registries: Collection[str], workspace: str) -> frozenset[str]:
    """What a certificate may name as its registry, for a model of a workspace."""
    mark = "" if workspace in ("", "default") else f"#workspace={quote(workspace, safe='')}"
    return frozenset(uri + mark for uri in registries)


def _listed(keys: Key | Iterable[Key] | None) -> list[Key]:
    if keys is None:
        keys = os.environ.get(KEYS, "").split(os.pathsep)
    named = [keys] if isinstance(keys, str | Path | Verifier) else list(keys)
    return [key for key in named if key != ""]  # an unset variable must not name this folder


def _verifiers(key: Key) -> Iterator[Verifier]:
    if isinstance(key, Verifier):
        yield key
        return
    path = Path(key)
    files = sorted(path.glob("*.pub")) if path.is_dir() else [path]
    if not files:
        raise UsageError(f"the folder {path} holds no key record (*.pub).")
    yield from map(Verifier.load, files)


def _revoked(given: str | Path | Revoked | None) -> Revoked | None:
    if isinstance(given, Revoked):
        return given
    path = given if given is not None else os.environ.get(REVOKED)
    return Revoked.load(Path(path)) if path else None
