"""A program that the log's flows start: it appends entries, each with a row of its own beside it.

    python log_writers.py prepare URI
    python log_writers.py write URI KEY HEADS WHO COUNT [PATIENCE]

`write` prints each sequence number once its transaction is committed and its head published. COUNT
0 goes on until it is killed. PATIENCE is for how many seconds a lost database is asked again.
"""

import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from mlflow_kdguard.attest.signing import Signer
from mlflow_kdguard.plugin import log

beside = sa.Table(
    "beside", sa.MetaData(), sa.Column("who", sa.String(20)), sa.Column("n", sa.Integer)
)
"""What a registry changes in the transaction of an entry: one row an entry."""


def connected(uri: str) -> sa.Engine:
    """An engine with the patience that MLflow's sessions have on SQLite."""
    timeout = {"timeout": 20} if uri.startswith("sqlite") else {}
    return sa.create_engine(uri, connect_args=timeout, pool_pre_ping=True)


def write_one(engine: sa.Engine, signer: Signer, who: str, n: int) -> log.Entry:
    """One transaction: the lock, the change, the entry."""
    event = log.Event(actor=who, action="promote", model="m", version=str(n), decision="pass")
    with Session(engine) as session, session.begin():
        log.lock(session)
        session.execute(sa.insert(beside), [{"who": who, "n": n}])
        return log.append(session, event, now=datetime.now(UTC), signer=signer)


def write(uri: str, key: str, heads: str, who: str, count: str, patience: str = "0") -> None:
    """Append `count` entries, or go on for ever."""
    engine, signer = connected(uri), Signer.load(Path(key))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    n, lost = 0, None
    while not int(count) or n < int(count):
        try:
            entry = write_one(engine, signer, who, n)
        except DBAPIError:
            lost = lost or time.monotonic()
            if time.monotonic() > lost + float(patience):
                raise
            time.sleep(0.1)
            n += 1  # whether the last one was committed is unknown: never write it twice
            continue
        log.publish(entry.head, Path(heads))
        sys.stdout.write(f"{n} {entry.seq}\n")
        sys.stdout.flush()
        n, lost = n + 1, None


def prepare(uri: str) -> None:
    """Create the tables as soon as a line is read."""
    engine = connected(uri)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    log.prepare(engine)


if __name__ == "__main__":
    {"write": write, "prepare": prepare}[sys.argv[1]](*sys.argv[2:])
