"""The head: where the chain ends, signed, and published outside of the database.

A chain shows that nothing was changed in its middle. Whoever may write to the database can still
cut its end, or replace the whole: only a head that was signed, and kept elsewhere, shows that.
"""

import base64
import binascii
import fcntl
import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from mlflow_kdguard.attest.canonical import parse
from mlflow_kdguard.attest.envelope import pae
from mlflow_kdguard.attest.signing import Signer, Verifier
from mlflow_kdguard.errors import CertificateError, RegistryError
from mlflow_kdguard.files import canonical_json, sha256
from mlflow_kdguard.records import Record, parse_time

TYPE = "application/vnd.kdguard.head+json"
"""Payload type that a head's signature covers, so that it is never taken for anything else."""

_TAIL = 1 << 16
"""Bytes of the file that hold its last lines: some hundred, more than were ever out of order."""

Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Head(Record):
    """The end of a log (`kdguard.head/1`).

    `log` names the log (32 hex digits, drawn when its tables were made), `seq` counts its entries,
    `digest` is that of the last one. `key` and `signature` (base64) are empty where nobody signed.
    """

    schema_: Literal["kdguard.head/1"] = Field("kdguard.head/1", alias="schema")
    log: str = Field(pattern=r"^[0-9a-f]{32}$")
    seq: int = Field(ge=0)
    digest: Hex
    time: str
    key: str
    signature: str

    @property
    def signed(self) -> bytes:
        """The bytes that the signature covers."""
        return pae(TYPE, canonical_json(self.model_dump(exclude={"signature"}, by_alias=True)))

    def to_line(self) -> bytes:
        """The head as one line of the published file."""
        return canonical_json(self.document()) + b"\n"

    @staticmethod
    def from_line(line: bytes) -> "Head":
        """Read a published line; CertificateError says what is wrong with it."""
        try:
            return Head.model_validate(parse(line.removesuffix(b"\n"), "the published head"))
        except ValidationError as error:
            raise CertificateError("the published head is not a kdguard.head/1.") from error

    def objection(
        self, verifiers: Sequence[Verifier], *, now: datetime | None = None
    ) -> str | None:
        """Why this head's signature proves nothing; None where one of `verifiers` made it.

        With `now`, a key that is compromised by then proves nothing either. Heads that were
        published before stay evidence: to deny one, its thief would have to write that file, too.
        """
        if not self.signature:
            return "is not signed"
        found = [verifier for verifier in verifiers if verifier.key_id == self.key]
        if not found:
            return f"is signed with the unknown key {self.key[:16]}…"
        record = found[0].record
        if not found[0].verify(self.signed, _decoded(self.signature)):
            return f"carries a signature that {record.owner}'s key did not make"
        since = record.compromised
        if now is not None and since is not None and parse_time(since) <= now:
            return f"is signed with {record.owner}'s key, compromised since {since}"
        return None


def genesis(log: str) -> str:
    """What stands for the entry before the first one of the log called `log`."""
    return sha256(b"kdguard.log/1 " + log.encode())


def stamp(moment: datetime) -> str:
    """A moment as the log writes it: ISO 8601, UTC, milliseconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def sign(*, log: str, seq: int, digest: str, time: str, signer: Signer | None) -> Head:
    """The head of a log that ends with the entry `seq`, signed by the server's key."""
    bare = Head(
        log=log,
        seq=seq,
        digest=digest,
        time=time,
        key="" if signer is None else signer.key_id,
        signature="",
    )
    if signer is None:
        return bare
    signature = base64.b64encode(signer.sign(bare.signed)).decode()
    return bare.model_copy(update={"signature": signature})


def publish(head: Head, path: Path) -> None:
    """Append a head to the file outside of the database, durably (one line, O_APPEND, fsync).

    Call it after the commit: a published head that the database lacks is read as a cut tail. Any
    number of processes may publish at once, in any order. A line that a crash has left torn is
    ended first. Raises RegistryError where the file cannot be written; the entry itself stands, and
    the next head that is published covers it.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            line = (b"\n" if _torn(descriptor) else b"") + head.to_line()
            if os.write(descriptor, line) != len(line):
                raise OSError("the disk is full")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise RegistryError(
            f"cannot publish the log's head to {path}: {error.strerror or error}.",
            remedy="Make the file writable for the server; the log itself is complete.",
        ) from error


def require_publishable(path: Path) -> None:
    """Raise RegistryError unless heads can be appended to this file, which may be missing yet.

    To be asked before a change: afterwards it stands, and its head would be nowhere but in the
    database, where a cut tail does not show.
    """
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644))
    except OSError as error:
        raise RegistryError(
            f"the log's heads cannot be published to {path}: {error.strerror or error}.",
            remedy="Make the file writable for the server.",
        ) from error


def newest(path: Path) -> Head | None:
    """The highest head among the last lines of a published file; None where there is none.

    Lines that are no heads are left out: verify() is who judges the file. Raises RegistryError
    where the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RegistryError(
            f"cannot read the published heads {path}: {error.strerror or error}."
        ) from error
    heads = []
    for line in lines:
        with suppress(CertificateError):
            heads.append(Head.from_line(line))
    return max(heads, key=lambda head: head.seq, default=None)


def _torn(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""
