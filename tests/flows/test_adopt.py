"""`kdguard adopt` takes stock of a registry as it is, changes nothing, and drafts settings."""

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersionTag
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore

from flows.promoted import champion, local, opened, signer, stored
from flows.servers import MlflowServer, serving
from mlflow_kdguard.attest import signing
from mlflow_kdguard.plugin.server.settings import Settings
from mlflow_kdguard_cli.main import answer

BY = signer()
MANY = 1000


def adopted(capsys: pytest.CaptureFixture[str], uri: str, *options: str) -> dict[str, Any]:
    capsys.readouterr()
    code = answer(["adopt", "--json", "--tracking-uri", uri, *options])
    out = capsys.readouterr()
    assert code == 0, out.err
    document: dict[str, Any] = json.loads(out.out)
    return document


def dumped(database: Path) -> list[str]:
    """Everything in a SQLite database, as statements.

    Less what MLflow's own client writes in the background after a prompt was registered.
    """
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return [line for line in connection.iterdump() if "_mlflow_experiment_ids" not in line]


def written(folder: Path, files: Mapping[str, bytes]) -> str:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


def loadable(draft: Path) -> Settings:
    """The draft as a server reads it, once the operator has made the keys that it names."""
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    signing.keygen(draft.parent / "log.pem", owner="Server", role="builder", now=long_ago)
    vic = signing.keygen(draft.parent / "private", owner="Vic", role="verifier", now=long_ago)
    (draft.parent / "keys").mkdir()
    (draft.parent / "keys" / "vic.pub").write_bytes(vic.verifier.to_bytes())
    return Settings.load(draft)


@dataclass(frozen=True)
class Sorts:
    """A registry that holds models of every sort, and where some of them come from."""

    uri: str
    sources: dict[str, str]


def all_sorts(folder: Path) -> Sorts:
    uri = local(folder)
    registry, client = opened(uri), MlflowClient(uri)
    champion(registry, "student", BY)
    registry.promote(stored(registry, "plain", seed=2), "production")
    run = client.create_run("0").info.run_id
    pickled = written(
        folder / "mlruns" / "0" / run / "artifacts" / "model",
        {"MLmodel": b"flavors: {}", "python_model.pkl": b"\x80\x04.", "code/evil.py": b"1/0"},
    )
    foreign = written(folder / "elsewhere", {"net.onnx": b"x", "tokenizer/vocab.txt": b"x"})
    sources = {
        "pickled": pickled,
        "foreign": foreign,
        "empty": str(folder / "nowhere"),
        "chained": "models:/pickled/1",
        "web": "http://127.0.0.1:9/models/x",
        "other-server": "mlflow-artifacts://127.0.0.1:9/1/x/artifacts/model",
    }
    for name, source in sources.items():
        client.create_registered_model(name)
        client.create_model_version(name, source)
        client.set_registered_model_alias(name, "champion", "1")
    client.set_registered_model_alias("pickled", "Champion", "1")
    client.set_registered_model_alias("pickled", "shadow", "1")
    with pytest.warns(FutureWarning):
        client.transition_model_version_stage("plain", "1", "Production")
    client.register_prompt("greeting", "hello {{name}}")
    return Sorts(uri, sources)


def test_a_registry_of_all_sorts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sorts = all_sorts(tmp_path)
    uri, sources = sorts.uri, sorts.sources
    pickled, foreign = sources["pickled"], sources["foreign"]
    before = dumped(tmp_path / "mlflow.db")

    found = adopted(capsys, uri, "--out", str(tmp_path / "gate" / "server.yaml"))

    assert dumped(tmp_path / "mlflow.db") == before
    assert found["schema"] == "kdguard.adopt/1"
    assert found["models"] == 8
    by_name = {version["model"]: version for version in found["versions"]}
    assert set(by_name) == {"student", "plain", *sources}
    assert {name: v["verdict"] for name, v in by_name.items()} == {
        "student": "certified",
        "plain": "certifiable",
        "pickled": "not-onnx",
        "foreign": "other-bundle",
        "empty": "unreadable",
        "chained": "not-onnx",
        "web": "unreadable",
        "other-server": "unreadable",
    }
    assert by_name["student"]["certificate"]
    assert by_name["plain"]["guarded"] == ["@production", "Production"]
    assert by_name["pickled"]["guarded"] == ["@Champion", "@champion"]
    assert by_name["pickled"]["names"] == ["@shadow"]
    assert by_name["pickled"]["formats"] == ["code", "pickle"]
    assert by_name["foreign"]["formats"] == ["onnx"]
    assert by_name["chained"]["location"] == pickled
    assert all(version["next"] for version in by_name.values())
    assert any("pickled@Champion is another spelling" in line for line in found["attention"])
    proposed = {root["uri"]: root["versions"] for root in found["roots"] if root["proposed"]}
    assert proposed == {
        f"file:{tmp_path}/mlartifacts": 2,
        f"file:{tmp_path}/mlruns": 2,
    }
    strange = {root["uri"] for root in found["roots"] if not root["proposed"]}
    assert {foreign, sources["web"]} <= strange

    draft = tmp_path / "gate" / "server.yaml"
    assert draft.read_text() == found["settings"]
    settings = loadable(draft)
    assert (settings.version, settings.enforcing) == (1, False)
    assert settings.stated.registry == [uri]
    assert sorted(settings.stated.allow) == sorted(proposed)
    assert answer(["adopt", "--tracking-uri", uri, "--out", str(draft)]) == 2


def test_a_registry_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    assert answer(["adopt", "--tracking-uri", local(tmp_path)]) == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_thousand_versions_within_a_minute(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(tmp_path) as server:
        filled(server.folder)
        start, worked = time.monotonic(), computed(server)
        found = adopted(capsys, server.uri)
        seconds, work = time.monotonic() - start, computed(server) - worked
    with capsys.disabled():
        print(f"\nadopted {MANY} versions in {seconds:.1f} s, {work:.1f} s of them computing")
    assert len(found["versions"]) == MANY
    verdicts = [version["verdict"] for version in found["versions"]]
    assert verdicts.count("certifiable") == MANY // 2
    assert verdicts.count("not-onnx") == MANY // 2
    assert sum(bool(version["guarded"]) for version in found["versions"]) == 100
    assert found["roots"] == [{"uri": "mlflow-artifacts:/", "versions": MANY, "proposed": True}]
    assert min(seconds, work) < 60  # a busy machine makes us wait, and takes no more work


def computed(server: MlflowServer) -> float:
    """CPU seconds of this process and of all of the server's together."""
    total = time.process_time()
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            after_name = file.read_text().rpartition(")")[2].split()
            if int(after_name[3]) == server.process.pid:  # its session
                total += sum(map(int, after_name[11:13])) / os.sysconf("SC_CLK_TCK")
    return total


def filled(folder: Path) -> None:
    """100 models of ten versions each, through MLflow's own store, with their files in place."""
    store = SqlAlchemyStore(f"sqlite:///{folder / 'mlflow.db'}")  # type: ignore[no-untyped-call]
    kinds = ({"MLmodel": b"x", "model.onnx": b"x"}, {"MLmodel": b"x", "model.pkl": b"x"})
    for number in range(MANY // 10):
        name = f"model-{number:03}"
        store.create_registered_model(name)
        for version in range(1, 11):
            run = f"{number * 10 + version:032x}"
            written(folder / "artifacts" / "0" / run / "artifacts" / "model", kinds[version % 2])
            source = f"mlflow-artifacts:/0/{run}/artifacts/model"
            store.create_model_version(name, source, tags=[ModelVersionTag("n", str(version))])
        store.set_registered_model_alias(name, "champion", "5")
    store.engine.dispose()
