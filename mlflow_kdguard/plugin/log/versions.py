"""Settings that only grow: which versions of the server's settings this database has seen.

Somebody who may edit the settings could go back to an older policy, or to a set of keys that still
holds a revoked one. The database remembers the highest version and what it said.
"""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import insert, select

from mlflow_kdguard.attest.signing import Signer, Verifier
from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.plugin.log import tables
from mlflow_kdguard.plugin.log.chain import Entry, Event, append, lock
from mlflow_kdguard.plugin.log.heads import stamp
from mlflow_kdguard.plugin.log.tables import Database


def seen(
    session: Database,
    version: int,
    digest: str,
    *,
    now: datetime,
    signer: Signer | None,
    verifiers: Sequence[Verifier] = (),
) -> Entry | None:
    """Accept settings: the version that is known, or a higher one, which is remembered and logged.

    Without a change it takes no lock, and returns None; otherwise the log's entry. Call it after
    lock() in a transaction that acts on these settings. Raises ConfigError for a lower version, and
    for the same number with another digest.
    """
    if in_force(session, version, digest):
        return None
    lock(session)
    if in_force(session, version, digest):  # another worker was faster
        return None
    event = Event(
        actor="system",
        action="settings",
        version=str(version),
        certificate=digest,
        decision="accepted",
    )
    entry = append(session, event, now=now, signer=signer, verifiers=verifiers)
    row = {"version": version, "digest": digest, "seen": stamp(now)}
    session.execute(insert(tables.settings), [row])
    return entry


def newest(session: Database) -> tuple[int, str] | None:
    """The highest version of settings that was accepted, and its digest."""
    rows = select(tables.settings.c.version, tables.settings.c.digest)
    found = session.execute(rows.order_by(tables.settings.c.version.desc()).limit(1)).one_or_none()
    return None if found is None else (found.version, found.digest)


def in_force(session: Database, version: int, digest: str) -> bool:
    """Whether these settings are the newest that were accepted (False: they would be, now).

    Raises ConfigError where newer ones were in force, or others with this number.
    """
    found = newest(session)
    if found is None or version > found[0]:
        return False
    if version < found[0]:
        raise ConfigError(
            f"the server's settings have version {version}, and version {found[0]} was in force.",
            remedy="Settings only grow: give what you want back a higher number.",
        )
    if digest != found[1]:
        raise ConfigError(
            f"the server's settings were changed, and still have version {version}.",
            remedy="Raise `version` with every change.",
        )
    return True
