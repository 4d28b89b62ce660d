"""The in-toto Statement: which files, by their bytes, a certificate speaks of.

Statement v1 with a predicate of our own: every subject is a file of the bundle with its SHA-256,
the predicate is the certificate. The certificate repeats the subjects, since the gate reads it
without its envelope; the two lists must be the same.
"""

from pathlib import PurePosixPath
from typing import Any

from pydantic import ValidationError

from mlflow_kdguard.attest.canonical import parse
from mlflow_kdguard.config import explain
from mlflow_kdguard.errors import CertificateError
from mlflow_kdguard.files import canonical_json
from mlflow_kdguard.records import Certificate, Subject, parse_time

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:mlflow-kdguard:certificate:1"
_HEX = frozenset("0123456789abcdef")


def to_payload(certificate: Certificate) -> bytes:
    """The statement's canonical bytes; CertificateError for what must not be signed."""
    _coherent(certificate)
    try:
        return canonical_json(_statement(certificate))
    except ValueError as error:
        raise CertificateError(
            f"the certificate holds a figure that is not finite or not text: {error}.",
            remedy="Measure again; NaN and infinity are never certified.",
        ) from error


def from_payload(payload: bytes) -> Certificate:
    """The certificate of a statement; CertificateError says what is wrong with it."""
    value = parse(payload, "the certificate's statement")
    if not isinstance(value, dict) or value.get("_type") != STATEMENT_TYPE:
        raise CertificateError(f"the payload is not an in-toto statement ({STATEMENT_TYPE}).")
    if value.get("predicateType") != PREDICATE_TYPE:
        raise CertificateError(
            f"the statement's predicate is of type {value.get('predicateType')!r}, "
            f"not {PREDICATE_TYPE!r}.",
            remedy="This version reads kdguard.certificate/1 only.",
        )
    certificate = _read(value.get("predicate"))
    _coherent(certificate)
    if canonical_json(_statement(certificate)) != payload:
        raise CertificateError(
            "the statement is not the canonical form of its certificate: its subjects, a number's "
            "spelling or an additional key differ.",
            remedy="Issue it again with `kdguard attest`.",
        )
    return certificate


def _statement(certificate: Certificate) -> dict[str, Any]:
    return {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": subject.path, "digest": {"sha256": subject.sha256}}
            for subject in certificate.subjects
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": certificate.document(),
    }


def _read(predicate: Any) -> Certificate:
    schema = predicate.get("schema") if isinstance(predicate, dict) else None
    if schema != "kdguard.certificate/1":
        raise CertificateError(
            f"the certificate has the unknown schema {schema!r}.",
            remedy="This version reads kdguard.certificate/1 only.",
        )
    try:
        return Certificate.model_validate(predicate)
    except ValidationError as error:
        raise CertificateError(f"the certificate is malformed: {explain(error)}") from error


def _coherent(certificate: Certificate) -> None:
    """Subjects that name plain files once each, and a validity that is one."""
    if not certificate.subjects:
        raise CertificateError("the certificate speaks of no file.")
    paths = [subject.path for subject in certificate.subjects]
    if repeated := sorted({path for path in paths if paths.count(path) > 1}):
        raise CertificateError(f"the certificate names {repeated[0]!r} twice.")
    for subject in certificate.subjects:
        _plain(subject)
    try:
        ordered = parse_time(certificate.issued) < parse_time(certificate.expires)
    except ValueError as error:
        raise CertificateError(f"the certificate's validity cannot be read: {error}.") from error
    if not ordered:
        raise CertificateError(
            f"the certificate expires ({certificate.expires}) before it is issued "
            f"({certificate.issued})."
        )


def _plain(subject: Subject) -> None:
    path = PurePosixPath(subject.path)
    if path.is_absolute() or ".." in path.parts or "\\" in subject.path:
        raise CertificateError(f"the certificate names {subject.path!r}, outside the bundle.")
    if str(path) != subject.path or not path.name:
        raise CertificateError(f"the certificate names {subject.path!r}, which is no plain path.")
    if len(subject.sha256) != 64 or not _HEX.issuperset(subject.sha256):
        raise CertificateError(f"the digest of {subject.path} is not a SHA-256 in hex.")
