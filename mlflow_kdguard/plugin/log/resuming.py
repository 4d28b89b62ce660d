"""Going on after a restored backup or a lost key, so that it shows that this is what happened."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from mlflow_kdguard.attest.signing import Signer
from mlflow_kdguard.errors import RegistryError
from mlflow_kdguard.plugin.log.chain import Entry, Event, lock, resume
from mlflow_kdguard.plugin.log.check import LogReport, verify
from mlflow_kdguard.plugin.log.heads import newest, publish


@dataclass(frozen=True, slots=True)
class Resumed:
    """The entry that goes on (None where the chain does not hold), and where the old heads are."""

    report: LogReport
    entry: Entry | None = None
    kept: Path | None = None


def go_on(engine: Engine, *, heads: Path, signer: Signer, reason: str, now: datetime) -> Resumed:
    """Sign the log as it is, and say in it why: entry `resume`, action of an operator.

    The chain must hold in itself; signatures and published heads are not asked, since they are what
    fails after a restore or a lost key. The file of heads is kept as `<name>.<time>`, as the proof
    of what was published before. Raises RegistryError where the file cannot be kept.
    """
    with Session(engine) as session, session.begin():
        lock(session)
        report = verify(session, verifiers=(), heads=None)
        if not report.ok or report.head is None:
            return Resumed(report)
        last = newest(heads)
        lost = "none was published" if last is None else f"entry {last.seq}, {last.digest}"
        event = Event(
            actor="operator",
            action="resume",
            decision="resumed",
            reasons=(f"reason: {reason}", f"last published head: {lost}"),
        )
        entry = resume(session, event, now=now, signer=signer)
        kept = _kept(heads, now)
    publish(entry.head, heads)
    return Resumed(report, entry, kept)


def _kept(heads: Path, now: datetime) -> Path | None:
    if not heads.exists():
        return None
    place = heads.with_name(f"{heads.name}.{now:%Y%m%dT%H%M%S}Z")
    if place.exists():
        raise RegistryError(f"{place} exists already.", remedy="Wait a second.")
    try:
        heads.rename(place)
    except OSError as error:
        raise RegistryError(
            f"cannot keep the published heads as {place}: {error.strerror or error}."
        ) from error
    return place
