"""`kdguard sweep` names every guarded name that is not what was certified, and no other."""

import json
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

import toys
from flows.gates import Gate, gated
from flows.operators import toy_bundle
from flows.promoted import certify, champion, folder_of, local, now, opened, signer, stored
from flows.servers import serving
from flows.test_adopt import adopted
from mlflow_kdguard import load_verified
from mlflow_kdguard.files import sha256
from mlflow_kdguard.records import format_time
from mlflow_kdguard.registry import Registry
from mlflow_kdguard_cli.main import answer

BY = signer()
IN_A_WEEK, GONE = (format_time(now() + timedelta(hours=hours)) for hours in (168, -1))


class Swept:
    """One run of the command: its exit code and document, and the findings by name."""

    def __init__(self, code: int, document: dict[str, Any]) -> None:
        self.code, self.document = code, document
        self.findings = Counter(
            (f["model"], f["name"], f["version"], f["kind"]) for f in document["findings"]
        )

    def of(self, model: str) -> list[tuple[str, str, str]]:
        return sorted(key[1:] for key in self.findings if key[0] == model)


def swept(capsys: pytest.CaptureFixture[str], *options: str) -> Swept:
    capsys.readouterr()
    code = answer(["sweep", "--json", *options])
    out = capsys.readouterr()
    assert code in (0, 3), out.err
    return Swept(code, json.loads(out.out))


# ── A plain registry, with keys named by hand ───────────────────────────────────────────────────


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def registry(folder: Path) -> Registry:
    (folder / "vic.pub").write_bytes(BY.verifier.to_bytes())
    return opened(local(folder))


@pytest.fixture
def by_hand(folder: Path) -> list[str]:
    return ["--tracking-uri", local(folder), "--key", str(folder / "vic.pub")]


def test_a_registry_where_all_is_well_is_clean(
    registry: Registry, by_hand: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    uri = champion(registry, "well", BY, seed=3)
    stored(registry, "unpromoted")
    registry.promote(stored(registry, "free", seed=1), "candidate")
    found = swept(capsys, *by_hand)
    assert (found.code, found.document["clean"], found.document["findings"]) == (0, True, [])
    (holding,) = found.document["holdings"]
    assert holding["model_sha256"] == sha256(toys.onnx_tiny(seed=3))
    assert (holding["model"], holding["name"], holding["version"]) == ("well", "champion", "1")
    assert holding["signers"] == ["Vic (verifier)"]
    assert found.document["models"] == 3
    assert found.document["log"] is None
    assert uri.endswith("/1")


def test_each_fault_is_named_and_nothing_else(
    registry: Registry, by_hand: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = MlflowClient(local(folder))
    registry.promote(stored(registry, "bare"), "champion")
    champion(registry, "soon", BY, expires=IN_A_WEEK)
    champion(registry, "late", BY, expires=GONE)
    champion(registry, "stranger", signer("Stan"))
    other = champion(registry, "drifted", BY, seed=1)
    (folder_of(registry, other) / "model.onnx").write_bytes(toys.onnx_tiny(seed=2))
    more = champion(registry, "more", BY)
    (folder_of(registry, more) / "evil.py").write_bytes(b"")
    gone = champion(registry, "gone", BY)
    shutil.rmtree(folder_of(registry, gone))
    alike = champion(registry, "alike", BY)
    certify(registry, alike, BY)
    for alias in ("Champion", "PRODUCTION"):
        client.set_registered_model_alias("alike", alias, "1")
    staged = stored(registry, "staged")
    with pytest.warns(FutureWarning):
        client.transition_model_version_stage("staged", "1", "Production")
    hidden = stored(registry, "hidden")
    registry.promote(hidden, "production")
    client.set_model_version_tag("hidden", "1", "mlflow.prompt.is_prompt", "true")
    client.set_registered_model_tag("hidden", "mlflow.prompt.is_prompt", "true")
    client.register_prompt("greeting", "hello {{name}}")
    client.set_prompt_alias("greeting", "champion", 1)

    found = swept(capsys, *by_hand)
    assert found.code == 3
    assert found.of("well") == found.of("free") == found.of("unpromoted") == []
    assert found.of("bare") == [("champion", "1", "uncertified")]
    assert found.of("soon") == [("champion", "1", "expiring")]
    assert found.of("late") == [("champion", "1", "expired")]
    assert found.of("stranger") == [("champion", "1", "untrusted")]
    assert found.of("drifted") == [("champion", "1", "drifted"), ("champion", "1", "shape")]
    assert found.of("more") == [("champion", "1", "drifted"), ("champion", "1", "shape")]
    assert found.of("gone") == [("champion", "1", "unreadable")]
    assert found.of("alike") == [("Champion", "1", "look-alike"), ("PRODUCTION", "1", "look-alike")]
    assert found.of("staged") == [("Production", "1", "uncertified")]
    assert found.of("hidden") == [("production", "1", "hidden")]
    assert found.of("greeting") == []
    assert staged
    assert swept(capsys, *by_hand, "--within", "3").of("soon") == []


def test_what_was_revoked_since_is_named(
    registry: Registry, by_hand: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "revoked.yaml").write_text(f"keys: {{{BY.key_id}: 2026-01-01T00:00:00Z}}\n")
    found = swept(capsys, *by_hand, "--revoked", str(folder / "revoked.yaml"))
    assert ("champion", "1", "revoked") in found.of("well")


def test_todays_policy_is_asked_where_one_is_named(
    registry: Registry, by_hand: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "policy.yaml").write_text("certificate: {signers_at_least: 2}\n")
    found = swept(capsys, *by_hand, "--policy", str(folder / "policy.yaml"))
    whys = [f["why"] for f in found.document["findings"] if f["model"] == "well"]
    assert any(why.startswith("certificate.signers: signed by 1") for why in whys), whys


def test_what_cannot_be_asked_is_an_error_and_not_clean(
    folder: Path, by_hand: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KDGUARD_KEYS", raising=False)
    assert answer(["sweep", *by_hand[:2]]) == 2
    assert answer(["sweep", "--tracking-uri", f"sqlite:///{folder}/none.db", *by_hand[2:]]) == 4
    assert not (folder / "none.db").exists()
    assert answer(["sweep", *by_hand, "--log-uri", local(folder)]) == 4  # it has no log
    assert answer(["sweep", *by_hand, "--log-head", "x"]) == 2
    assert answer(["sweep", *by_hand, "--policy", ""]) == 2
    assert answer(["sweep", *by_hand, "--server-settings", "x"]) == 2


# ── A gated server and its log ──────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    with gated(tmp_path_factory.mktemp("gated"), app=True) as found:
        yield found


@pytest.fixture
def by_settings(gate: Gate) -> list[str]:
    return ["--tracking-uri", gate.uri, "--server-settings", str(gate.operator.settings),
            "--log-uri", gate.database]  # fmt: skip


def sql(gate: Gate, *statements: str) -> None:
    """What whoever may write to the database can do."""
    with sqlite3.connect(gate.database.removeprefix("sqlite:///"), timeout=30) as database:
        for statement in statements:
            database.execute(statement)
    database.close()


@pytest.mark.slow
def test_names_that_were_moved_past_the_gate(
    gate: Gate, by_settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("kept", "moved", "dropped", "added", "renewed"):
        gate.promote(name, gate.certified(name)) if name != "added" else gate.certified(name)
    gate.promote("renewed", gate.certified("renewed"))
    taken = gate.certified("taken")
    gate.promote("taken", taken)
    gate.client.delete_registered_model_alias("taken", "champion")
    gate.certified("moved")
    clean = swept(capsys, *by_settings)
    assert clean.findings == {}
    assert clean.code == 0
    assert clean.document["log"]["verified"]
    given = {h["model"]: h["given"]["version"] for h in clean.document["holdings"]}
    assert given == {"kept": "1", "moved": "1", "dropped": "1", "renewed": "2"}

    table = "registered_model_aliases"
    sql(
        gate,
        f"UPDATE {table} SET version = 2 WHERE name = 'moved'",
        f"DELETE FROM {table} WHERE name = 'dropped'",
        f"INSERT INTO {table} (workspace, name, alias, version) "
        "VALUES ('default', 'added', 'champion', 1)",
        f"INSERT INTO {table} (workspace, name, alias, version) "
        "VALUES ('default', 'kept', 'production', 7)",
    )
    found = swept(capsys, *by_settings)
    assert found.code == 3
    assert found.of("moved") == [("champion", "2", "moved")]
    assert found.of("dropped") == [("champion", "", "moved")]
    assert found.of("added") == [("champion", "1", "moved")]
    assert found.of("kept") == [("production", "7", "missing"), ("production", "7", "moved")]
    assert found.of("renewed") == found.of("taken") == []


@pytest.mark.slow
def test_the_servers_own_log_is_read_where_no_database_is_named(
    gate: Gate, by_settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, shown = swept(capsys, *by_settings), swept(capsys, *by_settings[:-2])
    assert shown.findings == whole.findings
    assert shown.document["log"]["entries"] == whole.document["log"]["entries"]
    assert (whole.document["log"]["verified"], shown.document["log"]["verified"]) == (True, False)


@pytest.mark.slow
def test_audit_mode_blocks_nothing_and_the_sweep_says_what_it_would_have(
    gate: Gate, by_settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    version, _ = gate.registered("audited", toy_bundle())
    gate.operator.write(mode="audit")
    try:
        gate.promote("audited", version)
    finally:
        gate.operator.write(mode="enforce")
    found = swept(capsys, *by_settings)
    assert found.of("audited") == [("champion", version, "uncertified")]
    (entry,) = found.document["would_refuse"]
    assert (entry["model"], entry["alias"], entry["version"]) == ("audited", "champion", version)
    assert any("certificate" in reason for reason in entry["reasons"])


@pytest.mark.slow
def test_a_log_whose_tail_was_cut_is_named(
    gate: Gate, by_settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = swept(capsys, *by_settings).document["log"]
    sql(gate, "DELETE FROM kdguard_log WHERE seq = (SELECT max(seq) FROM kdguard_log)")
    found = swept(capsys, *by_settings)
    assert before["problems"] == []
    assert found.document["log"]["problems"]
    assert ("", "", "", "log") in found.findings
    assert found.code == 3


@pytest.mark.slow
def test_every_workspace_is_swept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vic.pub").write_bytes(BY.verifier.to_bytes())
    with serving(tmp_path / "server", options=["--enable-workspaces"]) as server:
        MlflowClient(server.uri).create_workspace("team")
        for workspace, mark in (("default", ""), ("team", "#workspace=team")):
            monkeypatch.setenv("MLFLOW_WORKSPACE", workspace)
            registry = opened(server.uri)
            champion(registry, "m", BY, registry=registry.identity + mark)
        registry.promote(stored(registry, "bare"), "champion")
        model = load_verified("models:/m@champion", keys=BY.verifier, tracking_uri=server.uri)
        assert model.certificate.registry.endswith("#workspace=team")
        monkeypatch.delenv("MLFLOW_WORKSPACE")
        options = ["--tracking-uri", server.uri, "--key", str(tmp_path / "vic.pub")]
        found = swept(capsys, *options)
        stock = adopted(capsys, server.uri)
    assert found.document["workspaces"] == ["default", "team"]
    assert [h["workspace"] for h in found.document["holdings"]] == ["default", "team", "team"]
    assert dict(found.findings) == {("bare", "champion", "1", "uncertified"): 1}
    assert [v["workspace"] for v in stock["versions"]] == ["default", "team", "team"]


PROGRAM = """
import sys
from mlflow_kdguard_cli.main import answer
code = answer(sys.argv[1:])
assert "torch" not in sys.modules, "torch"
sys.exit(code)
"""


def test_no_torch_is_needed(by_hand: list[str], registry: Registry) -> None:
    command = [sys.executable, "-c", PROGRAM, "sweep", *by_hand]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
