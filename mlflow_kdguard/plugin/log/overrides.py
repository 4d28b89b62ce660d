"""Break-glass in the database: an override that was accepted is kept, and logged.

The document itself, and check(), are in `attest.overrides`. How the store uses them, inside of the
promotion's transaction and instead of the decision that refused:

    granted = overrides.check(tag, verifiers=settings.verifiers(), now=now, files=files,
                              model=..., version=..., alias=..., workspace=..., registries=...)
    head = lock(session)                       # first statement of the transaction
    entry = overrides.accept(session, granted, actor=..., now=now, signer=..., reasons=failed_rules)

accept() writes the entry (action `override`), so the promotion writes no other one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import RowMapping, insert, select

from mlflow_kdguard.attest.overrides import Granted, Override, check
from mlflow_kdguard.attest.signing import Signer, Verifier
from mlflow_kdguard.plugin.log import tables
from mlflow_kdguard.plugin.log.chain import Entry, Event, append, lock
from mlflow_kdguard.plugin.log.heads import stamp
from mlflow_kdguard.plugin.log.tables import Database

__all__ = ["Accepted", "Granted", "Override", "accept", "accepted", "check"]


@dataclass(frozen=True, slots=True)
class Accepted:
    """An override that a promotion rested on, and when it was first used. Times are ISO 8601."""

    sha256: str
    workspace: str
    model: str
    version: str
    alias: str
    reason: str
    owners: tuple[str, ...]
    issued: str
    until: str
    used: str
    document: bytes


def accept(
    session: Database,
    granted: Granted,
    *,
    actor: str,
    now: datetime,
    signer: Signer | None,
    policy: str = "",
    reasons: Sequence[str] = (),
    verifiers: Sequence[Verifier] = (),
) -> Entry:
    """Log that an override is used, and keep its document; it may be used until it ends.

    `policy` is the digest of the policy that it overrides, `reasons` what the policy had against
    the promotion. Takes the log's lock; raises as append() does.
    """
    lock(session)
    stated = granted.override
    why = (f"reason: {stated.reason}", *(f"signed by {owner}" for owner in granted.owners))
    event = Event(
        actor=actor,
        action="override",
        workspace=stated.workspace,
        model=stated.model,
        version=stated.version,
        alias=stated.alias,
        certificate=granted.sha256,
        policy=policy,
        decision="override",
        reasons=(*why, f"until {stated.until}", *reasons),
    )
    entry = append(session, event, now=now, signer=signer, verifiers=verifiers)
    known = select(tables.overrides.c.sha256).where(tables.overrides.c.sha256 == granted.sha256)
    if session.execute(known).scalar() is None:
        about = event.model_dump(include={"workspace", "model", "version", "alias"})
        session.execute(insert(tables.overrides), [about | _row(granted, now)])
    return entry


def accepted(session: Database) -> tuple[Accepted, ...]:
    """Every override that was ever used, the latest first."""
    rows = select(tables.overrides).order_by(tables.overrides.c.used.desc())
    return tuple(map(_accepted, session.execute(rows).mappings()))


def _row(granted: Granted, now: datetime) -> dict[str, str]:
    return {
        "sha256": granted.sha256,
        "reason": granted.override.reason,
        "owners": json.dumps(granted.owners),
        "issued": granted.override.issued,
        "ends": granted.override.until,
        "used": stamp(now),
        "document": granted.envelope.decode(),
    }


def _accepted(row: RowMapping) -> Accepted:
    same = ("sha256", "workspace", "model", "version", "alias", "reason", "issued", "used")
    return Accepted(
        **{key: row[key] for key in same},
        owners=tuple(json.loads(row["owners"])),
        until=row["ends"],
        document=row["document"].encode(),
    )
