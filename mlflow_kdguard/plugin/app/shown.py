"""A version's certificate as it is shown: who signed it, whether it counts now, and every figure.

What is shown here follows from the certificate and the settings alone. The bytes are judged where
an alias is set, and by `POST /api/2.0/kdguard/verify`, since reading them takes longer than a page.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from mlflow_kdguard import attest
from mlflow_kdguard.attest import Checked
from mlflow_kdguard.attest.envelope import Envelope
from mlflow_kdguard.errors import CertificateError, KDGuardError
from mlflow_kdguard.files import sha256
from mlflow_kdguard.gate import decide
from mlflow_kdguard.plugin.server.settings import Settings
from mlflow_kdguard.records import Certificate, RuleResult, parse_time

State = Literal["valid", "expires soon", "expired", "revoked", "not believed", "missing", "unknown"]
SOON = timedelta(days=14)
"""How long before its end a certificate is worth a word."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A certificate's state with its reason, and what it says where it is believed."""

    state: State
    why: str
    sha256: str = ""
    checked: Checked | None = None

    @property
    def certificate(self) -> Certificate | None:
        """The certificate; None where it is not believed."""
        return None if self.checked is None else self.checked.certificate

    @property
    def counts(self) -> bool:
        """Whether it is believed and in force."""
        return self.state in ("valid", "expires soon")


def shown(
    envelope: str | None, settings: Settings | None, workspace: str, model: str, now: datetime
) -> Shown:
    """The state of a certificate for a model; nothing about it raises."""
    if not envelope:
        return Shown("missing", "The version carries no certificate.")
    data = envelope.encode("utf-8", "surrogatepass")
    digest = sha256(data)
    if settings is None:
        return Shown("unknown", "The server cannot read its settings.", digest)
    try:
        _refuse_revoked(data, settings, now)
    except CertificateError as error:
        return Shown("revoked", _sentence(error), digest)
    try:
        return _dated(_believed(data, settings, workspace, model, now), digest, now)
    except KDGuardError as error:
        return Shown("not believed", _sentence(error), digest)


def _refuse_revoked(data: bytes, settings: Settings, now: datetime) -> None:
    try:
        named = {signature.key for signature in Envelope.from_bytes(data).signatures}
    except CertificateError:
        return  # no envelope at all: for _believed() to say
    signed = [key for key in settings.verifiers if key.key_id in named]
    settings.keys.revocations.refuse(data, signed, now)


def _sentence(error: KDGuardError) -> str:
    return error.message[:1].upper() + error.message[1:]


def _believed(
    data: bytes, settings: Settings, workspace: str, model: str, now: datetime
) -> Checked:
    checked = attest.check(
        data, files=None, verifiers=settings.verifiers, now=now, waive_expiry=True
    )
    certificate = checked.certificate
    known = settings.identities(workspace)
    if certificate.model_name != model or certificate.registry not in known:
        raise CertificateError(
            f"the certificate was issued for {certificate.model_name!r} in "
            f"{certificate.registry!r}, not for {model!r} in {' or '.join(known)}."
        )
    return checked


def _dated(checked: Checked, digest: str, now: datetime) -> Shown:
    text = checked.certificate.expires
    ends = parse_time(text)
    if now >= ends:
        return Shown("expired", f"It expired at {text}.", digest, checked)
    if now + SOON >= ends:
        return Shown("expires soon", f"It expires at {text}.", digest, checked)
    return Shown("valid", "Its signatures hold, and it is in force.", digest, checked)


def rules(
    one: Shown, settings: Settings, model: str, *, now: datetime, handed_out: Callable[[str], bool]
) -> tuple[RuleResult, ...]:
    """Every rule of the model's policy with its limit and the certificate's figure.

    `handed_out` tells whether a nonce is one that this server gave for the model: the gate then
    draws the images anew with it.
    """
    if one.checked is None:
        return ()
    certificate = one.checked.certificate
    nonces = {figure.nonce for figure in certificate.figures.faithful}
    nonce = next(iter(nonces)) if len(nonces) == 1 else ""
    return decide(
        certificate,
        settings.policy_for(model),
        signers=one.checked.signers,
        now=now,
        nonce=nonce if nonce and handed_out(nonce) else "",
    ).rules
