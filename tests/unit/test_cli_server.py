"""`kdguard server`: exit codes, documents, and what is left in the files."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml

from flows.operators import Operator
from mlflow_kdguard.attest import Signer, keygen, overrides
from mlflow_kdguard.plugin import log
from mlflow_kdguard.plugin.log import tables
from mlflow_kdguard.plugin.server import settings as server_settings
from mlflow_kdguard.records import parse_time
from mlflow_kdguard_cli.main import answer

NOW = datetime(2026, 3, 1, tzinfo=UTC)


class Place:
    """An operator's folder, and a database with a log of five entries."""

    def __init__(self, folder: Path) -> None:
        self.operator = Operator.install(
            folder / "server", "http://registry", revoked="revoked.yaml", overrides=True
        )
        self.file = folder / "server" / "server.yaml"
        (self.file.parent / "revoked.yaml").write_text("# who, and why\n# 2026\n{}\n")
        self.database = f"sqlite:///{folder / 'registry.db'}"
        self.signer = Signer.load(self.file.parent / "log.pem")
        self.heads = self.file.parent / "log-head.jsonl"
        engine = sa.create_engine(self.database)
        log.prepare(engine)
        for number in range(5):
            event = log.Event(
                actor="ann", action="promote", model=f"m{number % 2}", version=str(number)
            )
            with engine.begin() as connection:
                entry = log.append(connection, event, now=NOW, signer=self.signer)
            log.publish(entry.head, self.heads)
        engine.dispose()

    def sql(self, text: str) -> None:
        engine = sa.create_engine(self.database)
        with engine.begin() as connection:
            connection.exec_driver_sql(text)
        engine.dispose()

    @property
    def both(self) -> list[str]:
        return ["--settings", str(self.file), "--database", f"kdguard+{self.database}"]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON document, and what people read."""
    code = answer(["server", *map(str, arguments), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out or "{}"), captured.err


def test_a_log_that_holds(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    code, document, said = run(capsys, "log", "verify", *place.both)
    assert (code, document["ok"], document["entries"], document["published"]) == (0, True, 5, 5)
    assert document["notes"] == []
    assert "the log holds" in said


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("UPDATE kdguard_log SET actor = 'bob' WHERE seq = 2", "entry 2 was changed"),
        ("DELETE FROM kdguard_log WHERE seq = 5", "entries 5 to 5 are missing"),
        ("DELETE FROM kdguard_head", "exactly one head"),
    ],
)
def test_a_log_that_does_not_hold_is_exit_3(
    place: Place, capsys: pytest.CaptureFixture[str], statement: str, reason: str
) -> None:
    place.sql(statement)
    code, document, said = run(capsys, "log", "verify", *place.both)
    assert (code, document["ok"]) == (3, False)
    assert any(reason in problem for problem in document["problems"])
    assert "DOES NOT HOLD" in said


def test_an_auditor_needs_the_copy_the_heads_and_the_key(
    place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    named = ("--heads", place.heads, "--key", place.file.parent / "log.pem.pub")
    code, document, _ = run(capsys, "log", "verify", "--database", place.database, *named)
    assert (code, document["notes"]) == (0, [])
    other = keygen(tmp_path / "other.pem", owner="Eve", role="builder")
    assert other
    named = ("--key", tmp_path / "other.pem.pub")
    code, document, _ = run(capsys, "log", "verify", "--database", place.database, *named)
    assert code == 3
    code, document, _ = run(capsys, "log", "verify", "--database", place.database)
    assert (code, len(document["notes"])) == (0, 2)


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("sqlite:////nowhere/at/all.db", 2),
        ("sqlite://", 2),
        ("nonsense", 2),
        ("kdguard+http://127.0.0.1:1", 2),
        ("postgresql+psycopg2://x@127.0.0.1:1/x", 4),
    ],
)
def test_a_database_that_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, uri: str, code: int
) -> None:
    monkeypatch.delenv(server_settings.VARIABLE, raising=False)
    got, document, said = run(capsys, "log", "verify", "--database", uri)
    assert (got, document["exit"]) == (code, code)
    assert "should not happen" not in said


def test_a_database_without_a_log_is_exit_4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.db").write_bytes(b"")
    code, _, said = run(capsys, "log", "show", "--database", f"sqlite:///{tmp_path / 'empty.db'}")
    assert code == 4
    assert "no kdguard log" in said


def test_the_last_entries_are_shown(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    code, document, _ = run(capsys, "log", "show", *place.both[2:], "--last", "2")
    assert code == 0
    assert [entry["seq"] for entry in document["entries"]] == [4, 5]
    _, document, _ = run(capsys, "log", "show", *place.both[2:], "--model", "m1")
    assert [entry["seq"] for entry in document["entries"]] == [2, 4]


def test_the_log_goes_on_after_a_restore(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """The backup is two entries old: it holds, and the published heads say what it lacks."""
    engine = sa.create_engine(place.database)
    old = log.Head.from_line(place.heads.read_bytes().splitlines()[2])
    with engine.begin() as connection:
        connection.execute(sa.delete(tables.log).where(tables.log.c.seq > 3))
        columns = old.model_dump(include={"seq", "digest", "time", "signature"})
        connection.execute(sa.update(tables.head).values(**columns))
    engine.dispose()
    code, document, _ = run(capsys, "log", "verify", *place.both)
    assert code == 3
    assert any("tail is cut" in problem for problem in document["problems"])
    code, document, _ = run(capsys, "check", *place.both)
    assert code == 3
    code, document, _ = run(capsys, "log", "resume", *place.both, "--reason", "disk lost")
    assert (code, document["entry"]) == (0, 4)
    assert len(Path(document["kept"]).read_bytes().splitlines()) == 5
    assert run(capsys, "log", "verify", *place.both)[0] == 0
    _, document, _ = run(capsys, "log", "show", *place.both[2:], "--last", "1")
    (entry,) = document["entries"]
    assert (entry["action"], entry["actor"]) == ("resume", "operator")
    assert "disk lost" in entry["reasons"]
    assert "entry 5" in entry["reasons"]


def test_a_broken_chain_is_not_resumed(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.sql("UPDATE kdguard_log SET actor = 'bob' WHERE seq = 2")
    before = place.heads.read_bytes()
    code, document, _ = run(capsys, "log", "resume", *place.both, "--reason", "never mind")
    assert (code, document["ok"]) == (3, False)
    assert place.heads.read_bytes() == before


# ── check ───────────────────────────────────────────────────────────────────────────────────────


def test_a_server_would_start(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    code, document, _ = run(capsys, "check", *place.both)
    assert (code, document["ok"]) == (0, True), document
    asked = {finding["what"] for finding in document["findings"]}
    assert {"settings", "policy", "keys", "log key", "roots", "content root", "log"} <= asked
    assert not [finding for finding in document["findings"] if finding["warning"]]
    before = place.heads.read_bytes()
    code, document, _ = run(capsys, "check", "--settings", place.file)
    assert code == 0
    assert [f["what"] for f in document["findings"] if f["warning"]] == ["database"]
    assert place.heads.read_bytes() == before


def _without_keys(place: Place) -> None:
    for record in (place.file.parent / "keys").iterdir():
        record.unlink()


def _lower_version(place: Place) -> None:
    engine = sa.create_engine(place.database)
    with engine.begin() as connection:
        log.seen(connection, 7, "d" * 64, now=NOW, signer=place.signer)
    engine.dispose()


SPOILT = {
    "settings": lambda p: p.file.write_text("version: 1\n"),
    "keys": _without_keys,
    "log key": lambda p: (p.file.parent / "log.pem.pub").write_bytes(
        p.signer.verifier.to_bytes().replace(b'until":null', b'until":"2021-01-01T00:00:00Z"')
    ),
    "content root": lambda p: (p.file.parent / "content").write_text("a file"),
    "published heads": lambda p: (p.heads.unlink(), p.heads.mkdir()),
    "settings' version": _lower_version,
    "log": lambda p: p.sql("UPDATE kdguard_head SET signature = 'AAAA'"),
    "database": lambda p: p.sql("UPDATE kdguard_alembic_version SET version_num = 'kdguard_9'"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_a_server_would_not_start(
    place: Place, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    SPOILT[what](place)
    code, document, said = run(capsys, "check", *place.both)
    assert (code, document["ok"]) == (3, False)
    named = {f["what"] for f in document["findings"] if not f["ok"]}
    assert named - {"log"} == {what} - {"log"}, "the log's end needs the published heads"
    assert named
    assert "would not start" in said


# ── revoke ──────────────────────────────────────────────────────────────────────────────────────


def test_revoking_changes_both_files_and_nothing_else(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    before = place.file.read_bytes()
    loaded = server_settings.Settings.load(place.file)
    bea = place.file.parent / "keys" / "bea.pub"
    code, document, _ = run(
        capsys, "revoke", "a" * 64, bea, "--since", "2026-01-01T00:00:00Z", "--settings", place.file
    )
    assert (code, document["version"]) == (0, loaded.version + 1)
    now = server_settings.Settings.load(place.file)
    assert now.version == loaded.version + 1
    line = b"version: %d\n"
    assert place.file.read_bytes() == before.replace(line % loaded.version, line % now.version)
    listed = (place.file.parent / "revoked.yaml").read_text()
    assert listed.startswith("# who, and why\n# 2026\n")
    assert yaml.safe_load(listed)["certificates"] == ["a" * 64]
    assert yaml.safe_load(listed)["keys"] == document["revoked"]["keys"]
    assert list(document["revoked"]["keys"].values()) == ["2026-01-01T00:00:00Z"]


def test_what_is_revoked_stays_revoked(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    bea = server_settings.Settings.load(place.file).verifiers[0].key_id
    times = ("2026-02-01T00:00:00Z", "2026-03-01T00:00:00Z", "2026-01-01T00:00:00Z")
    found = []
    for digest, time in zip(("a" * 64, "b" * 64, "a" * 64), times, strict=True):
        _, document, _ = run(
            capsys, "revoke", digest, bea, "--since", time, "--settings", place.file
        )
        found.append(document["revoked"])
    assert [listed["keys"][bea] for listed in found] == [times[0], times[0], times[2]]
    assert found[-1]["certificates"] == ["a" * 64, "b" * 64]


def test_what_cannot_be_revoked_changes_nothing(
    place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "junk").write_text("junk")
    state = {p: p.read_bytes() for p in place.file.parent.glob("*.yaml")}
    for target in ("nowhere", tmp_path / "junk", "A" * 64):
        assert run(capsys, "revoke", target, "--settings", place.file)[0] == 2
    text = place.file.read_text()
    place.file.write_text(text.replace("revoked: revoked.yaml\n", ""))
    code, _, said = run(capsys, "revoke", "a" * 64, "--settings", place.file)
    assert code == 2
    assert "names no list" in said
    place.file.write_text(text)
    assert {p: p.read_bytes() for p in place.file.parent.glob("*.yaml")} == state


# ── override ────────────────────────────────────────────────────────────────────────────────────


def test_two_owners_sign_an_override(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("ann", "bob"):
        keygen(tmp_path / name, owner=name, role="builder")
    model, out = tmp_path / "model.onnx", tmp_path / "override.json"
    model.write_bytes(b"the student")
    about = ("--model", "m", "--version", "3", "--alias", "champion", "--registry", "http://r")
    rest = ("--files", model, "--reason", "down", "--key", tmp_path / "ann", "--out", out)
    assert run(capsys, "override", "sign", *about, *rest)[0] == 2, "no end was named"
    assert run(capsys, "override", "sign", *about, *rest, "--hours", "169")[0] == 2
    code, document, _ = run(capsys, "override", "sign", *about, *rest, "--hours", "12")
    assert code == 0
    assert parse_time(document["until"]) - parse_time(document["issued"]) == timedelta(hours=12)
    keys = ("--key", tmp_path / "ann.pub", "--key", tmp_path / "bob.pub")
    assert run(capsys, "override", "show", out)[0] == 0
    assert run(capsys, "override", "show", out, *keys)[0] == 8
    second = ("override", "cosign", out, "--key", tmp_path / "bob", "--yes", "--files")
    (tmp_path / "other.onnx").write_bytes(b"another")
    assert run(capsys, *second, tmp_path / "other.onnx")[0] == 8
    assert run(capsys, *second, model)[0] == 0
    assert run(capsys, *second, model)[0] == 8, "an owner signs once"
    code, document, _ = run(capsys, "override", "show", out, *keys)
    assert (code, document["owners"]) == (0, ["ann", "bob"])
    assert overrides.read(out.read_bytes()).alias == "champion"
