"""A server's settings: read strictly, anew for every change, and never by default."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlflow_kdguard.attest import signing
from mlflow_kdguard.errors import ConfigError, KDGuardError
from mlflow_kdguard.files import canonical_json
from mlflow_kdguard.plugin.server.settings import VARIABLE, Settings, named
from mlflow_kdguard.policy import load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, role in (("bea", "builder"), ("vic", "verifier")):
        signing.keygen(tmp_path / "keys" / name, owner=name, role=role)  # type: ignore[arg-type]
        (tmp_path / "keys" / name).unlink()
    signing.keygen(tmp_path / "log.pem", owner="server", role="builder")
    _write(tmp_path)
    return tmp_path


def _stated(**changes: Any) -> dict[str, Any]:
    values = {
        "version": 3,
        "registry": ["http://127.0.0.1:5000/"],
        "keys": "keys",
        "allow": ["mlflow-artifacts:/", "s3://bucket/prefix"],
        "content": {"root": "file:///srv/content"},
        "log": {"key": "log.pem", "head": "heads.jsonl"},
    } | changes
    return {key: value for key, value in values.items() if value is not None}


def _write(folder: Path, **changes: Any) -> Path:
    path = folder / "server.yaml"
    path.write_text(yaml.safe_dump(_stated(**changes)))
    return path


def test_settings_as_they_are_written(folder: Path) -> None:
    settings = Settings.load(folder / "server.yaml")
    assert settings.version == 3
    assert settings.enforcing
    assert settings.policy == load() == settings.policy_for("anything")
    assert {v.record.owner for v in settings.verifiers} == {"bea", "vic"}
    assert settings.head == folder / "heads.jsonl"
    assert [str(p) for p in settings.allowed] == [
        "mlflow-artifacts:/", "s3://bucket/prefix", "file:/srv/content", "file:/srv/content",
    ]  # fmt: skip
    assert settings.identities("default") == ("http://127.0.0.1:5000",)
    assert settings.identities("team a") == ("http://127.0.0.1:5000#workspace=team%20a",)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": None}, {"version": 0}, {"version": True}, {"version": "3"},
        {"registry": []}, {"registry": ["http://user:secret@host"]}, {"registry": ["host"]},
        {"registry": ["http://host?x=1"]}, {"mode": "off"}, {"mode": False},
        {"policy": "absent.yaml"}, {"keys": "absent"}, {"keys": None}, {"revoked": "absent.yaml"},
        {"allow": []}, {"allow": ["relative"]}, {"allow": ["models:/x/1"]},
        {"allow": ["file:///a/../b"]}, {"content": {"root": "mlflow-artifacts:/x"}},
        {"content": {}}, {"content": {"root": "content"}}, {"log": {"key": "log.pem"}},
        {"log": {"key": "keys/bea.pub", "head": "h"}}, {"rollback_days": -1},
        {"rollback_days": True}, {"rollback_days": float("inf")}, {"nonces": "maybe"},
        {"overrides": "yes"}, {"unknown": 1}, {"models": {"m": "absent.yaml"}},
    ],
)  # fmt: skip
def test_what_is_missing_or_odd_is_an_error_that_says_where(
    folder: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(KDGuardError) as caught:
        Settings.load(_write(folder, **changes))
    said = str(caught.value)
    assert next(iter(changes)) in said or "absent" in said or "log.pem" in said or "bea" in said


def test_settings_have_one_reading(folder: Path) -> None:
    path = folder / "server.yaml"
    path.write_text(path.read_text() + "version: 9\n")
    with pytest.raises(ConfigError, match="twice"):
        Settings.load(path)


def test_every_byte_that_decides_is_in_the_digest(folder: Path) -> None:
    (folder / "policy.yaml").write_text("{}\n")
    (folder / "model.yaml").write_text("{}\n")
    (folder / "revoked.yaml").write_text("{}\n")
    path = _write(folder, policy="policy.yaml", models={"m": "model.yaml"}, revoked="revoked.yaml")
    settings = Settings.load(path)
    assert settings.current() is settings
    seen = {settings.digest}
    changes = {
        "policy.yaml": "{export: null}\n", "model.yaml": "{accuracy: {drop_upper_at_most: 0}}\n",
        "revoked.yaml": "{certificates: []}\n", "server.yaml": path.read_text() + "# a word\n",
    }  # fmt: skip
    for name, text in changes.items():
        (folder / name).write_text(text)
        changed = settings.current()
        assert changed is not settings
        seen.add(changed.digest)
        settings = changed
    (folder / "keys" / "vic.pub").rename(folder / "keys" / "victor.pub")
    seen.add(settings.current().digest)
    (folder / "keys" / "victor.pub").unlink()
    seen.add(settings.current().digest)
    assert len(seen) == 7


def test_a_change_that_keeps_size_and_time_is_seen(folder: Path) -> None:
    import os

    path = _write(folder, mode="audit")
    settings = Settings.load(path)
    before = path.stat()
    path.write_text(path.read_text().replace("version: 3", "version: 4"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert settings.current().version == 4


def test_every_file_that_was_read_is_looked_at(folder: Path) -> None:
    (folder / "model.yaml").write_text("policy: {asr: {upper_at_most: 0.01}}\n")
    (folder / "floor.yaml").write_text("policy: {}\n")
    (folder / "revoked.yaml").write_text("{certificates: []}\n")
    named_ = {"models": {"m": "model.yaml"}, "policy": "floor.yaml", "revoked": "revoked.yaml"}
    settings = Settings.load(_write(folder, **named_))
    assert settings.current() is settings
    assert settings.places.keys() == settings.sources.keys()
    assert len(settings.places) == 7
    for place in map(Path, settings.places.values()):
        kept = place.read_bytes()
        for other in (kept + b"\n", kept[:-1]):
            place.write_bytes(other)
            assert settings.current() is not settings, place
        place.write_bytes(kept)
    assert settings.current() is settings


def test_what_can_no_longer_be_read_is_an_error_not_the_last_answer(folder: Path) -> None:
    settings = Settings.load(folder / "server.yaml")
    (folder / "keys" / "vic.pub").write_text("{}")
    with pytest.raises(KDGuardError, match=r"vic\.pub"):
        settings.current()
    (folder / "server.yaml").unlink()
    with pytest.raises(KDGuardError, match=r"server\.yaml"):
        settings.current()


def test_a_models_policy_tightens_and_its_name_is_the_one_people_read(folder: Path) -> None:
    (folder / "model.yaml").write_text("policy: {asr: {upper_at_most: 0.01}, accuracy: null}\n")
    settings = Settings.load(_write(folder, models={"Digits": "model.yaml"}))
    floor, own = settings.policy, settings.policy_for("digits")
    assert own == settings.policy_for("DIGITS") != floor
    assert own.asr is not None
    assert own.asr.upper_at_most == 0.01
    assert own.accuracy == floor.accuracy  # a waiver loosens nothing
    with pytest.raises(ConfigError, match="twice"):
        Settings.load(_write(folder, models={"Digits": "model.yaml", "digits": "model.yaml"}))


def test_revocations_reach_the_keys(folder: Path) -> None:
    key = Settings.load(folder / "server.yaml").verifiers[0].key_id
    (folder / "revoked.yaml").write_text(json.dumps({"keys": {key: "2024-05-01T00:00:00Z"}}))
    found = {v.key_id: v for v in Settings.load(_write(folder, revoked="revoked.yaml")).verifiers}
    assert found[key].record.compromised == "2024-05-01T00:00:00Z"


def test_a_record_that_says_earlier_is_believed(folder: Path) -> None:
    path = folder / "keys" / "vic.pub"
    record = json.loads(path.read_text()) | {"compromised": "2020-01-01T00:00:00Z"}
    path.write_bytes(canonical_json(record) + b"\n")
    later = {"keys": {record["key"]: "2024-05-01T00:00:00Z"}}
    (folder / "revoked.yaml").write_text(json.dumps(later))
    found = {v.key_id: v for v in Settings.load(_write(folder, revoked="revoked.yaml")).verifiers}
    assert found[record["key"]].record.compromised == "2020-01-01T00:00:00Z"


def test_two_records_of_one_key_that_differ_are_an_error(folder: Path) -> None:
    record = json.loads((folder / "keys" / "vic.pub").read_text()) | {"role": "builder"}
    (folder / "keys" / "again.pub").write_bytes(canonical_json(record) + b"\n")
    with pytest.raises(KDGuardError, match="disagree"):
        Settings.load(folder / "server.yaml")


def test_the_variable_names_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=VARIABLE):
        named()
    monkeypatch.setenv(VARIABLE, "server.yaml")
    assert named() == Path.cwd() / "server.yaml"
