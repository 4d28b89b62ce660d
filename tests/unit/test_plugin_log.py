"""The log's laws: no edit, removal, insertion, reordering, cut or forgery goes unseen."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

from mlflow_kdguard.attest import overrides as glass
from mlflow_kdguard.attest.signing import Signer, signer_of
from mlflow_kdguard.errors import CertificateError, ConfigError, RegistryError
from mlflow_kdguard.files import sha256
from mlflow_kdguard.plugin import log
from mlflow_kdguard.plugin.log import chain, check, heads, migrate, tables
from mlflow_kdguard.records import Subject, format_time

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
FILES = {"model.onnx": b"the student"}


def signer(owner: str, number: int) -> Signer:
    private = Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)
    return signer_of(private, owner=owner, role="verifier", valid_from=NOW - timedelta(days=1))


SERVER, OTHER = signer("registry server", 1), signer("somebody", 2)
ANN, BOB = signer("Ann", 3), signer("Bob", 4)


def event(number: int, **changes: Any) -> log.Event:
    values = {
        "actor": "ann", "action": "promote", "workspace": "default", "model": "student",
        "version": str(number), "alias": "champion", "certificate": sha256(b"certificate"),
        "policy": sha256(b"policy"), "decision": "pass", "reasons": ("châmpion", "b"),
    }  # fmt: skip
    return log.Event(**(values | changes))


def override(**changes: Any) -> glass.Override:
    values: dict[str, Any] = {
        "registry": "http://registry", "workspace": "default", "model": "student", "version": "3",
        "alias": "champion", "reason": "the old one is down", "issued": format_time(NOW),
        "until": format_time(NOW + timedelta(days=7)),
        "subjects": [Subject(path=path, sha256=sha256(data)) for path, data in FILES.items()],
    }  # fmt: skip
    return glass.Override(**(values | changes))


def envelope(stated: glass.Override | None = None, *signers: Signer) -> bytes:
    first, *others = signers or (ANN, BOB)
    signed = glass.issue(stated or override(), first, now=NOW)
    for other in others:
        signed = glass.cosign(signed, other, now=NOW)
    return signed


def granted(signed: bytes, **changes: Any) -> glass.Granted:
    values: dict[str, Any] = {
        "verifiers": (ANN.verifier, BOB.verifier), "now": NOW + timedelta(hours=1), "files": FILES,
        "model": "student", "version": "3", "alias": "champion", "workspace": "default",
        "registries": ("http://registry",),
    }  # fmt: skip
    return glass.check(signed, **(values | changes))


def engine_of(database: sqlite3.Connection) -> sa.Engine:
    return sa.create_engine("sqlite://", creator=lambda: database, poolclass=StaticPool)


@contextmanager
def opened(image: bytes | None = None) -> Iterator[sa.Engine]:
    """A database in memory, as `image` left it."""
    with closing(sqlite3.connect(":memory:", check_same_thread=False)) as database:
        if image is not None:
            database.deserialize(image)
        engine = engine_of(database)
        yield engine
        engine.dispose()


def write(engine: sa.Engine, number: int, signed_by: Signer | None = SERVER) -> log.Entry:
    with Session(engine) as session, session.begin():
        now = NOW + timedelta(minutes=number)
        return log.append(session, event(number), now=now, signer=signed_by)


@dataclass(frozen=True)
class Kept:
    """A log that holds: the database, and the lines of its published heads."""

    image: bytes
    lines: tuple[bytes, ...]


def make() -> Kept:
    with opened() as engine:
        log.prepare(engine)
        made = [write(engine, number) for number in range(1, 6)]
        with Session(engine) as session, session.begin():
            nonce = log.nonces.issue(session, "student", "default", "5" * 64, NOW, signer=SERVER)
            assert nonce.entry is not None
            seen = log.seen(session, 3, "d" * 64, now=NOW, signer=SERVER)
            assert seen is not None
            broken = log.overrides.accept(
                session, granted(envelope()), actor="ann", now=NOW, signer=SERVER
            )
        made += [nonce.entry, seen, broken, write(engine, 9)]
        raw = engine.raw_connection()
        image = raw.driver_connection.serialize()
        raw.close()
    return Kept(image, tuple(entry.head.to_line() for entry in made))


KEPT = make()
LAST = len(KEPT.lines)
COLUMNS = [column.name for column in tables.log.columns]


def report(image: bytes, path: Path | None = None) -> log.LogReport:
    with opened(image) as engine, engine.connect() as connection:
        return log.verify(connection, verifiers=(SERVER.verifier,), heads=path)


def spoiled(*statements: tuple[str, tuple[Any, ...]]) -> bytes:
    """The database after somebody's own SQL."""
    with closing(sqlite3.connect(":memory:")) as database:
        database.deserialize(KEPT.image)
        for statement, values in statements:
            database.execute(statement, values)
        database.commit()
        return database.serialize()


def rows() -> list[dict[str, Any]]:
    with closing(sqlite3.connect(":memory:")) as database:
        database.deserialize(KEPT.image)
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute("SELECT * FROM kdguard_log ORDER BY seq")]


ROWS = rows()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "heads.jsonl"
    file.write_bytes(b"".join(KEPT.lines))
    return file


# ── What holds ──────────────────────────────────────────────────────────────────────────────────


def test_a_log_that_nobody_touched_holds(path: Path) -> None:
    found = report(KEPT.image, path)
    assert (found.ok, found.problems, found.notes) == (True, (), ())
    assert (found.entries, found.published) == (LAST, LAST)


def test_an_empty_log_holds() -> None:
    with opened() as engine:
        log.prepare(engine)
        with engine.connect() as connection:
            found = log.verify(connection, verifiers=(SERVER.verifier,), heads=None)
    assert (found.ok, found.entries) == (True, 0)


def test_what_is_not_compared_is_said(tmp_path: Path) -> None:
    with opened(KEPT.image) as engine, engine.connect() as connection:
        found = log.verify(connection, verifiers=(), heads=None)
        assert found.ok
        assert len(found.notes) == 2
        missing = log.verify(connection, verifiers=(), heads=tmp_path / "absent")
    assert any("is missing" in problem for problem in missing.problems)


def test_entries_say_what_happened_and_when() -> None:
    assert [row["seq"] for row in ROWS] == list(range(1, LAST + 1))
    assert ROWS[0]["time"] == "2026-03-01T12:01:00.000Z"
    assert ROWS[0]["reasons"] == '["ch\\u00e2mpion", "b"]'
    assert [row["action"] for row in ROWS[5:8]] == ["nonce", "settings", "override"]


# ── What does not ───────────────────────────────────────────────────────────────────────────────


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(COLUMNS),
    st.integers(1, LAST),
    st.one_of(st.text(max_size=70), st.integers(-3, LAST + 3), st.binary(max_size=70)),
)
@example("reasons", 1, '["châmpion", "b"]')
@example("seq", 1, 0)
@example("seq", LAST, LAST + 1)
@example("actor", 2, b"ann")
@example("actor", 2, b"\xff")
@example("digest", 2, ROWS[1]["digest"].upper())
def test_any_edit_of_an_entry_is_seen(column: str, seq: int, value: Any) -> None:
    kept = ROWS[seq - 1][column]
    assume(str(value) != str(kept))
    assume(not isinstance(value, str) or max(value, default="") < "\ud800")
    try:
        image = spoiled((f"UPDATE kdguard_log SET {column} = ? WHERE seq = ?", (value, seq)))
    except sqlite3.Error:
        assume(False)
    assert not report(image).ok


@settings(deadline=None, max_examples=30)
@given(st.sets(st.integers(1, LAST), min_size=1))
def test_any_removal_is_seen(gone: set[int]) -> None:
    image = spoiled(*(("DELETE FROM kdguard_log WHERE seq = ?", (seq,)) for seq in gone))
    assert not report(image).ok


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(1, LAST + 1)), st.booleans())
def test_any_reordering_is_seen(order: list[int], relink: bool) -> None:
    """Also where whoever reorders mends the links between the rows."""
    assume(order != sorted(order))
    moved = [ROWS[seq - 1] | {"seq": place} for place, seq in enumerate(order, 1)]
    if relink:
        for row, before in zip(moved[1:], moved, strict=False):
            row["previous"] = before["digest"]
    assert not report(_rewritten(moved)).ok


@settings(deadline=None, max_examples=30)
@given(st.integers(-2, LAST + 3), st.integers(1, LAST))
def test_any_insertion_is_seen(place: int, like: int) -> None:
    moved = [row | {"seq": row["seq"] + (row["seq"] >= place > 0)} for row in ROWS]
    moved.append(ROWS[like - 1] | {"seq": place, "actor": "somebody else"})
    assert not report(_rewritten(moved)).ok


@settings(deadline=None, max_examples=30)
@given(st.integers(1, LAST), st.sampled_from(["model", "decision", "reasons", "time"]))
def test_a_chain_written_anew_lacks_the_signature(seq: int, column: str) -> None:
    """Whoever knows the format can chain what he likes; the key is what he lacks."""
    moved = [dict(row) for row in ROWS]
    moved[seq - 1][column] = "another"
    digest = _chain(moved)
    image = _rewritten(moved, ("UPDATE kdguard_head SET digest = ?", (digest,)))
    found = report(image)
    assert any("head" in problem for problem in found.problems)


@pytest.mark.parametrize("forger", [OTHER, None])
def test_a_forged_head_is_seen(forger: Signer | None) -> None:
    moved = [row | {"decision": "pass"} for row in ROWS]
    image = _rewritten(moved, *_headed(moved, _chain(moved), forger))
    assert not report(image).ok


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["log", "seq", "digest", "time", "key_id", "signature"]), st.data())
def test_any_edit_of_the_head_is_seen(column: str, data: st.DataObject) -> None:
    value = data.draw(st.one_of(st.text("0123456789abcdef", max_size=64), st.integers(0, LAST - 1)))
    image = spoiled((f"UPDATE kdguard_head SET {column} = ?", (value,)))
    assert not report(image).ok


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM kdguard_head",
        "UPDATE kdguard_head SET id = 2",
        "INSERT INTO kdguard_head SELECT 2, log, seq, digest, time, key_id, signature "
        "FROM kdguard_head",
        "DELETE FROM kdguard_nonces",
        "UPDATE kdguard_nonces SET attempt = 0",
        "UPDATE kdguard_nonces SET model = 'another'",
        "UPDATE kdguard_nonces SET series = 'another'",
        "UPDATE kdguard_overrides SET reason = 'another'",
        "UPDATE kdguard_overrides SET owners = '[\"Eve\"]'",
        "UPDATE kdguard_overrides SET owners = 'Eve'",
        "UPDATE kdguard_overrides SET ends = '2040-01-01T00:00:00Z'",
        "UPDATE kdguard_overrides SET document = 'another'",
        "UPDATE kdguard_overrides SET document = x'ff'",
        "UPDATE kdguard_settings SET version = 2",
        "INSERT INTO kdguard_settings VALUES (4, 'dd', '')",
        "DELETE FROM kdguard_overrides",
        "UPDATE kdguard_overrides SET version = '4'",
    ],
)
def test_edits_around_the_entries_are_seen(statement: str) -> None:
    assert not report(spoiled((statement, ()))).ok


@settings(deadline=None, max_examples=20)
@given(st.integers(0, LAST - 1))
def test_a_cut_tail_is_seen_against_published_heads(kept: int) -> None:
    """With a head that was validly signed when the log was that long."""
    moved = [dict(row) for row in ROWS[:kept]]
    head = _line(kept)
    image = _rewritten(moved, *_as_row(head), *_companions_of(moved))
    with _file(KEPT.lines) as path:
        assert report(image).ok
        found = report(image, path)
    assert any("cut" in problem for problem in found.problems)


def test_another_log_in_its_place_is_seen(path: Path) -> None:
    with opened() as engine:
        log.prepare(engine)
        for number in range(LAST + 3):
            write(engine, number)
        with engine.connect() as connection:
            found = log.verify(connection, verifiers=(SERVER.verifier,), heads=path)
    assert any("another log" in problem for problem in found.problems)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, LAST - 1), st.integers(10, 300), st.integers(0, 255))
def test_an_edited_published_head_is_seen(line: int, at: int, byte: int) -> None:
    lines = [bytearray(one) for one in KEPT.lines]
    at = min(at, len(lines[line]) - 3)
    assume(lines[line][at] != byte and byte != 10)
    lines[line][at] = byte
    with _file([bytes(one) for one in lines]) as path:
        assert not report(KEPT.image, path).ok


def test_a_published_head_of_a_fork_is_seen() -> None:
    """Two heads for one entry, both signed by the server: its log was set back in between."""
    fork = heads.sign(log=_line(4).log, seq=4, digest="f" * 64, time=ROWS[3]["time"], signer=SERVER)
    with _file([*KEPT.lines[:3], fork.to_line(), *KEPT.lines[3:]]) as path:
        found = report(KEPT.image, path)
    assert any("entry 4 is another one" in problem for problem in found.problems)


def test_entries_that_were_not_published_yet_are_said() -> None:
    with _file(KEPT.lines[:4]) as path:
        found = report(KEPT.image, path)
    assert found.ok
    assert found.notes == ("the entries after 4 are newer than every published head",)


def test_heads_may_be_published_in_any_order_and_be_missing(tmp_path: Path) -> None:
    with _file([KEPT.lines[4], KEPT.lines[1], KEPT.lines[4], KEPT.lines[0]]) as path:
        assert report(KEPT.image, path).ok


@pytest.mark.parametrize("kept", [1, 50, -2])
def test_a_torn_line_is_told_from_a_forged_one(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "heads.jsonl"
    path.write_bytes(KEPT.lines[0] + KEPT.lines[1][:kept])
    log.publish(_line(3), path)
    found = report(KEPT.image, path)
    assert (found.ok, found.published) == (True, 2)
    assert any("torn" in note for note in found.notes)


def test_a_head_cannot_be_published_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="cannot publish"):
        log.publish(_line(1), tmp_path)


def test_many_problems_are_listed_in_part() -> None:
    with opened() as engine:
        log.prepare(engine)
        for number in range(60):
            write(engine, number, None)
        with engine.begin() as connection:
            connection.execute(sa.update(tables.log).values(actor="x", previous="y"))
        with engine.connect() as connection:
            found = log.verify(connection, verifiers=(), heads=None)
    assert len(found.problems) == 101
    assert "20 more" in found.problems[-1]


# ── Writing ─────────────────────────────────────────────────────────────────────────────────────


def test_an_entry_stands_and_falls_with_its_transaction() -> None:
    with opened(KEPT.image) as engine:
        with Session(engine) as session:
            log.append(session, event(1), now=NOW, signer=SERVER)
            session.rollback()
        with engine.connect() as connection:
            found = log.verify(connection, verifiers=(SERVER.verifier,), heads=None)
            assert (found.ok, found.entries) == (True, LAST)


TAMPERED = (
    ("DELETE FROM kdguard_log WHERE seq = (SELECT max(seq) FROM kdguard_log)", "tampered"),
    ("UPDATE kdguard_head SET seq = 2", "tampered"),
    ("UPDATE kdguard_head SET signature = ''", "not signed"),
    ("UPDATE kdguard_head SET key_id = 'ab'", "unknown key"),
    ("UPDATE kdguard_head SET time = '2020'", "did not make"),
    ("DELETE FROM kdguard_head", "exactly one head"),
    ("DELETE FROM kdguard_log", "tampered"),
)


@pytest.mark.parametrize(("statement", "reason"), TAMPERED)
def test_nothing_is_appended_to_a_log_that_was_tampered_with(statement: str, reason: str) -> None:
    """The server would sign somebody else's chain otherwise."""
    with opened(spoiled((statement, ()))) as engine, pytest.raises(RegistryError, match=reason):
        write(engine, 1)


def test_a_key_is_changed_with_the_old_one_still_trusted() -> None:
    new = signer("registry server", 9)
    with opened(KEPT.image) as engine, Session(engine) as session:
        with pytest.raises(RegistryError, match="unknown key"):
            log.append(session, event(1), now=NOW, signer=new)
        session.rollback()
        log.append(session, event(1), now=NOW, signer=new, verifiers=(SERVER.verifier,))
        found = log.verify(session, verifiers=(SERVER.verifier, new.verifier), heads=None)
        assert found.ok


def test_a_compromised_key_vouches_for_no_head_and_resuming_is_logged(path: Path) -> None:
    record = SERVER.verifier.record.model_copy(update={"compromised": format_time(NOW)})
    thief = type(SERVER.verifier)(record, SERVER.verifier.public)
    new = signer("registry server", 9)
    with opened(KEPT.image) as engine, Session(engine) as session:
        with pytest.raises(RegistryError, match="compromised since"):
            log.append(session, event(1), now=NOW, signer=new, verifiers=(thief,))
        session.rollback()
        assert not log.verify(session, verifiers=(thief, new.verifier), heads=path).ok
        session.rollback()
        told = event(1, action="resume", reasons=("the key was lost",))
        log.resume(session, told, now=NOW, signer=new)
        assert log.verify(session, verifiers=(thief, new.verifier), heads=path).ok


@given(st.text(), st.text(), st.lists(st.text(max_size=5_000), max_size=3))
@settings(deadline=None, max_examples=25)
@example("\0", "\ud800", ["x" * 10_000])
def test_whatever_a_client_writes_is_logged(model: str, actor: str, reasons: list[str]) -> None:
    with opened(KEPT.image) as engine:
        with Session(engine) as session, session.begin():
            stated = event(1, model=model, actor=actor, reasons=tuple(reasons))
            log.append(session, stated, now=NOW, signer=SERVER)
        with engine.connect() as connection:
            assert log.verify(connection, verifiers=(SERVER.verifier,), heads=None).ok


def test_texts_that_are_cut_stand_by_their_digest() -> None:
    long, many = "x" * 5_000, tuple(str(n) for n in range(150))
    stated = event(1, model=long, reasons=many, certificate=None)
    assert sha256(long.encode()) in stated.model
    assert len(stated.reasons) == 101
    assert stated.reasons[-1] == "… and 50 more"
    assert stated.certificate == ""


@pytest.mark.parametrize("action", ["", "Promote", "a b", "x" * 41])
def test_an_action_is_one_word(action: str) -> None:
    with pytest.raises(ValueError, match="action"):
        event(1, action=action)


def test_entries_are_read_page_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1, 3, LAST, LAST + 1):
        monkeypatch.setattr(chain, "_PAGE", size)
        with opened(KEPT.image) as engine, engine.connect() as connection:
            read = [row["seq"] for row in log.entries(connection, until=LAST - 1)]
            some = [row["seq"] for row in log.entries(connection, after=3, until=LAST)]
        assert read == list(range(1, LAST))
        assert some == list(range(4, LAST + 1))


# ── Tables ──────────────────────────────────────────────────────────────────────────────────────


def test_the_migrations_make_the_tables_that_the_code_names() -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with opened() as engine:
        log.prepare(engine)
        with engine.connect() as connection:
            options = {"version_table": tables.VERSION_TABLE, "compare_type": True}
            context = MigrationContext.configure(connection, opts=options)
            assert not compare_metadata(context, tables.metadata)


def test_preparing_again_changes_nothing() -> None:
    with opened(KEPT.image) as engine:
        log.prepare(engine)
        assert engine.raw_connection().driver_connection.serialize() == KEPT.image


def test_every_log_has_a_name_of_its_own() -> None:
    names = set()
    for _ in range(2):
        with opened() as engine:
            log.prepare(engine)
            with engine.connect() as connection:
                head = log.read_head(connection)
            assert head is not None
            names.add(head.log)
    assert len(names) == 2


def test_a_newer_database_is_refused() -> None:
    newer = spoiled(("UPDATE kdguard_alembic_version SET version_num = 'kdguard_9999'", ()))
    with opened(newer) as engine:
        with pytest.raises(RegistryError, match="kdguard_9999"):
            log.prepare(engine)
        with engine.connect() as connection, pytest.raises(RegistryError, match="kdguard_9999"):
            log.require_current(connection)


def test_a_database_without_a_log_is_not_one_that_holds() -> None:
    with opened() as engine, engine.connect() as connection:
        with pytest.raises(RegistryError, match="cannot be read"):
            log.verify(connection, verifiers=(), heads=None)
        with pytest.raises(RegistryError, match="no kdguard log"):
            log.require_current(connection)


def test_a_database_that_is_not_supported_is_refused() -> None:
    class Elsewhere:
        class dialect:  # noqa: N801
            name = "oracle"

        def rollback(self) -> None:
            raise AssertionError

    with pytest.raises(RegistryError, match="oracle"), migrate._alone(Elsewhere()):  # type: ignore[arg-type]
        pass


# ── Nonces, settings ────────────────────────────────────────────────────────────────────────────


def test_attempts_are_counted_by_model_over_all_files() -> None:
    with opened(KEPT.image) as engine, Session(engine) as session, session.begin():

        def attempt(model: str, workspace: str = "default", subject: str = "a") -> int:
            issued = log.nonces.issue(session, model, workspace, subject, NOW, signer=SERVER)
            return issued.attempt

        assert [attempt("student"), attempt("student", subject="b")] == [2, 3]
        assert [attempt("other"), attempt("student", "team"), attempt("student")] == [1, 1, 4]
        assert attempt("Student") == 1


def test_a_nonce_is_spent_once() -> None:
    with opened(KEPT.image) as engine, Session(engine) as session, session.begin():
        made = log.nonces.issue(session, "student", "default", "5" * 64, NOW, signer=SERVER)
        assert log.nonces.find(session, made.nonce) == _bare(made)
        for _ in range(2):
            used = log.nonces.use(session, made.nonce, "c" * 64)
        assert (used.used_by, used.subject, used.attempt) == ("c" * 64, "5" * 64, 2)
        with pytest.raises(CertificateError, match="spent"):
            log.nonces.use(session, made.nonce, "d" * 64)
        for unknown in ("", "0" * 32, made.nonce.upper() + "x"):
            with pytest.raises(CertificateError, match="not handed out"):
                log.nonces.use(session, unknown, "c" * 64)


def test_settings_only_grow() -> None:
    with opened(KEPT.image) as engine, Session(engine) as session, session.begin():

        def seen(version: int, digest: str) -> log.Entry | None:
            return log.seen(session, version, digest * 64, now=NOW, signer=SERVER)

        assert seen(3, "d") is None
        assert seen(5, "e") is not None
        for version, digest in ((3, "d"), (4, "e"), (5, "d")):
            with pytest.raises(ConfigError, match="version"):
                seen(version, digest)
        assert seen(5, "e") is None
        assert log.versions.newest(session) == (5, "e" * 64)
        assert log.verify(session, verifiers=(SERVER.verifier,), heads=None).ok


def test_threads_write_one_chain(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'log.db'}", connect_args={"timeout": 60})
    log.prepare(engine)
    threads = [
        threading.Thread(target=lambda: [write(engine, n) for n in range(10)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with engine.connect() as connection:
        found = log.verify(connection, verifiers=(SERVER.verifier,), heads=None)
    engine.dispose()
    assert (found.ok, found.entries) == (True, 40)


def _bare(nonce: log.Nonce) -> log.Nonce:
    from dataclasses import replace

    return replace(nonce, entry=None)


def _chain(moved: list[dict[str, Any]]) -> str:
    """Link and digest the rows as we do; returns the last digest."""
    previous = heads.genesis(_line(1).log)
    for row in moved:
        row["previous"] = previous
        previous = row["digest"] = str(check.digest_of(row))  # type: ignore[arg-type]
    return previous


def _rewritten(moved: list[dict[str, Any]], *more: tuple[str, tuple[Any, ...]]) -> bytes:
    insert = f"INSERT INTO kdguard_log VALUES ({', '.join('?' * len(COLUMNS))})"
    inserts = [(insert, tuple(row[column] for column in COLUMNS)) for row in moved]
    return spoiled(("DELETE FROM kdguard_log", ()), *inserts, *more)


def _line(seq: int) -> log.Head:
    """The head that the log had when it was `seq` entries long."""
    if seq:
        return heads.Head.from_line(KEPT.lines[seq - 1])
    name = heads.Head.from_line(KEPT.lines[0]).log
    return heads.sign(log=name, seq=0, digest=heads.genesis(name), time="", signer=None)


def _as_row(head: log.Head) -> list[tuple[str, tuple[Any, ...]]]:
    values = (head.seq, head.digest, head.time, head.key, head.signature)
    text = "UPDATE kdguard_head SET seq = ?, digest = ?, time = ?, key_id = ?, signature = ?"
    return [(text, values)]


def _headed(
    moved: list[dict[str, Any]], digest: str, forger: Signer | None
) -> list[tuple[str, tuple[Any, ...]]]:
    made = heads.sign(
        log=_line(1).log, seq=len(moved), digest=digest, time=moved[-1]["time"], signer=forger
    )
    return _as_row(made.model_copy(update={"key": SERVER.key_id}))


def _companions_of(moved: list[dict[str, Any]]) -> list[tuple[str, tuple[Any, ...]]]:
    left = {row["action"] for row in moved}
    named = {"nonce": "nonces", "settings": "settings", "override": "overrides"}
    return [(f"DELETE FROM kdguard_{t}", ()) for a, t in named.items() if a not in left]


@contextmanager
def _file(lines: Any) -> Iterator[Path]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "heads.jsonl"
        path.write_bytes(b"".join(lines))
        yield path


# ── Databases that are not here ─────────────────────────────────────────────────────────────────


def test_mysql_gets_tables_that_it_can_make_and_a_lock_that_it_takes() -> None:
    """Compiled only: no index over more of a text than MySQL allows, every row in utf8mb4."""
    from sqlalchemy.dialects import mysql
    from sqlalchemy.schema import CreateIndex, CreateTable

    dialect = mysql.dialect()
    made = [str(CreateTable(t).compile(dialect=dialect)) for t in tables.metadata.sorted_tables]
    assert all("CHARSET=utf8mb4" in text for text in made)
    assert not any("PRIMARY KEY (text" in text or "AUTO_INCREMENT" in text for text in made)
    (index,) = tables.log.indexes
    assert "(model(191))" in str(CreateIndex(index).compile(dialect=dialect))
    assert "FOR UPDATE" in str(sa.select(tables.head).with_for_update().compile(dialect=dialect))


def test_the_lock_is_taken_before_anything_is_read() -> None:
    """On SQLite a transaction that had read first could not wait for another writer."""
    with opened(KEPT.image) as engine:
        seen: list[str] = []
        sa.event.listen(engine, "before_cursor_execute", lambda *a: seen.append(a[2]))
        write(engine, 1)
    assert seen[0] == "BEGIN IMMEDIATE"


def test_the_lock_keeps_others_out(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'log.db'}")
    log.prepare(engine)
    with engine.begin() as one, engine.connect() as other:
        log.hold(one)
        log.hold(one)  # for nothing
        other.exec_driver_sql("PRAGMA busy_timeout = 0")
        with pytest.raises(sa.exc.OperationalError, match="locked"):
            log.hold(other)
    engine.dispose()
