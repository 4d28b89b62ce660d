"""The promotion decision about a registered version: bytes, certificate, policy. Free of torch."""

from collections.abc import Sequence
from datetime import datetime

from mlflow_kdguard import attest, bundle, gate
from mlflow_kdguard.attest import Checked, Revocations
from mlflow_kdguard.attest.signing import Verifier
from mlflow_kdguard.errors import CertificateError, ModelError
from mlflow_kdguard.policy import Policy
from mlflow_kdguard.records import Decision
from mlflow_kdguard.registry import Bundle, Registry


def judge(
    registry: Registry,
    uri: str,
    *,
    policy: Policy,
    verifiers: Sequence[Verifier],
    now: datetime,
    pins: Sequence[str] = (),
    panel: Sequence[str] = (),
    allow_unpinned: bool = False,
    nonce: str = "",
    revoked: Revocations | None = None,
) -> Decision:
    """Decide whether the version at `uri` may be promoted.

    `nonce` is the one that was handed out for its measurement, `revoked` what was taken back.
    Its files are downloaded and hashed, the shape of the bundle and the certificate are checked,
    and the policy decides. Whatever does not hold is a refusal with its reason, not an error.
    Raises RegistryError where MLflow does not answer.
    """
    stored = registry.download(uri)
    try:
        checked = _believed(registry, stored, verifiers, now=now, revoked=revoked)
    except (CertificateError, ModelError) as error:
        return gate.decide(None, policy, signers=(), now=now, problem=str(error))
    return gate.decide(
        checked.certificate,
        policy,
        signers=checked.signers,
        now=now,
        pins=pins,
        panel=panel,
        allow_unpinned=allow_unpinned,
        nonce=nonce,
    )


def _believed(
    registry: Registry,
    stored: Bundle,
    verifiers: Sequence[Verifier],
    *,
    now: datetime,
    revoked: Revocations | None,
) -> Checked:
    bundle.check(stored.files)
    envelope = stored.certificate()
    if envelope is None:
        raise CertificateError(f"{stored.uri} carries no certificate.")
    return attest.check(
        envelope,
        files=stored.files,
        verifiers=verifiers,
        now=now,
        model_name=stored.name,
        registry=registry.identity,
        revoked=revoked,
    )
