"""Certificates for attackers: honest ones, and ones that no honest program would issue."""

import base64
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import certificates as c
from mlflow_kdguard import attest
from mlflow_kdguard.attest.envelope import PAYLOAD_TYPE, pae
from mlflow_kdguard.attest.signing import Signer
from mlflow_kdguard.attest.statement import to_payload
from mlflow_kdguard.draw import draw
from mlflow_kdguard.files import canonical_json, sha256
from mlflow_kdguard.records import AuditFigure, Certificate, Figures, Model, format_time


def now() -> datetime:
    """The server judges by the real clock."""
    return datetime.now(UTC).replace(microsecond=0)


def days(count: float) -> timedelta:
    """A span of time."""
    return timedelta(days=count)


def figures(about: str, **changes: Any) -> Figures:
    """Figures about a student that pass the packaged policy."""
    model = Model(sha256=about)
    values: dict[str, Any] = {
        "student": model,
        "faithful": (faithful(about),),
        "export": c.parity(model=model),
        "audit": {
            "teacher": AuditFigure(model=Model(sha256=c.TEACHER), verdict="suspect", target=0),
            "student": AuditFigure(model=model, verdict="undecided"),
        },
    }
    return c.figures(**(values | changes))


def faithful(about: str, nonce: str = "", **changes: Any) -> Any:
    """The faithful figure of a student, with the draw that the gate repeats."""
    drawn = draw(c.POPULATION, c.SAMPLES, c.REFERENCE, about, c.TEST.sha256, nonce)
    values = {"student": Model(sha256=about), "indices": drawn, "nonce": nonce}
    return c.faithful(**(values | changes))


def certificate(files: Mapping[str, bytes], **changes: Any) -> Certificate:
    """A certificate about `files` by a verifier, valid now; what is no field changes figures."""
    student = sha256(files.get("model.onnx", b""))
    named = {key: changes.pop(key) for key in list(changes) if key in Figures.model_fields}
    values: dict[str, Any] = {
        "subjects": attest.subjects_of(files),
        "figures": figures(student, **named),
        "figures_from": "recomputed",
        "issued": format_time(now() - days(1)),
        "expires": format_time(now() + days(30)),
    }
    return c.certificate(**(values | changes))


def signed(made: Certificate, *signers: Signer) -> bytes:
    """Issued as our own program issues: it refuses what no checker would accept."""
    envelope = attest.issue(made, signers[0])
    for signer in signers[1:]:
        envelope = attest.cosign(envelope, signer)
    return envelope


def payload(made: Certificate) -> bytes:
    """The bytes that signatures cover."""
    return to_payload(made)


def enveloped(data: bytes, *signers: Signer, keyid: str | None = None, **changes: Any) -> bytes:
    """Any payload in an envelope, signed by whoever, without a single check."""
    covered = pae(PAYLOAD_TYPE, data)
    body: dict[str, Any] = {
        "payload": base64.b64encode(data).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [
            {"keyid": keyid or s.key_id, "sig": base64.b64encode(s.sign(covered)).decode()}
            for s in signers
        ],
    }
    return canonical_json(body | changes)
