"""The log: who did what to which guarded name, when and why, so that no change to it goes unseen.

    prepare(engine)                                   once, when the server starts
    with session.begin():
        lock(session)                                 the transaction's first statement
        ...                                           whatever else the transaction does
        entry = append(session, Event(...), now=now, signer=signer)
    publish(entry.head, path)                         after the commit

Entries are chained by SHA-256, the head is signed, and every signed head is published outside of
the database. `nonces` counts attempts, `versions` remembers the settings that were in force, and
`overrides` keeps break-glass documents; all write to the same log. Needs SQLAlchemy and Alembic,
both of which MLflow brings along; neither MLflow itself nor torch.
"""

from mlflow_kdguard.plugin.log import nonces, overrides, versions
from mlflow_kdguard.plugin.log.chain import (
    Entry,
    Event,
    append,
    entries,
    hold,
    latest,
    lock,
    read_head,
    require_end,
    resume,
)
from mlflow_kdguard.plugin.log.check import LogReport, verify
from mlflow_kdguard.plugin.log.heads import Head, publish, require_publishable
from mlflow_kdguard.plugin.log.migrate import prepare, require_current
from mlflow_kdguard.plugin.log.nonces import Nonce
from mlflow_kdguard.plugin.log.tables import Database
from mlflow_kdguard.plugin.log.versions import seen

__all__ = [
    "Database",
    "Entry",
    "Event",
    "Head",
    "LogReport",
    "Nonce",
    "append",
    "entries",
    "hold",
    "latest",
    "lock",
    "nonces",
    "overrides",
    "prepare",
    "publish",
    "read_head",
    "require_current",
    "require_end",
    "require_publishable",
    "resume",
    "seen",
    "verify",
    "versions",
]
