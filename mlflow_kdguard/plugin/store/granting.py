"""From a judgement to a promotion: overrides, the copy of the bytes, the log's entry."""

from datetime import UTC, datetime

from mlflow_kdguard.artifacts import OVERRIDE
from mlflow_kdguard.attest.overrides import Granted
from mlflow_kdguard.attest.revocation import certificate_digest
from mlflow_kdguard.errors import CertificateError, KDGuardError
from mlflow_kdguard.plugin import log
from mlflow_kdguard.plugin.server import content
from mlflow_kdguard.plugin.server.judge import Judgement, VersionFacts
from mlflow_kdguard.plugin.server.reading import opened
from mlflow_kdguard.plugin.server.settings import Settings
from mlflow_kdguard.plugin.store.actor import actor
from mlflow_kdguard.plugin.store.asked import Asked
from mlflow_kdguard.plugin.store.refusal import Refused
from mlflow_kdguard.plugin.store.transaction import Written


def refuse_spelling(asked: Asked, settings: Settings) -> None:
    """A guarded alias is set under the name that the policy writes, or not at all."""
    guarded = settings.policy_for(asked.name).guarded
    names = guarded.aliases if asked.action == "promote" else ()
    if asked.action == "promote" and asked.alias not in names:
        raise CertificateError(
            f"alias: {asked.alias!r} is another spelling of a guarded alias "
            f"({', '.join(names)}), and would be taken for it."
        )


def override(asked: Asked, facts: VersionFacts, judged: Judgement, settings: Settings) -> Granted:
    """The override under which a version is promoted that does not pass; else the refusal."""
    reasons = list(judged.reasons)
    text = facts.tags.get(OVERRIDE)
    if text is not None and not settings.stated.overrides:
        reasons.append("override: this server's settings do not allow overrides.")
    elif text is not None and judged.files is not None and _safe(judged):
        envelope, now = text.encode("utf-8", "surrogatepass"), datetime.now(UTC)
        try:
            settings.keys.revocations.refuse(envelope, (), now)
            return log.overrides.check(
                envelope,
                verifiers=settings.verifiers,
                now=now,
                files=judged.files,
                model=asked.name,
                version=asked.version,
                alias=asked.alias,
                workspace=asked.workspace,
                registries=settings.identities(asked.workspace),
            )
        except KDGuardError as error:
            reasons.append(f"override: {error}")
    raise Refused(str(asked), reasons)


def _safe(judged: Judgement) -> bool:
    """What no override waives: where the bytes lie, and that they can serve one model only."""
    return not {"bytes", "bundle"}.intersection(judged.decision.failed)


def kept(judged: Judgement, settings: Settings) -> str | None:
    """Where the judged bytes are from now on; audit mode moves nothing."""
    if not settings.enforcing:
        return None
    assert judged.files is not None  # a version passes with its files only
    assert judged.digest is not None
    return content.keep(judged.files, judged.digest, settings.stated.content, opened=opened)


def enter(written: Written, asked: Asked, judged: Judgement, granted: Granted | None) -> None:
    """Write what is about to happen to the log, and spend the nonce that it rests on."""
    if granted is not None:
        written.wrote(
            log.overrides.accept(
                written.session,
                granted,
                actor=actor(),
                now=written.now,
                signer=written.settings.signer,
                policy=judged.policy_digest,
                reasons=judged.reasons,
                verifiers=written.settings.verifiers,
            )
        )
        return
    written.append(
        asked.event(
            asked.action,
            "pass",
            certificate=judged.certificate_sha256,
            policy=judged.policy_digest,
        )
    )
    if judged.nonce and judged.certificate is not None:
        log.nonces.use(written.session, judged.nonce, certificate_digest(judged.certificate))
