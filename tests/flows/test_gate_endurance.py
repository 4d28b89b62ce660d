"""A gated server that is raced, killed, crowded and left without its database.

Slow: minutes each. `KDGUARD_RACES` (1000), `KDGUARD_KILLS` (20) and `KDGUARD_CROWD` (60 seconds)
make them shorter or longer.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import onnxruntime as ort
import pytest
import requests
import sqlalchemy
import yaml

import toys
from flows.attacks.crowd import Mix, Tally, crowd
from flows.attacks.database import killable
from flows.attacks.opened import gated
from flows.attacks.settled import IDENTITY
from flows.attacks.world import Version, World, files
from flows.servers import free_port
from flows.test_attack_gate import new_database
from mlflow_kdguard import load_verified
from mlflow_kdguard.attest.signing import Verifier
from mlflow_kdguard.files import sha256
from mlflow_kdguard.plugin import log

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

RACES = int(os.environ.get("KDGUARD_RACES", "1000"))
KILLS = int(os.environ.get("KDGUARD_KILLS", "20"))
CROWD = float(os.environ.get("KDGUARD_CROWD", "60"))


def sqlite(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def log_holds(w: World) -> log.LogReport:
    """The log's own check, with the published heads."""
    stated = yaml.safe_load(w.settings.read_text())["log"]
    own = Verifier.load(w.settings.parent / f"{stated['key']}.pub")
    with w.engine.connect() as connection:
        return log.verify(connection, verifiers=(own,), heads=Path(stated["head"]))


# ── Swapping bytes while they are promoted ──────────────────────────────────────────────────────


def test_whatever_is_swapped_what_is_served_is_what_was_certified(tmp_path: Path) -> None:
    with gated(tmp_path / "w", sqlite(tmp_path)) as w:
        name, passed = w.name(), 0
        base = w.version(name)
        mlflow.set_tracking_uri(w.server.uri)
        for round_ in range(RACES):
            version = fresh(w, base)
            answer = raced(w, version)
            assert answer.status_code in (200, 403), answer.text
            passed += answer.ok
            holder = w.held(name)
            if holder is not None:
                assert_unchanged(w, name, holder, loaded=round_ % 10 == 0)
            else:
                assert not answer.ok
        assert passed, "no promotion won its race: nothing was tried"
        assert log_holds(w).ok


def fresh(w: World, base: Version) -> Version:
    """A certified version of bytes that were never promoted before: the copy is raced, too."""
    body = yaml.safe_load(base.files["MLmodel"]) | {"model_uuid": uuid.uuid4().hex}
    content = {**base.files, "MLmodel": yaml.safe_dump(body).encode()}
    place = f"{base.source.rpartition('/')[0]}/{uuid.uuid4().hex}"
    folder = w.on_disk(place)
    folder.mkdir(parents=True)
    for path, data in content.items():
        (folder / path).write_bytes(data)
    version = Version(base.name, "", base.run_id, content, folder, place)
    made = w.created(
        base.name, place, base.run_id, {"kdguard.certificate": w.certificate(version).decode()}
    )
    assert made.ok, made.text
    number = str(made.json()["model_version"]["version"])
    return Version(base.name, number, base.run_id, content, folder, place)


def raced(w: World, version: Version) -> requests.Response:
    """Promote while somebody replaces the file back and forth, and leaves another there."""
    path, honest = version.folder / "model.onnx", version.files["model.onnx"]
    evil = toys.onnx_tiny(shape=(1, 8, 8), classes=10, seed=66)
    assert len(evil) == len(honest)
    stop = threading.Event()

    def swap() -> None:
        dice = random.Random(version.number)
        while not stop.is_set():
            path.write_bytes(evil)
            time.sleep(dice.random() * 0.01)
            path.write_bytes(honest)
            time.sleep(dice.random() * 0.03)
        path.write_bytes(evil)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        return w.alias(version)
    finally:
        stop.set()
        thread.join()


def assert_unchanged(w: World, name: str, number: str, *, loaded: bool) -> None:
    """What consumers of the alias get are the certified bytes, for plain MLflow, too."""
    certified = sha256(files()["model.onnx"])
    served = w.on_disk(w.location(Version(name, number, "", {}, Path(), "")))
    assert sha256((served / "model.onnx").read_bytes()) == certified
    if not loaded:
        return
    uri = f"models:/{name}@champion"
    verified = load_verified(
        uri, keys=w.keys["verifier"].verifier, registry=IDENTITY, tracking_uri=w.server.uri
    )
    assert verified.sha256 == certified
    plain = mlflow.pyfunc.load_model(uri)
    x = toys.images(3, (1, 8, 8))
    session = ort.InferenceSession(files()["model.onnx"], providers=["CPUExecutionProvider"])
    assert (plain.predict(x)["logits"] == session.run(None, {"x": x})[0]).all()


# ── kill -9 ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def killed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[World, Any]]:
    if request.param == "sqlite":
        with gated(tmp_path / "w", sqlite(tmp_path)) as w:
            yield w, None
    else:
        with (
            killable(tmp_path / "pg") as database,
            gated(tmp_path / "w", new_database(database.uri, "killed")) as w,
        ):
            yield w, database


def test_registry_alias_and_log_agree_after_every_kill(killed: tuple[World, Any]) -> None:
    w, database = killed
    mix, dice = Mix.of(w, models=3), random.Random(7)
    for round_ in range(KILLS // 2):
        answered: list[tuple[str, str]] = []
        stop = threading.Event()
        threads = [
            threading.Thread(target=_promoting, args=(w, mix, n, stop, answered)) for n in range(6)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.5 + dice.random() * 2)
        kill_database = database is not None and round_ % 2 == 0
        if kill_database:
            database.kill()
        else:
            os.killpg(w.server.process.pid, signal.SIGKILL)
        stop.set()
        for thread in threads:
            thread.join()
        if kill_database:
            database.start()
        else:
            w.restart()
        agree(w, mix, answered)


def _promoting(
    w: World, mix: Mix, number: int, stop: threading.Event, answered: list[tuple[str, str]]
) -> None:
    with requests.Session() as http:
        turn = number
        while not stop.is_set():
            version = mix.good[turn % len(mix.good)]
            turn += 1
            with contextlib.suppress(requests.RequestException):
                body = {"name": version.name, "alias": "champion", "version": version.number}
                url = f"{w.server.uri}/api/2.0/mlflow/registered-models/alias"
                if http.post(url, json=body, timeout=10).ok:
                    answered.append((version.name, version.number))


def agree(w: World, mix: Mix, answered: list[tuple[str, str]]) -> None:
    """The chain holds, every answered promotion is in it, and aliases are what it says last."""
    w.engine.dispose()
    report = log_holds(w)
    assert report.ok, report.problems
    records = w.log()
    assert [r["seq"] for r in records] == list(range(records[0]["seq"], records[-1]["seq"] + 1))
    passed = [(r["model"], str(r["version"])) for r in records if r["action"] == "promote"]
    for promotion in set(answered):
        assert answered.count(promotion) <= passed.count(promotion), promotion
    for model in {version.name for version in mix.good}:
        last = [number for name, number in passed if name == model]
        assert w.held(model) == (last[-1] if last else None)
        if last:
            version = next(v for v in mix.good if (v.name, v.number) == (model, last[-1]))
            assert w.bytes_of(version)["model.onnx"] == sha256(version.files["model.onnx"])


def test_a_tail_that_is_cut_shows(tmp_path: Path) -> None:
    with gated(tmp_path / "w", sqlite(tmp_path)) as w:
        for seed in (0, 1):
            w.champion(seed=seed)
        assert log_holds(w).ok
        last = w.log()[-1]
        previous = w.rows("SELECT seq, digest FROM kdguard_log WHERE seq = :s", s=last["seq"] - 1)
        w.execute("DELETE FROM kdguard_log WHERE seq = :s", s=last["seq"])
        assert not log_holds(w).ok, "the head names an entry that is gone"
        w.execute(
            "UPDATE kdguard_head SET seq = :s, digest = :d", s=previous[0][0], d=previous[0][1]
        )
        assert not log_holds(w).ok, "the published heads know the entry that is gone"


# ── Many clients ────────────────────────────────────────────────────────────────────────────────


def crowded(folder: Path, database: str, plain: str, clients: int) -> None:
    """The same crowd at a gated and at a plain server: no more errors, and every record once."""
    with gated(folder / "gated", database) as w:
        mix = Mix.of(w, models=max(2, clients // 5))
        count = len(w.log())
        tally = crowd(w, mix.jobs, clients=clients, seconds=CROWD)
        records = w.log()[count:]
        report = log_holds(w)
    assert report.ok, report.problems
    promoted = [r for r in records if r["action"] == "promote"]
    refused = [r for r in records if r["action"] == "refuse"]
    assert tally.count("promote", 200) > 0
    assert not tally.oddities or _as_odd_as_plain(folder, plain, clients, tally), tally.oddities[:5]
    if not tally.oddities:
        assert len(promoted) == tally.count("promote", 200), tally.answers
        assert len(refused) == tally.count("refuse", 403) + tally.count("promote", 403)
        assert set(tally.answers) <= {
            ("promote", 200), ("promote", 403), ("refuse", 403), ("read", 200), ("shadow", 200),
            ("tag", 200),
        }, tally.answers  # fmt: skip
    assert tally.count("promote", 403) == 0, "a certified promotion was refused"


def _as_odd_as_plain(folder: Path, plain: str, clients: int, gated_: Tally) -> bool:
    with gated(folder / "plain", plain, guarded=False) as w:
        tally = crowd(
            w, Mix.of(w, models=max(2, clients // 5)).jobs, clients=clients, seconds=CROWD
        )
    return len(tally.oddities) >= len(gated_.oddities)


def test_ten_clients_on_sqlite(tmp_path: Path) -> None:
    crowded(tmp_path, sqlite(tmp_path), f"sqlite:///{tmp_path / 'plain.db'}", clients=10)


@pytest.mark.postgres
def test_fifty_clients_on_postgres(tmp_path: Path) -> None:
    with killable(tmp_path / "pg") as database:
        one, two = (new_database(database.uri, name) for name in ("gated", "plain"))
        crowded(tmp_path, one, two, clients=50)


# ── Without a database, a plugin, or settings ───────────────────────────────────────────────────


@pytest.mark.postgres
def test_without_its_database_it_answers_as_the_plain_server_does(tmp_path: Path) -> None:
    with (
        killable(tmp_path / "pg") as database,
        gated(tmp_path / "gated", new_database(database.uri, "gated")) as w,
        gated(tmp_path / "plain", new_database(database.uri, "plain"), guarded=False) as plain,
    ):
        good, other = w.champion(), plain.version()
        better = w.version(good.name, seed=1)
        assert plain.alias(other).ok
        database.kill()
        theirs, ours = plain.alias(other), w.alias(better)
        assert ours.status_code == theirs.status_code, (ours.text, theirs.text)
        assert ours.json()["error_code"] == theirs.json()["error_code"]
        database.start()
        w.engine.dispose()
        assert w.held(good.name) == good.number
        _until_it_works(w, better)
        assert log_holds(w).ok


def _until_it_works(w: World, version: Version) -> None:
    """Connections that died with the database are replaced after their first failure."""
    end = time.monotonic() + 60
    while not (answer := w.alias(version)).ok:
        assert time.monotonic() < end, answer.text
        time.sleep(0.5)


BREAK = """
import importlib.abc, sys
class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "{module}":
            raise ImportError("broken on purpose")
sys.meta_path.insert(0, Broken())
"""


def refuses_to_start(folder: Path, database: str, **environment: str) -> str:
    """What a server prints that must not start; fails where it answers at all."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1", "--backend-store-uri", database),
        *("--registry-store-uri", f"kdguard+{database}"),
        *("--artifacts-destination", str(folder / "artifacts")),
    ]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    given = {k: v for k, v in os.environ.items() if k != "KDGUARD_SERVER"}
    process = subprocess.Popen(
        command, env=given | quiet | environment, cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True, text=True,
    )  # fmt: skip
    end = time.monotonic() + 120
    try:
        while process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(requests.RequestException):
                answer = requests.get(f"http://127.0.0.1:{port}/health", timeout=2)
                assert not answer.ok, "the server started"
            time.sleep(0.2)
        assert process.poll() not in (None, 0), "the server neither ended nor answered"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
    return printed


# Where MLflow cannot load the entry point itself, it starts without a registry and refuses every
# request to one: test_gated_start.py.
@pytest.mark.parametrize("module", ["mlflow_kdguard.plugin.store.sql", "mlflow_kdguard.policy"])
def test_a_server_whose_plugin_is_broken_does_not_start(tmp_path: Path, module: str) -> None:
    from flows.attacks.settled import settled

    settings, _ = settled(
        tmp_path / "w", tmp_path / "artifacts", content={"root": (tmp_path / "c").as_uri()}
    )
    (tmp_path / "sitecustomize.py").write_text(BREAK.format(module=module))
    printed = refuses_to_start(
        tmp_path, sqlite(tmp_path), KDGUARD_SERVER=str(settings), PYTHONPATH=str(tmp_path)
    )
    assert "kdguard" in printed
    engine = sqlalchemy.create_engine(sqlite(tmp_path))
    assert "kdguard_log" not in sqlalchemy.inspect(engine).get_table_names()
    engine.dispose()


@pytest.mark.parametrize("fault", ["unset", "missing", "malformed", "unknown-key", "no-keys"])
def test_a_server_without_readable_settings_does_not_start(tmp_path: Path, fault: str) -> None:
    from flows.attacks.settled import settled, write_yaml

    settings, _ = settled(
        tmp_path / "w", tmp_path / "artifacts", content={"root": (tmp_path / "c").as_uri()}
    )
    stated = yaml.safe_load(settings.read_text())
    match fault:
        case "missing":
            settings.unlink()
        case "malformed":
            settings.write_text("version: [")
        case "unknown-key":
            write_yaml(settings, stated | {"trust_everyone": True})
        case "no-keys":
            write_yaml(settings, stated | {"keys": "nowhere/"})
    environment = {} if fault == "unset" else {"KDGUARD_SERVER": str(settings)}
    printed = refuses_to_start(tmp_path, sqlite(tmp_path), **environment)
    assert "KDGUARD_SERVER" in printed or str(tmp_path / "w") in printed
