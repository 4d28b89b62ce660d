"""Certificates: issue() states figures about files under a signature, check() believes one.

A signature proves who states what about which bytes. It does not make figures true: that takes a
verifier who measured them again (`docs/threat-model.md`), which is why only a key with the role
`verifier` may state figures that are `recomputed`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from mlflow_kdguard.attest.envelope import Envelope, Signature
from mlflow_kdguard.attest.revocation import Revocations, certificate_digest, compromise, retire
from mlflow_kdguard.attest.signing import KeyRecord, Signer, Verifier, keygen, signer_of
from mlflow_kdguard.attest.statement import from_payload, to_payload
from mlflow_kdguard.errors import CertificateError, UsageError
from mlflow_kdguard.files import sha256
from mlflow_kdguard.records import Certificate, Signatory, Subject, parse_time

__all__ = [
    "Checked",
    "KeyRecord",
    "Revocations",
    "Signer",
    "Verifier",
    "certificate_digest",
    "check",
    "claimed",
    "compromise",
    "cosign",
    "issue",
    "keygen",
    "require_verifier",
    "retire",
    "signer_of",
    "subjects_of",
]


@dataclass(frozen=True, slots=True)
class Checked:
    """A certificate that holds, and everyone who signed it (each key once)."""

    certificate: Certificate
    signers: tuple[Signatory, ...]


def subjects_of(files: Mapping[str, bytes]) -> tuple[Subject, ...]:
    """The subjects of a bundle: every file with its digest, by path."""
    return tuple(Subject(path=path, sha256=sha256(files[path])) for path in sorted(files))


def require_verifier(signer: Signer) -> None:
    """UsageError for a key that may not sign recomputed figures."""
    record = signer.verifier.record
    if record.role != "verifier":
        raise UsageError(
            f"the key {record.key[:16]}… of {record.owner} is a {record.role}'s: it cannot sign "
            "recomputed figures.",
            remedy="Make one with `kdguard keygen FILE --owner NAME --role verifier`.",
        )


def issue(certificate: Certificate, signer: Signer) -> bytes:
    """Sign a certificate: a DSSE envelope around an in-toto statement.

    Raises CertificateError for a certificate that no checker would accept: non-finite figures,
    malformed subjects or dates, a key outside its validity, or `recomputed` figures signed by a
    key that is not a verifier's.
    """
    envelope = Envelope(to_payload(certificate), ())
    _refuse_objection(signer.verifier, certificate, parse_time(certificate.issued))
    _refuse_hearsay(certificate, (signer.verifier.signatory,))
    return _with_signature(envelope, signer).to_bytes()


def cosign(envelope: bytes, signer: Signer) -> bytes:
    """Add a signature to an envelope; one key signs once. Raises as issue() does.

    It does not check the signatures that are there: check() first.
    """
    opened = Envelope.from_bytes(envelope)
    certificate = from_payload(opened.payload)
    _refuse_objection(signer.verifier, certificate, parse_time(certificate.issued))
    if any(signature.key == signer.key_id for signature in opened.signatures):
        return envelope
    return _with_signature(opened, signer).to_bytes()


def claimed(envelope: bytes) -> Certificate:
    """What an envelope claims, believed by nobody: no signature, time or file is checked.

    Raises CertificateError where it is no certificate.
    """
    return from_payload(Envelope.from_bytes(envelope).payload)


def check(
    envelope: bytes,
    *,
    files: Mapping[str, bytes] | None,
    verifiers: Sequence[Verifier],
    now: datetime,
    model_name: str | None = None,
    registry: str | None = None,
    revoked: Revocations | None = None,
    waive_expiry: bool = False,
) -> Checked:
    """Believe a certificate, or raise CertificateError with the reason.

    `files` are all files of the bundle by path (None checks the statement alone), `verifiers` the
    keys that are trusted, `now` an aware time. `model_name` and `registry`, where given, must be
    those that the certificate was issued for. Every signature must be valid and by a trusted key.
    `revoked` is the checker's list of what is taken back. `waive_expiry` believes a certificate
    that has expired, for what serves already; the validity and compromise of keys and revocations
    are never waived.
    Two records of one key that differ are a UsageError.
    """
    opened = Envelope.from_bytes(envelope)
    signed_by = _signed_by(opened, verifiers)
    certificate = from_payload(opened.payload)
    for verifier in signed_by:
        _refuse_objection(verifier, certificate, now)
    if revoked is not None:
        revoked.refuse(envelope, signed_by, now)
    signers = tuple(verifier.signatory for verifier in signed_by)
    _refuse_hearsay(certificate, signers)
    _check_validity(certificate, now, waive_expiry=waive_expiry)
    _check_binding("model", certificate.model_name, model_name)
    _check_binding("registry", certificate.registry, registry)
    if files is not None:
        _check_files(certificate, files)
    return Checked(certificate, signers)


def _with_signature(envelope: Envelope, signer: Signer) -> Envelope:
    signature = Signature(signer.key_id, signer.sign(envelope.signed))
    return Envelope(envelope.payload, (*envelope.signatures, signature))


def _signed_by(envelope: Envelope, verifiers: Sequence[Verifier]) -> tuple[Verifier, ...]:
    trusted = _trusted(verifiers)
    if not envelope.signatures:
        raise CertificateError("the certificate is not signed.")
    signed: dict[str, Verifier] = {}
    for signature in envelope.signatures:
        verifier = trusted.get(signature.key)
        if verifier is None:
            raise CertificateError(
                f"the certificate is signed with the unknown key {signature.key[:64]!r}.",
                remedy="Name that key's .pub record, if you trust its owner.",
            )
        if not verifier.verify(envelope.signed, signature.value):
            raise CertificateError(
                f"the signature of {verifier.record.owner} (key {verifier.key_id[:16]}…) does not "
                "hold: the certificate was altered, or another key made it.",
                remedy="Ask its issuer for the original bytes.",
            )
        signed[verifier.key_id] = verifier
    return tuple(signed.values())


def _trusted(verifiers: Sequence[Verifier]) -> dict[str, Verifier]:
    """The keys by id. Of two records of one key, the order must not decide which is believed."""
    trusted: dict[str, Verifier] = {}
    for verifier in verifiers:
        known = trusted.setdefault(verifier.key_id, verifier)
        if known.record != verifier.record:
            raise UsageError(
                f"two records of the key {verifier.key_id[:16]}… disagree about whose it is or how "
                "long it counts.",
                remedy="Name the newer one only.",
            )
    return trusted


def _refuse_objection(verifier: Verifier, certificate: Certificate, now: datetime) -> None:
    if objection := verifier.objection(issued=parse_time(certificate.issued), now=now):
        raise CertificateError(f"{objection}.", remedy="Sign with a key that is valid.")


def _refuse_hearsay(certificate: Certificate, signers: Sequence[Signatory]) -> None:
    if certificate.figures_from == "recomputed" and all(s.role != "verifier" for s in signers):
        raise CertificateError(
            "the certificate claims recomputed figures, and no verifier signed it "
            f"(signed by {', '.join(f'{s.owner} as {s.role}' for s in signers)}).",
            remedy="Have a verifier measure again and sign: `kdguard verify`.",
        )


def _check_validity(certificate: Certificate, now: datetime, *, waive_expiry: bool) -> None:
    if now < parse_time(certificate.issued):
        raise CertificateError(f"the certificate is not valid before {certificate.issued}.")
    if now >= parse_time(certificate.expires) and not waive_expiry:
        raise CertificateError(
            f"the certificate expired at {certificate.expires}.",
            remedy="Measure and sign again: `kdguard attest` or `kdguard verify`.",
        )


def _check_binding(what: str, certified: str, asked: str | None) -> None:
    if asked is not None and asked != certified:
        raise CertificateError(
            f"the certificate was issued for the {what} {certified!r}, not {asked!r}.",
            remedy=f"Issue one for the {what} {asked!r}.",
        )


def _check_files(certificate: Certificate, files: Mapping[str, bytes]) -> None:
    certified = {subject.path: subject.sha256 for subject in certificate.subjects}
    if missing := sorted(certified.keys() - files.keys()):
        raise CertificateError(f"{missing[0]} is certified, and missing from the bundle.")
    if extra := sorted(files.keys() - certified.keys()):
        raise CertificateError(f"{extra[0]} is in the bundle, and not certified.")
    for path in sorted(files):
        if (actual := sha256(files[path])) != certified[path]:
            raise CertificateError(
                f"{path} is another file than the certified one: its SHA-256 is {actual}, "
                f"certified is {certified[path]}.",
                remedy="Restore the certified file, or certify this one.",
            )
