"""Break-glass: two owners say, under their signatures, that a version is promoted all the same.

An override (`kdguard.override/1`) names the registry, the workspace, the model, the version with
the SHA-256 of every file, the alias, a reason and an end. It is an in-toto statement with a
predicate of its own in a DSSE envelope, so that no signature under it passes for one under a
certificate. It waives the policy's limits and the certificate; it never waives which names are
guarded, where the bytes may lie, or that they are logged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from mlflow_kdguard.attest.canonical import parse
from mlflow_kdguard.attest.envelope import Envelope, Signature
from mlflow_kdguard.attest.signing import Signer, Verifier
from mlflow_kdguard.attest.statement import STATEMENT_TYPE
from mlflow_kdguard.config import explain
from mlflow_kdguard.errors import CertificateError
from mlflow_kdguard.files import canonical_json, sha256
from mlflow_kdguard.policy import guarded_name
from mlflow_kdguard.records import Record, Subject, parse_time

PREDICATE_TYPE = "urn:mlflow-kdguard:override:1"
LONGEST = timedelta(days=7)
"""From issue to end: an emergency that lasts longer needs a certificate."""
OWNERS = 2
"""How many different owners must sign."""


class Override(Record):
    """What the owners state (`kdguard.override/1`). Times are ISO 8601 with a zone.

    `alias` is the alias's or the stage's name as it will be set; `subjects` are all files of the
    version, as certificates list them.
    """

    schema_: Literal["kdguard.override/1"] = Field("kdguard.override/1", alias="schema")
    registry: str = Field(min_length=1)
    workspace: str = Field(min_length=1)
    model: str = Field(min_length=1)
    version: str = Field(pattern=r"^[1-9][0-9]{0,18}$")
    alias: str = Field(min_length=1)
    reason: str = Field(max_length=2_000)
    issued: str
    until: str
    subjects: tuple[Subject, ...] = Field(min_length=1)

    @field_validator("reason")
    @classmethod
    def _says_something(cls, reason: str) -> str:
        if not any(character.isalnum() for character in reason):
            raise ValueError("an override needs a reason, in words")
        return reason

    @field_validator("subjects")
    @classmethod
    def _once_each(cls, subjects: tuple[Subject, ...]) -> tuple[Subject, ...]:
        if len({subject.path for subject in subjects}) != len(subjects):
            raise ValueError("a file is named twice")
        return subjects

    @field_validator("issued", "until")
    @classmethod
    def _is_a_time(cls, text: str) -> str:
        parse_time(text)
        return text


@dataclass(frozen=True, slots=True)
class Granted:
    """An override that holds now: who signed it, its bytes, and their SHA-256."""

    override: Override
    owners: tuple[str, ...]
    envelope: bytes
    sha256: str


def issue(override: Override, signer: Signer, *, now: datetime) -> bytes:
    """Sign an override as its first owner; it counts once another owner has called cosign().

    Raises CertificateError for one that no server would accept: an end that is past or more than
    seven days after its issue, a key outside of its validity.
    """
    _refuse_times(override, now)
    _refuse_objection(signer.verifier, override, now)
    return _signed(Envelope(canonical_json(_statement(override)), ()), signer).to_bytes()


def cosign(envelope: bytes, signer: Signer, *, now: datetime) -> bytes:
    """Add another owner's signature. Raises as issue() does, and for the same owner once more.

    It does not know who signed before: read() shows what is signed, and check() decides.
    """
    opened = Envelope.from_bytes(envelope)
    override = read(envelope)
    _refuse_times(override, now)
    _refuse_objection(signer.verifier, override, now)
    if any(signature.key == signer.key_id for signature in opened.signatures):
        raise CertificateError(
            f"the key {signer.key_id[:16]}… of {signer.verifier.record.owner} has signed already.",
            remedy="Another owner must sign, with a key of his own.",
        )
    return _signed(opened, signer).to_bytes()


def read(envelope: bytes) -> Override:
    """What an override says, believing none of it; CertificateError for what is no override."""
    payload = Envelope.from_bytes(envelope).payload
    value = parse(payload, "the override's statement")
    if not isinstance(value, dict) or value.get("predicateType") != PREDICATE_TYPE:
        raise CertificateError(
            "the document is not an override.",
            remedy="Make one with `kdguard server override`.",
        )
    try:
        override = Override.model_validate(value.get("predicate"))
    except ValidationError as error:
        raise CertificateError(f"the override is malformed: {explain(error)}") from error
    if canonical_json(_statement(override)) != payload:
        raise CertificateError("the override is not the canonical form of what it says.")
    return override


def check(
    envelope: bytes,
    *,
    verifiers: Sequence[Verifier],
    now: datetime,
    files: Mapping[str, bytes],
    model: str,
    version: str,
    alias: str,
    workspace: str,
    registries: Sequence[str],
) -> Granted:
    """Believe an override, or raise CertificateError with the reason.

    `verifiers` are the keys whose owners may break the glass (the server's own log key is none of
    them), `files` all files of the version by path, `now` an aware time; `registries` are the
    identities of this registry. Every signature must be valid and by a trusted key, and at least
    two owners must have signed: two keys of one owner are one owner, however his name is spelled.
    """
    override = read(envelope)
    owners = signed_by(envelope, verifiers=verifiers, now=now)
    asked = {"model": model, "version": version, "alias": alias, "workspace": workspace}
    for what, value in asked.items():
        if getattr(override, what) != value:
            raise CertificateError(
                f"the override is for the {what} {getattr(override, what)!r}, not {value!r}."
            )
    if override.registry not in registries:
        raise CertificateError(f"the override is for the registry {override.registry!r}.")
    stated = {subject.path: subject.sha256 for subject in override.subjects}
    if stated != {path: sha256(data) for path, data in files.items()}:
        raise CertificateError(
            "the override was signed for other files than those of this version.",
            remedy="Sign one for the files as they are now.",
        )
    return Granted(override, owners, envelope, sha256(envelope))


def signed_by(envelope: bytes, *, verifiers: Sequence[Verifier], now: datetime) -> tuple[str, ...]:
    """The owners who signed an override that holds now, whatever it is for. Raises as check()."""
    override = read(envelope)
    owners = _owners(Envelope.from_bytes(envelope), verifiers, override, now)
    _refuse_times(override, now)
    return owners


def _owners(
    envelope: Envelope, verifiers: Sequence[Verifier], override: Override, now: datetime
) -> tuple[str, ...]:
    trusted: dict[str, Verifier] = {}
    owners: dict[str, str] = {}
    for verifier in verifiers:
        if trusted.setdefault(verifier.key_id, verifier).record != verifier.record:
            raise CertificateError(f"two records of the key {verifier.key_id[:16]}… disagree.")
    for signature in envelope.signatures:
        key = trusted.get(signature.key)
        if key is None:
            raise CertificateError(
                f"the override is signed with the unknown key {signature.key[:64]!r}."
            )
        owner = key.record.owner
        if not key.verify(envelope.signed, signature.value):
            raise CertificateError(f"the signature of {owner} under the override does not hold.")
        _refuse_objection(key, override, now)
        owners.setdefault(guarded_name(owner), owner)
    if len(owners) < OWNERS:
        raise CertificateError(
            f"the override is signed by {', '.join(owners.values()) or 'nobody'}: "
            f"{OWNERS} different owners are needed.",
            remedy="Have another owner sign it: `kdguard server override sign`.",
        )
    return tuple(owners.values())


def _refuse_times(override: Override, now: datetime) -> None:
    issued, until = parse_time(override.issued), parse_time(override.until)
    if until > issued + LONGEST:
        raise CertificateError(
            f"the override lasts until {override.until}, more than {LONGEST.days} days.",
            remedy="Name an earlier end; what lasts longer needs a certificate.",
        )
    if now < issued:
        raise CertificateError(f"the override is not valid before {override.issued}.")
    if now >= until:
        raise CertificateError(f"the override ended at {override.until}.")


def _refuse_objection(verifier: Verifier, override: Override, now: datetime) -> None:
    if objection := verifier.objection(issued=parse_time(override.issued), now=now):
        raise CertificateError(f"{objection}.", remedy="Sign with a key that is valid.")


def _statement(override: Override) -> dict[str, Any]:
    subjects = [
        {"name": subject.path, "digest": {"sha256": subject.sha256}}
        for subject in override.subjects
    ]
    return {
        "_type": STATEMENT_TYPE,
        "subject": subjects,
        "predicateType": PREDICATE_TYPE,
        "predicate": override.document(),
    }


def _signed(envelope: Envelope, signer: Signer) -> Envelope:
    signature = Signature(signer.key_id, signer.sign(envelope.signed))
    return Envelope(envelope.payload, (*envelope.signatures, signature))
