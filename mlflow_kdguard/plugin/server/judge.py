"""Whether a version may carry a guarded alias: places → bytes → bundle → certificate → policy.

Everything that speaks against a version is collected, so that a refusal says all of it at once.
Nothing about a version raises: what cannot be found out is a refusal, too.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from mlflow_kdguard.files import digest_json, sha256
from mlflow_kdguard.plugin.server.case import Case
from mlflow_kdguard.plugin.server.facts import Fetch, Handed, VersionFacts
from mlflow_kdguard.plugin.server.settings import Settings
from mlflow_kdguard.records import Decision

__all__ = ["Fetch", "Handed", "Judgement", "VersionFacts", "judge"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Judgement:
    """The answer, and what it rests on.

    `files` are the bytes that were judged, None where they could not be read; `digest` is theirs
    together; `nonce` is the one that the figures were drawn with, empty where there is none;
    `certificate` is the envelope.
    """

    decision: Decision
    certificate_sha256: str | None
    files: Mapping[str, bytes] | None
    digest: str | None
    policy_digest: str
    nonce: str = ""
    certificate: bytes | None = None

    @property
    def passed(self) -> bool:
        """Whether the version may have the alias."""
        return self.decision.passed

    @property
    def reasons(self) -> tuple[str, ...]:
        """Every rule that failed, with its reason; rules that give the same one stand together."""
        grouped: dict[str, list[str]] = {}
        for rule in self.decision.rules:
            if not rule.ok:
                grouped.setdefault(rule.why, []).append(rule.rule)
        return tuple(f"{', '.join(rules)}: {why}" for why, rules in grouped.items())


def judge(
    version: VersionFacts,
    alias: str,
    settings: Settings,
    *,
    now: datetime,
    fetch: Fetch,
    nonce_of: Callable[[str], Handed | None] | None = None,
) -> Judgement:
    """Judge a version's bytes, as they are now, for a guarded alias or stage.

    `nonce_of` finds a nonce that this server handed out; without it (a client's own judgement)
    nonces are not looked up. Never raises for anything about the version or its store.
    """
    case = Case(version, settings, now, fetch, nonce_of)
    case.bytes_()
    case.shape()
    case.certified()
    passed = all(rule.ok for rule in case.rules)
    log.debug("%s/%s for %s: %s", version.name, version.version, alias, passed)
    return Judgement(
        Decision(decision="pass" if passed else "refuse", rules=tuple(case.rules)),
        None if case.envelope is None else sha256(case.envelope),
        case.files,
        None if case.files is None else digest_json(case.digests),
        settings.policy_for(version.name).digest,
        case.nonce,
        case.envelope,
    )
