"""The log in real databases: many writers, kills, restarts, and MLflow's own migrations."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa

from flows import log_writers, servers
from mlflow_kdguard.attest.signing import Signer, keygen
from mlflow_kdguard.plugin import log
from mlflow_kdguard.plugin.log import tables
from requirements import postgres_program

PROGRAM = str(Path(log_writers.__file__))


@dataclass(frozen=True)
class Place:
    """An empty database, a key, and the file for published heads."""

    uri: str
    key: Path
    heads: Path
    signer: Signer

    @contextlib.contextmanager
    def engine(self) -> Iterator[sa.Engine]:
        engine = log_writers.connected(self.uri)
        yield engine
        engine.dispose()

    def prepared(self) -> "Place":
        with self.engine() as engine:
            log.prepare(engine)
            log_writers.beside.create(engine, checkfirst=True)
        return self

    def report(self) -> log.LogReport:
        with self.engine() as engine, engine.connect() as connection:
            return log.verify(connection, verifiers=(self.signer.verifier,), heads=self.heads)

    def pairs(self) -> tuple[Counter[tuple[str, int]], Counter[tuple[str, int]]]:
        """(who, n) of every entry, and of every row that was written beside one."""
        with self.engine() as engine, engine.connect() as connection:
            logged = connection.execute(sa.select(tables.log.c.actor, tables.log.c.version))
            written = connection.execute(sa.select(log_writers.beside))
            return Counter((a, int(v)) for a, v in logged), Counter((w, n) for w, n in written)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    key = tmp_path / "log.pem"
    signer = keygen(key, owner="registry server", role="builder")
    uri = f"sqlite:///{tmp_path / 'registry.db'}"
    if request.param == "postgresql":
        uri = fresh_database(request.getfixturevalue("postgres_uri"), f"log_{uuid.uuid4().hex}")
    return Place(uri, key, tmp_path / "heads.jsonl", signer)


def fresh_database(uri: str, name: str) -> str:
    engine = sa.create_engine(uri, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    engine.dispose()
    return urlsplit(uri)._replace(path=f"/{name}").geturl()


def start(*arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, PROGRAM, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )


@contextlib.contextmanager
def writers(
    place: Place, names: Sequence[str], count: int, patience: float = 0
) -> Iterator[list["subprocess.Popen[str]"]]:
    started = [start("write", place.uri, place.key, place.heads, n, count, patience) for n in names]
    try:
        go(started)
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                assert stream is not None
                stream.close()


def go(started: Sequence["subprocess.Popen[str]"]) -> None:
    """Let them begin once all of them are there."""
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.stderr and process.stderr.read()
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


def said(process: "subprocess.Popen[str]") -> list[tuple[int, int]]:
    """(n, seq) of every entry that the writer has seen committed."""
    assert process.stdout is not None
    whole = [line for line in process.stdout.read().splitlines(keepends=True) if line[-1:] == "\n"]
    return [(int(line.split()[0]), int(line.split()[1])) for line in whole]


def test_processes_that_write_at_once_lose_and_double_nothing(place: Place) -> None:
    place.prepared()
    names, count = ("ann", "bob", "cid", "dan"), 40
    with writers(place, names, count) as started:
        seqs = []
        for process in started:
            out, error = process.communicate(timeout=240)
            assert process.returncode == 0, error
            seqs += [int(line.split()[1]) for line in out.splitlines()]
    assert sorted(seqs) == list(range(1, len(names) * count + 1))
    found = place.report()
    assert (found.problems, found.entries) == ((), len(names) * count)
    assert found.published == len(names) * count
    logged, written = place.pairs()
    assert logged == written == Counter((name, n) for name in names for n in range(count))


def test_processes_that_start_at_once_make_one_log(place: Place) -> None:
    """On an empty database, as the workers of one server do."""
    started = [start("prepare", place.uri) for _ in range(4)]
    go(started)
    for process in started:
        _, error = process.communicate(timeout=120)
        assert (process.returncode, error) == (0, "")
    with place.engine() as engine, engine.connect() as connection:
        head = log.read_head(connection)
        assert head is not None
        assert head.seq == 0
        names = sa.inspect(connection).get_table_names()
    assert set(names) == {*tables.metadata.tables, tables.VERSION_TABLE}
    assert place.report().ok


@pytest.mark.slow
def test_killed_in_the_middle_of_appends(place: Place) -> None:
    place.prepared()
    for round_ in range(3):
        names = [f"{who}{round_}" for who in ("ann", "bob", "cid")]
        with writers(place, names, 0) as started:
            first = [process.stdout.readline() for process in started if process.stdout]
            time.sleep(0.1 + 0.23 * round_)
            for process in started:
                process.send_signal(signal.SIGKILL)
            heard = {name: said(process) for name, process in zip(names, started, strict=True)}
        assert all(line.startswith("0 ") for line in first)
        found = place.report()
        assert found.problems == ()
        logged, written = place.pairs()
        assert logged == written
        assert set(logged.values()) == {1}
        for name, told in heard.items():
            kept = {n for who, n in logged if who == name}
            assert {0, *(n for n, _ in told)} <= kept
            assert len(kept) <= 1 + len(told) + 1  # the one that was committed as the kill came


def test_a_cut_tail_shows_against_the_published_heads(place: Place) -> None:
    place.prepared()
    with place.engine() as engine:
        made = [log_writers.write_one(engine, place.signer, "ann", n) for n in range(5)]
        for entry in made:
            log.publish(entry.head, place.heads)
        old = made[2].head
        with engine.begin() as connection:
            connection.execute(sa.delete(tables.log).where(tables.log.c.seq > old.seq))
            columns = old.model_dump(include={"seq", "digest", "time", "signature"})
            connection.execute(sa.update(tables.head).values(**columns))
        with engine.connect() as connection:
            alone = log.verify(connection, verifiers=(place.signer.verifier,), heads=None)
        assert alone.ok, "a valid old head: the database alone cannot tell"
    assert any("cut" in problem for problem in place.report().problems)


def test_a_reader_does_not_hold_up_writers_and_is_not_confused(place: Place) -> None:
    place.prepared()
    with writers(place, ("ann", "bob"), 60) as started:
        checks = 0
        while not place.heads.exists():
            time.sleep(0.01)
        while any(process.poll() is None for process in started):
            found = place.report()
            assert found.problems == ()
            checks += 1
        for process in started:
            _, error = process.communicate(timeout=60)
            assert process.returncode == 0, error
    assert checks > 2
    assert place.report().entries == 120


# ── Beside MLflow ───────────────────────────────────────────────────────────────────────────────


OLDER = "0584bdc529eb"
"""A revision of MLflow's own tables, well before the newest."""


def _schema(engine: sa.Engine, ours: bool) -> dict[str, list[str]]:
    found = sa.inspect(engine)
    mine = {*tables.metadata.tables, tables.VERSION_TABLE}
    names = [name for name in found.get_table_names() if (name in mine) == ours]
    return {name: [repr(column) for column in found.get_columns(name)] for name in sorted(names)}


def _upgrade(uri: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlflow", "db", "upgrade", uri],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_neither_migration_touches_the_other_s_tables(place: Place) -> None:
    """`mlflow db upgrade` over many revisions with our tables there, and ours beside MLflow's."""
    _mlflow_tables(place.uri, OLDER)
    with place.engine() as engine:
        theirs = _schema(engine, ours=False)
        place.prepared()
        log_writers.beside.drop(engine)
        assert _schema(engine, ours=False) == theirs
        before = _schema(engine, ours=True)
        event = log.Event(actor="ann", action="promote")
        with engine.begin() as connection:
            entry = log.append(connection, event, now=datetime.now(UTC), signer=place.signer)
        log.publish(entry.head, place.heads)
    _upgrade(place.uri)
    with place.engine() as engine:
        upgraded = _schema(engine, ours=False)
        assert upgraded != theirs
        assert _schema(engine, ours=True) == before
        log.prepare(engine)
        assert _schema(engine, ours=False) == upgraded
    assert place.report().ok
    _upgrade(place.uri)
    assert place.report().ok


def _mlflow_tables(uri: str, revision: str) -> None:
    """MLflow's tables as they were at an older revision."""
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base

    engine = sa.create_engine(uri)
    Base.metadata.create_all(engine)
    command.upgrade(_get_alembic_config(uri), revision)
    engine.dispose()


# ── The database itself ─────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.parametrize("mode", ["immediate", "fast"])
def test_the_database_is_restarted_under_writers(tmp_path: Path, mode: str) -> None:
    """`immediate` is a crash: what was committed is recovered from the write-ahead log."""
    key = tmp_path / "log.pem"
    signer = keygen(key, owner="registry server", role="builder")
    with servers.postgres(tmp_path) as uri:
        place = Place(uri, key, tmp_path / "heads.jsonl", signer).prepared()
        try:
            with writers(place, ("ann", "bob"), 0, patience=30) as started:
                for _ in range(2):
                    time.sleep(0.7)
                    _restart(place, mode)
                time.sleep(1.0)
                for process in started:
                    assert process.poll() is None, process.stderr and process.stderr.read()
                    process.kill()
                heard = {
                    (who, n)
                    for who, process in zip(("ann", "bob"), started, strict=True)
                    for n, _ in said(process)
                }
            found = place.report()
            assert found.problems == ()
            logged, written = place.pairs()
            assert logged == written
            assert set(logged.values()) == {1}
            assert heard <= set(logged)
            assert found.entries > found.published > 0 or found.entries == found.published
        finally:
            _control(place, "stop", "-m", "immediate")


def _restart(place: Place, mode: str) -> None:
    _control(place, "restart", "-m", mode)


def _control(place: Place, *arguments: str) -> None:
    program = postgres_program("pg_ctl")
    assert program is not None
    with place.engine() as engine, engine.connect() as connection:
        data = connection.exec_driver_sql("SHOW data_directory").scalar_one()
    command = [str(program), "-D", str(data), "-w", "-l", f"{data}/restarted.log", *arguments]
    servers._run_as_owner(command)
