"""Certificates and keys that are taken back, and key records that end.

A revocation is the checker's own list: it needs nobody's signature, and nothing that a certificate
says can undo it. A key record can only be tightened here: ended earlier, or declared compromised
since an earlier moment.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, field_validator

from mlflow_kdguard import plain_yaml
from mlflow_kdguard.attest.envelope import Envelope
from mlflow_kdguard.attest.signing import KeyRecord, Verifier
from mlflow_kdguard.config import explain
from mlflow_kdguard.errors import CertificateError, ConfigError, UsageError
from mlflow_kdguard.files import read_bytes, sha256, write_bytes
from mlflow_kdguard.records import Record, format_time, parse_time

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Revocations(Record):
    """What is taken back: `certificates` by digest, `keys` (by id) with the time from which each
    may have been known to others.

    A certificate goes by `certificate_digest`, that of what is signed, which stays the same
    whoever signs beside or is cut away; the digest of one envelope is understood as well.
    """

    certificates: tuple[Digest, ...] = ()
    keys: dict[Digest, str] = Field(default_factory=dict)

    @field_validator("keys", mode="before")
    @classmethod
    def _as_text(cls, keys: object) -> object:
        """YAML reads an unquoted moment as one."""
        if not isinstance(keys, Mapping):
            return keys
        return {k: v.isoformat() if isinstance(v, datetime) else v for k, v in keys.items()}

    @field_validator("keys")
    @classmethod
    def _moments(cls, keys: dict[str, str]) -> dict[str, str]:
        return {key: format_time(parse_time(text)) for key, text in keys.items()}

    @staticmethod
    def load(path: Path) -> "Revocations":
        """Read a file; UsageError where it cannot be read, ConfigError as `parse`."""
        return Revocations.parse(read_bytes(path, what="the list of revocations"), where=str(path))

    @staticmethod
    def parse(data: bytes, *, where: str) -> "Revocations":
        """Read `{certificates: […], keys: {ID: TIME}}`; ConfigError says what is wrong with it:
        a list that cannot be read would revoke nothing."""
        try:
            values = plain_yaml.parse(data)
            return Revocations.model_validate({} if values is None else values)
        except ValidationError as error:
            raise ConfigError(f"{where}: {explain(error)}") from error
        except ValueError as error:
            raise ConfigError(f"{where} is no list of revocations: {error}.") from error

    def applied(self, verifier: Verifier) -> Verifier:
        """The key, compromised since the earlier of what its record and what this list say."""
        since, known = self.keys.get(verifier.key_id), verifier.record.compromised
        if since is None or (known is not None and parse_time(known) <= parse_time(since)):
            return verifier
        record = verifier.record.model_copy(update={"compromised": since})
        return Verifier(record, verifier.public)

    def refuse(self, envelope: bytes, signed_by: Sequence[Verifier], now: datetime) -> None:
        """CertificateError where the certificate, or a key that signed it, is taken back."""
        known = {sha256(envelope), certificate_digest(envelope)}.intersection(self.certificates)
        if known:
            raise CertificateError(
                f"the certificate is revoked ({min(known)}).",
                remedy="Have it measured and signed again: `kdguard verify`.",
            )
        for verifier in signed_by:
            since = self.keys.get(verifier.key_id)
            if since is not None and parse_time(since) <= now:
                raise CertificateError(
                    f"the key {verifier.key_id[:16]}… of {verifier.record.owner} is revoked as "
                    f"compromised since {since}.",
                    remedy="Sign with a key that is valid.",
                )


def certificate_digest(envelope: bytes) -> str:
    """SHA-256 of the statement that an envelope's signatures cover, whoever signed it.

    Raises CertificateError where the bytes are no envelope.
    """
    return sha256(Envelope.from_bytes(envelope).payload)


def retire(path: Path, *, at: datetime) -> Verifier:
    """End the key of the record `path` (.pub): nothing that it signs after `at` counts.

    What it signed until then stays valid. Raises UsageError where `at` is before the key's
    validity, or later than the end that the record has.
    """
    verifier = Verifier.load(path)
    record = verifier.record
    if at < parse_time(record.valid_from):
        raise UsageError(f"the key is valid from {record.valid_from}, after {format_time(at)}.")
    _refuse_later(record.valid_until, at, "ends")
    return _rewritten(path, verifier, record.model_copy(update={"valid_until": format_time(at)}))


def compromise(path: Path, *, at: datetime) -> Verifier:
    """State in the record `path` (.pub) that others may have known the key since `at`.

    From then on nothing that it ever signed counts: whoever holds it can write any date. Raises
    UsageError where the record names an earlier moment already.
    """
    verifier = Verifier.load(path)
    record = verifier.record
    _refuse_later(record.compromised, at, "is compromised")
    return _rewritten(path, verifier, record.model_copy(update={"compromised": format_time(at)}))


def _refuse_later(stated: str | None, at: datetime, what: str) -> None:
    if stated is not None and parse_time(stated) < at:
        raise UsageError(
            f"the key {what} at {stated} already, before {format_time(at)}.",
            remedy="A record is only ever tightened.",
        )


def _rewritten(path: Path, verifier: Verifier, record: KeyRecord) -> Verifier:
    changed = Verifier(record, verifier.public)
    write_bytes(path, changed.to_bytes())
    return changed
