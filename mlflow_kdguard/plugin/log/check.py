"""verify(): whether a log is still what was written, and all of it.

Three questions: does every entry follow from the one before it; is the end signed by a key that
is trusted; and is every head that was ever published still there. The first finds changes in the
middle, the second a chain that was written anew, the third one whose end was cut.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from sqlalchemy import RowMapping, func, select
from sqlalchemy.exc import DBAPIError

from mlflow_kdguard.attest.signing import Verifier
from mlflow_kdguard.errors import CertificateError, RegistryError
from mlflow_kdguard.files import canonical_json, read_bytes, sha256
from mlflow_kdguard.plugin.log import tables
from mlflow_kdguard.plugin.log.chain import entries, read_head
from mlflow_kdguard.plugin.log.crosscheck import Companions
from mlflow_kdguard.plugin.log.heads import Head, genesis, newest
from mlflow_kdguard.plugin.log.tables import Database
from mlflow_kdguard.records import Record

_MOST = 100
"""Problems, and notes, that a report lists; an edit early in the log may cause any number."""


class LogReport(Record):
    """What verify() found (`kdguard.log/1`).

    `entries` counts the rows that were read, `published` the heads of the file that were compared.
    `problems` is empty exactly if the log holds; `notes` say what could not be, or needs no action.
    """

    schema_: Literal["kdguard.log/1"] = Field("kdguard.log/1", alias="schema")
    ok: bool
    entries: int
    published: int
    head: Head | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]


class _Findings:
    def __init__(self) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []

    def report(self, count: int, published: int, head: Head | None) -> LogReport:
        listed = self.problems[:_MOST]
        if len(self.problems) > _MOST:
            listed.append(f"… and {len(self.problems) - _MOST} more")
        return LogReport(
            ok=not self.problems,
            entries=count,
            published=published,
            head=head,
            problems=tuple(listed),
            notes=tuple(self.notes[:_MOST]),
        )


def verify(connection: Database, *, verifiers: Sequence[Verifier], heads: Path | None) -> LogReport:
    """Check the whole log against itself, its signature and the published heads.

    `verifiers` are the keys that may have signed heads (old ones, too); with none, signatures are
    not checked, and a note says so. `heads` is the file that publish() writes; without it a cut
    tail cannot show. It may run while the server works. Raises RegistryError where the tables
    cannot be read, UsageError where the file of heads cannot.
    """
    found = _Findings()
    if not verifiers:
        found.notes.append("no key was named: signatures were not checked")
    if heads is None:
        found.notes.append("no published heads were compared: a cut tail would not show")
    # The file first: whatever it holds by now was in the database before.
    published = [] if heads is None else list(_published(heads, verifiers, found))
    try:
        return _examined(connection, verifiers, published, heads, found)
    except DBAPIError as error:
        # SQLite keeps bytes that are no text, if somebody writes them.
        if "decode" in str(error.orig):
            found.problems.append(f"a table holds what nobody can have logged: {error.orig}")
            return found.report(0, len(published), None)
        raise RegistryError(
            f"the log cannot be read: {error.orig}.", remedy="Is it the registry's database?"
        ) from error


def _examined(
    connection: Database,
    verifiers: Sequence[Verifier],
    published: Sequence[Head],
    heads: Path | None,
    found: _Findings,
) -> LogReport:
    companions = Companions(connection)
    head = read_head(connection)
    if head is None:
        found.problems.append("the log does not have exactly one head, as we write it")
        return found.report(0, len(published), None)
    if head.seq and verifiers and (why := head.objection(verifiers, now=datetime.now(UTC))):
        found.problems.append(f"the head {why}")
    named: dict[int, set[str]] = {}
    for line in published:
        if line.log == head.log:
            named.setdefault(line.seq, set()).add(line.digest)
    count = _follow(connection, head, named, companions, found)
    found.problems.extend(companions.problems(connection))
    _check_end(connection, found)
    if heads is not None:
        _check_published(head, published, heads, found)
    return found.report(count, len(published), head)


def digest_of(row: RowMapping) -> str | None:
    """The digest that an entry must have; None where it holds what no entry holds."""
    stated = {key: row[key] for key in row if key != "digest"}
    if not all(isinstance(value, str) for key, value in stated.items() if key != "seq"):
        return None
    try:
        return sha256(canonical_json(stated))
    except ValueError:
        return None


def _published(path: Path, verifiers: Sequence[Verifier], found: _Findings) -> Iterator[Head]:
    if not path.exists() or not path.stat().st_size:
        return
    for number, line in enumerate(read_bytes(path, what="the published heads").split(b"\n"), 1):
        if not line:
            continue
        if not line.endswith(b"}"):  # a crash while it was written; publish() went on below
            found.notes.append(f"{path}, line {number} is torn: it proves nothing")
            continue
        try:
            head = Head.from_line(line)
        except CertificateError as error:
            found.problems.append(f"{path}, line {number}: {error.message}")
            continue
        objection = head.objection(verifiers) if verifiers else None
        if objection is not None:
            found.problems.append(
                f"{path}, line {number}: the head of entry {head.seq} {objection}"
            )
        else:
            yield head


def _follow(
    connection: Database,
    head: Head,
    published: Mapping[int, set[str]],
    companions: Companions,
    found: _Findings,
) -> int:
    previous, expected, time, count = genesis(head.log), 1, "", 0
    for row in entries(connection, until=head.seq):
        count += 1
        if row["seq"] > expected:
            found.problems.append(f"entries {expected} to {row['seq'] - 1} are missing")
        _check_row(row, previous, published.get(row["seq"], set()), found)
        companions.hear(row)
        previous, expected, time = row["digest"], row["seq"] + 1, row["time"]
    if expected != head.seq + 1:
        found.problems.append(f"entries {expected} to {head.seq} are missing")
    elif (previous, time) != (head.digest, head.time):
        found.problems.append(f"the head does not name entry {head.seq} as it is")
    return count


def _check_row(row: RowMapping, previous: Any, published: set[str], found: _Findings) -> None:
    seq = row["seq"]
    if row["previous"] != previous:
        found.problems.append(f"entry {seq} does not follow from the one before it")
    if row["digest"] != digest_of(row):
        found.problems.append(f"entry {seq} was changed: its digest is another")
    if published - {row["digest"]}:
        found.problems.append(f"entry {seq} is another one than the head published for it names")


def _check_end(connection: Database, found: _Findings) -> None:
    # In this order: what is written meanwhile moves the head along with the last entry.
    last = connection.execute(select(func.max(tables.log.c.seq))).scalar() or 0
    head = read_head(connection)
    if head is None or last > head.seq:
        found.problems.append(f"the head ends before entry {last}, which is in the table")


def _check_published(head: Head, published: Sequence[Head], heads: Path, found: _Findings) -> None:
    others = sorted({line.log for line in published if line.log != head.log})
    if others:
        found.problems.append(
            f"heads of another log ({', '.join(others)}) were published: this one ({head.log}) "
            "has taken its place"
        )
    last = max((line.seq for line in published if line.log == head.log), default=0)
    if head.seq and not published and newest(heads) is None:  # read again: the first may be new
        found.problems.append(f"{heads} is missing, or holds no head")
    elif last < head.seq:
        found.notes.append(f"the entries after {last} are newer than every published head")
    if last > head.seq:
        found.problems.append(
            f"the tail is cut: entry {last} was published, and the log ends with {head.seq}"
        )
