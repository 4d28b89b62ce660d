"""append(): one entry, chained to the one before it, inside of the caller's transaction.

Every writer takes the head row's write lock with its first statement, so that entries are numbered
in the order in which they are committed, and an entry exists exactly if what it speaks of does.

Lock order: the head first, then anything else. A transaction that locked an alias first, and then
waited for the head, could wait for one that holds the head and wants the alias. On SQLite it also
means that the transaction begins with a write: one that had read first could not wait for another
writer, and would fail with SQLITE_BUSY at once.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from sqlalchemy import Connection, RowMapping, insert, select, update
from sqlalchemy.orm import Session

from mlflow_kdguard.attest.signing import Signer, Verifier
from mlflow_kdguard.errors import RegistryError
from mlflow_kdguard.files import digest_json, sha256
from mlflow_kdguard.plugin.log import tables
from mlflow_kdguard.plugin.log.heads import Head, genesis, newest, sign, stamp
from mlflow_kdguard.plugin.log.tables import Database
from mlflow_kdguard.records import Record

_LONGEST, _LONGEST_NAME = 4_000, 500
"""Characters of a reason, and of any other text: an index of PostgreSQL takes no longer ones.
What is cut stands there by its digest."""
_MOST = 100
"""Reasons of one entry."""
_PAGE = 1_000
_TAKEN = update(tables.head).where(tables.head.c.id == 1).values(seq=tables.head.c.seq)
_RESUME = (
    "Keep the .pub of the log's former key among the trusted keys. If there is none, or it is "
    "compromised, run `kdguard server log verify`, then `kdguard server log resume`."
)


def _storable(value: Any, longest: int) -> Any:
    """Text that every database keeps: no NUL, no half of a surrogate pair, and not endless."""
    if value is None:
        return ""
    if not isinstance(value, str):
        return value
    text = value.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
    if len(text) <= longest:
        return text
    return f"{text[:longest]}… (cut; the SHA-256 of all is {sha256(text.encode())})"


def _few(value: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) > _MOST:
        return (*value[:_MOST], f"… and {len(value) - _MOST} more")
    return value


Text = Annotated[str, BeforeValidator(partial(_storable, longest=_LONGEST_NAME))]
Reason = Annotated[str, BeforeValidator(partial(_storable, longest=_LONGEST))]


class Event(Record):
    """What happened, as an entry states it.

    `action` is one word (promote, refuse, demote, stage, rename-refused, delete-refused, override,
    settings, nonce, …), `decision` the outcome in one word. `certificate` is the SHA-256 of the
    document that the decision rests on (the certificate, the override, the settings), `policy` that
    of the policy. Whatever a client may have written is made storable: over-long text is cut.
    """

    actor: Text
    action: str = Field(pattern=r"^[a-z][a-z-]{0,39}$")
    workspace: Text = ""
    model: Text = ""
    version: Text = ""
    alias: Text = ""
    certificate: Text = ""
    policy: Text = ""
    decision: Text = ""
    reasons: Annotated[tuple[Reason, ...], BeforeValidator(_few)] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry that was written, and the head that it leaves: publish that after the commit."""

    seq: int
    digest: str
    head: Head


def hold(session: Database) -> None:
    """Take the log's lock until the transaction ends; taking it again is free.

    It must be the transaction's first statement: see this module's text.
    """
    connection = session.connection() if isinstance(session, Session) else session
    if connection.dialect.name == "sqlite" and not _begun(connection):
        # What SQLite itself has for this: a write would cost a page of the journal, too.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.execute(_TAKEN)


def lock(session: Database) -> Head:
    """The same, and read the head; RegistryError where there is none."""
    hold(session)
    # FOR UPDATE: MySQL's plain SELECT would read what stood there when the transaction began.
    found = session.execute(select(tables.head).with_for_update()).mappings().all()
    return _the_head(found)


def _begun(connection: Connection) -> bool:
    driver: Any = connection.connection.dbapi_connection
    return bool(driver.in_transaction)


def append(
    session: Database,
    event: Event,
    *,
    now: datetime,
    signer: Signer | None,
    verifiers: Sequence[Verifier] = (),
) -> Entry:
    """Write one entry inside of the caller's transaction; it takes the log's lock (see lock()).

    With a `signer` the new head is signed, and the one that it follows must be signed by the same
    key or by one of `verifiers` (the keys before a rotation): otherwise whoever edits the database
    would have his chain signed by us. Raises RegistryError where the log was tampered with, so
    that nothing is appended; SQLAlchemy's errors where the database is in trouble.
    """
    head = lock(session)
    _refuse_cut(session, head)
    if signer is not None:
        _refuse_unsigned(head, (signer.verifier, *verifiers), now)
    return _append(session, head, event, now=now, signer=signer)


def resume(session: Database, event: Event, *, now: datetime, signer: Signer) -> Entry:
    """Append an entry to a head that nobody whom we trust has signed, and sign what follows.

    For an operator who has run verify() and knows why: the database was restored, or the log's key
    was lost or compromised. Whatever the head named until now is taken as it is.
    """
    head = lock(session)
    _refuse_cut(session, head)
    return _append(session, head, event, now=now, signer=signer)


def _append(
    session: Database, head: Head, event: Event, *, now: datetime, signer: Signer | None
) -> Entry:
    row = {
        "seq": head.seq + 1,
        "time": stamp(now),
        **event.model_dump(exclude={"reasons"}),
        "reasons": json.dumps(event.reasons),
        "previous": head.digest,
    }
    digest = digest_json(row)
    session.execute(insert(tables.log), [row | {"digest": digest}])
    new = sign(log=head.log, seq=head.seq + 1, digest=digest, time=stamp(now), signer=signer)
    columns = new.model_dump(include={"seq", "digest", "time", "signature"})
    session.execute(
        update(tables.head).where(tables.head.c.id == 1).values(**columns, key_id=new.key)
    )
    return Entry(new.seq, digest, new)


def read_head(session: Database) -> Head | None:
    """The head as it stands, without a lock; None where there is not exactly one that we wrote."""
    found = session.execute(select(tables.head)).mappings().all()
    try:
        return _the_head(found)
    except RegistryError:
        return None


def entries(session: Database, *, after: int | None = None, until: int) -> Iterator[RowMapping]:
    """The rows with `after` < seq ≤ `until`, in order, read page by page; None is before the first.

    No cursor stays open between the pages: on SQLite one would keep every writer waiting.
    """
    while after is None or after < until:
        page = select(tables.log).where(tables.log.c.seq <= until)
        if after is not None:
            page = page.where(tables.log.c.seq > after)
        found = session.execute(page.order_by(tables.log.c.seq).limit(_PAGE)).mappings().all()
        yield from found
        if len(found) < _PAGE:
            return
        after = found[-1]["seq"]


def latest(session: Database, count: int, *, model: str | None = None) -> tuple[RowMapping, ...]:
    """The last `count` rows, oldest first; of one model, where one is named."""
    rows = select(tables.log).order_by(tables.log.c.seq.desc()).limit(count)
    if model is not None:
        rows = rows.where(tables.log.c.model == model)
    return tuple(reversed(session.execute(rows).mappings().all()))


def _the_head(rows: Sequence[RowMapping]) -> Head:
    try:
        if [row["id"] for row in rows] == [1]:
            values = {key: rows[0][key] for key in ("log", "seq", "digest", "time", "signature")}
            return Head(**values, key=rows[0]["key_id"])
    except ValueError:
        pass
    raise RegistryError(
        "the log does not have exactly one head, as we write it: somebody edited it.",
        remedy="See docs/how-to/operate-the-log.md.",
    )


def require_end(session: Database, *, verifiers: Sequence[Verifier], heads: Path) -> Head:
    """The head, if append() would go on from it, and no later one was published.

    Quick, so that it can be asked at every start: it looks at the last entry and at the file's last
    lines. Raises RegistryError with the reason.
    """
    published = newest(heads)
    head = read_head(session)
    if head is None:
        head = lock(session)  # which says why
    _refuse_cut(session, head)
    _refuse_unsigned(head, verifiers, datetime.now(UTC))
    if published is not None and not _holds(session, head, published):
        raise RegistryError(
            f"the head that was published last ({heads}) names entry {published.seq} "
            f"({published.digest[:16]}…) of the log {published.log}, which is not in the database: "
            f"that ends with entry {head.seq} of the log {head.log}.",
            remedy="Was the database restored? See docs/how-to/operate-the-log.md.",
        )
    return head


def _holds(session: Database, head: Head, published: Head) -> bool:
    digest = select(tables.log.c.digest).where(tables.log.c.seq == published.seq)
    same = published.seq == 0 or session.execute(digest).scalar() == published.digest
    return same and published.log == head.log


def _refuse_unsigned(head: Head, verifiers: Sequence[Verifier], now: datetime) -> None:
    if head.seq and (objection := head.objection(verifiers, now=now)):
        raise RegistryError(f"the log's head {objection}.", remedy=_RESUME)


def _refuse_cut(session: Database, head: Head) -> None:
    ends = select(tables.log.c.seq, tables.log.c.digest).order_by(tables.log.c.seq.desc())
    last = session.execute(ends.limit(1)).one_or_none()
    end = (0, genesis(head.log)) if last is None else (last.seq, last.digest)
    if end != (head.seq, head.digest):
        raise RegistryError(
            f"the log was tampered with: its head names entry {head.seq} ({head.digest[:16]}…) as "
            f"the last one, and the last one is entry {end[0]} ({str(end[1])[:16]}…).",
            remedy="Run `kdguard server log verify`, and restore the database from a backup.",
        )
