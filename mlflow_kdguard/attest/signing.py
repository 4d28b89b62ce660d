"""Ed25519 keys: every Signer has its Verifier, and a Verifier knows whose key it is.

A private key is a PEM file that only its owner may read. Beside it lies `<path>.pub`, a
`kdguard.key/1` record: the public key with its owner, role and validity. The record is as
trustworthy as the way it reached you: the copy that an operator keeps decides who is a verifier,
not the copy of whoever signs.
"""

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationError, field_validator

from mlflow_kdguard.attest.canonical import parse
from mlflow_kdguard.config import explain
from mlflow_kdguard.errors import CertificateError, UsageError
from mlflow_kdguard.files import canonical_json, read_bytes, sha256, write_bytes
from mlflow_kdguard.records import Record, Sha256, Signatory, format_time, parse_time

if TYPE_CHECKING:  # `cryptography` is loaded when a key is, not before
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

Role = Literal["builder", "verifier"]
_MAKE = "Make a key with `kdguard keygen`."


class KeyRecord(Record):
    """A public key and whose it is (`kdguard.key/1`). Times are ISO 8601 with a zone.

    `key` is the SHA-256 of the DER SubjectPublicKeyInfo, `public` the same in PEM. `compromised`
    is when the private key may have been known to others; from then on nothing it signed counts,
    since whoever holds it can write any date.
    """

    schema_: Literal["kdguard.key/1"] = Field("kdguard.key/1", alias="schema")
    key: Sha256
    public: str
    owner: str = Field(min_length=1)
    role: Role
    valid_from: str
    valid_until: str | None = None
    compromised: str | None = None

    @field_validator("owner")
    @classmethod
    def _somebody(cls, owner: str) -> str:
        if not (owner.strip() and owner.isprintable()):
            raise ValueError("an owner is a name in printable characters")
        return owner


@dataclass(frozen=True, slots=True)
class Verifier:
    """A public key that its holder's statements are checked with."""

    record: KeyRecord
    public: "Ed25519PublicKey"

    @property
    def key_id(self) -> str:
        """SHA-256 of the key's DER SubjectPublicKeyInfo."""
        return self.record.key

    @property
    def signatory(self) -> Signatory:
        """Who speaks when this key verifies."""
        record = self.record
        return Signatory(key=record.key, owner=record.owner, role=record.role)

    def verify(self, message: bytes, signature: bytes) -> bool:
        """Whether `signature` is this key's over exactly `message`."""
        from cryptography.exceptions import InvalidSignature

        try:
            self.public.verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def objection(self, *, issued: datetime, now: datetime) -> str | None:
        """Why a statement issued at `issued` must not be believed `now`; None if it may."""
        record = self.record
        who = f"the key {record.key[:16]}… of {record.owner}"
        if record.compromised is not None and parse_time(record.compromised) <= now:
            return f"{who} is compromised since {record.compromised}"
        if issued < parse_time(record.valid_from):
            return f"{who} is valid from {record.valid_from} only"
        if record.valid_until is not None and issued > parse_time(record.valid_until):
            return f"{who} was valid until {record.valid_until} only"
        return None

    def to_bytes(self) -> bytes:
        """The `kdguard.key/1` record."""
        return canonical_json(self.record.document()) + b"\n"

    @staticmethod
    def from_bytes(data: bytes, *, where: str) -> "Verifier":
        """Read a key record; UsageError says what is wrong with it, naming `where`."""
        if data.lstrip().startswith(b"-----BEGIN"):
            raise UsageError(
                f"{where} is a bare PEM file: it names neither owner nor role.",
                remedy="Use the .pub record that `kdguard keygen` writes beside the private key.",
            )
        try:
            record = KeyRecord.model_validate(parse(data.rstrip(b"\n"), where))
            _check_times(record)
        except ValidationError as error:
            raise UsageError(f"{where}: {explain(error)}", remedy=_MAKE) from error
        except (CertificateError, ValueError) as error:
            raise UsageError(f"{where} is not a key record: {error}", remedy=_MAKE) from error
        return Verifier(record, _public_key(record, where))

    @staticmethod
    def load(path: Path) -> "Verifier":
        """Read a `.pub` file."""
        return Verifier.from_bytes(read_bytes(path, what="the public key"), where=str(path))


@dataclass(frozen=True, slots=True)
class Signer:
    """A private key, with the Verifier of what it signs."""

    private: "Ed25519PrivateKey"
    verifier: Verifier

    @property
    def key_id(self) -> str:
        """The id of the key, as its Verifier states it."""
        return self.verifier.key_id

    def sign(self, message: bytes) -> bytes:
        """The signature over exactly `message`, 64 bytes."""
        return self.private.sign(message)

    @staticmethod
    def load(path: Path) -> "Signer":
        """Read a private key and the record beside it; UsageError if the two do not belong."""
        private = _private_key(read_bytes(path, what="the private key"), str(path))
        verifier = Verifier.load(public_path(path))
        if verifier.key_id != fingerprint(private.public_key()):
            raise UsageError(
                f"{public_path(path)} is not the record of the key in {path}.", remedy=_MAKE
            )
        return Signer(private, verifier)


def keygen(
    path: Path,
    *,
    owner: str,
    role: Role,
    now: datetime | None = None,
    valid_until: datetime | None = None,
) -> Signer:
    """Make a key: `path` (PEM, readable by its owner only) and its record `path`.pub.

    Raises UsageError rather than overwrite either file, or where they cannot be written; then
    neither is left.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if not path.name:
        raise UsageError(f"{str(path)!r} names no file.", remedy="Say where the key shall be.")
    for place in (path, public_path(path)):
        if os.path.lexists(place):
            raise UsageError(
                f"{place} exists already.", remedy="Keys are never overwritten: name another file."
            )
    signer = signer_of(
        Ed25519PrivateKey.generate(),
        owner=owner,
        role=role,
        valid_from=now or datetime.now(UTC),
        valid_until=valid_until,
    )
    _write_private(path, signer.private)
    try:
        write_bytes(public_path(path), signer.verifier.to_bytes())
    except UsageError:
        path.unlink()
        raise
    return signer


def signer_of(
    private: "Ed25519PrivateKey",
    *,
    owner: str,
    role: Role,
    valid_from: datetime,
    valid_until: datetime | None = None,
) -> Signer:
    """The Signer of a private key that is already at hand."""
    from cryptography.hazmat.primitives import serialization as s

    public = private.public_key()
    pem = public.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo).decode()
    try:
        record = KeyRecord(
            key=fingerprint(public),
            public=pem,
            owner=owner,
            role=role,
            valid_from=format_time(valid_from),
            valid_until=None if valid_until is None else format_time(valid_until),
        )
    except ValidationError as error:
        raise UsageError(f"this is no key record: {explain(error)}") from error
    return Signer(private, Verifier(record, public))


def fingerprint(public: "Ed25519PublicKey") -> str:
    """SHA-256 of the key's DER SubjectPublicKeyInfo."""
    from cryptography.hazmat.primitives import serialization as s

    return sha256(public.public_bytes(s.Encoding.DER, s.PublicFormat.SubjectPublicKeyInfo))


def public_path(path: Path) -> Path:
    """Where the record of the private key in `path` lies."""
    return path.with_name(path.name + ".pub")


def _write_private(path: Path, private: "Ed25519PrivateKey") -> None:
    from cryptography.hazmat.primitives import serialization as s

    pem = private.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Exclusive, and closed to others from its first byte on.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pem)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}.") from error


def _private_key(data: bytes, where: str) -> "Ed25519PrivateKey":
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(
            f"{where} is not an unencrypted PEM private key: {error}.", remedy=_MAKE
        ) from error
    if not isinstance(private, Ed25519PrivateKey):
        raise UsageError(f"{where} is not an Ed25519 key.", remedy=_MAKE)
    return private


def _public_key(record: KeyRecord, where: str) -> "Ed25519PublicKey":
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        public = load_pem_public_key(record.public.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{where} holds no PEM public key: {error}.", remedy=_MAKE) from error
    if not isinstance(public, Ed25519PublicKey):
        raise UsageError(f"{where} is not an Ed25519 key.", remedy=_MAKE)
    if fingerprint(public) != record.key:
        raise UsageError(f"{where}: the key's id is not the digest of its key.", remedy=_MAKE)
    return public


def _check_times(record: KeyRecord) -> None:
    for text in (record.valid_from, record.valid_until, record.compromised):
        if text is not None:
            parse_time(text)
