"""DSSE: a payload, its type, and signatures over both (secure-systems-lab/dsse, protocol v1).

A signature covers PAE(type, payload), so that a payload cannot be passed off as another type.
The envelope names no algorithm: the key decides, and every key is Ed25519.
"""

import base64
import binascii
from dataclasses import dataclass
from typing import Any

from mlflow_kdguard.attest.canonical import parse
from mlflow_kdguard.errors import CertificateError
from mlflow_kdguard.files import canonical_json

PAYLOAD_TYPE = "application/vnd.in-toto+json"


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature and the id of the key that is said to have made it."""

    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Envelope:
    """A payload with its signatures, still to be verified."""

    payload: bytes
    signatures: tuple[Signature, ...]

    @property
    def signed(self) -> bytes:
        """The bytes that every signature covers."""
        return pae(PAYLOAD_TYPE, self.payload)

    def to_bytes(self) -> bytes:
        """The envelope as canonical JSON."""
        return canonical_json(
            {
                "payload": _encode(self.payload),
                "payloadType": PAYLOAD_TYPE,
                "signatures": [{"keyid": s.key, "sig": _encode(s.value)} for s in self.signatures],
            }
        )

    @staticmethod
    def from_bytes(data: bytes) -> "Envelope":
        """Read an envelope; CertificateError says what is wrong with its shape."""
        value = parse(data, "the certificate's envelope")
        if not isinstance(value, dict) or value.keys() != {"payload", "payloadType", "signatures"}:
            raise _malformed("must hold exactly payload, payloadType and signatures")
        if value["payloadType"] != PAYLOAD_TYPE:
            raise _malformed(f"has payload type {value['payloadType']!r}, not {PAYLOAD_TYPE!r}")
        if not isinstance(value["signatures"], list):
            raise _malformed("needs a list of signatures")
        signatures = tuple(_signature(item) for item in value["signatures"])
        return Envelope(_decode(value["payload"], "payload"), signatures)


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding of a payload and its type."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _signature(item: Any) -> Signature:
    if not isinstance(item, dict) or item.keys() != {"keyid", "sig"}:
        raise _malformed("has a signature that is not exactly keyid and sig")
    if not isinstance(item["keyid"], str):
        raise _malformed("has a signature whose keyid is not text")
    return Signature(item["keyid"], _decode(item["sig"], "signature"))


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decode(text: Any, what: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else None
    except (binascii.Error, ValueError):
        data = None
    # Unused bits of the last digit could be flipped without changing the bytes.
    if data is None or _encode(data) != text:
        raise _malformed(f"has a {what} that is not canonical base64")
    return data


def _malformed(why: str) -> CertificateError:
    return CertificateError(
        f"the certificate's envelope {why}.", remedy="Issue it again with `kdguard attest`."
    )
