"""How a gated registry starts: on which URIs, with workspaces and replicas, and when not."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.tracking._model_registry.utils import _get_store_registry
from mlflow.utils.workspace_context import WorkspaceContext

from flows.gates import Gate, gated, reasons
from flows.operators import Operator, toy_bundle
from flows.stores import URI, refusal, registry
from mlflow_kdguard.artifacts import CERTIFICATE, read_folder
from mlflow_kdguard.plugin import log
from mlflow_kdguard.plugin.store import GateMixin

START = """
import os, sys
from mlflow.server import handlers
from mlflow.exceptions import MlflowException

def start(uri, **environment):
    os.environ.pop("KDGUARD_SERVER", None)
    os.environ.update(environment, _MLFLOW_SERVER_REGISTRY_STORE=uri)
    handlers._model_registry_store = None
    handlers._model_registry_store_registry._get_store_with_resolved_uri.cache_clear()
    try:
        handlers.initialize_backend_stores("sqlite:///m.db", uri, "artifacts")
        return handlers._get_model_registry_store()
    except MlflowException as error:
        return str(error)
"""


def _python(folder: Path, code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", START + code],
        cwd=folder, capture_output=True, text=True, check=False, timeout=300,
        env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_server_without_settings_that_hold_does_not_start(tmp_path: Path) -> None:
    operator = Operator.install(tmp_path / "operator", URI)
    told = _python(
        tmp_path,
        f"""
settings = {str(operator.settings)!r}
gated = "kdguard+sqlite:///m.db"
assert "KDGUARD_SERVER is not set" in start(gated), "unset"
assert "absent.yaml" in start(gated, KDGUARD_SERVER="absent.yaml"), "absent"
good = open(settings).read()
open(settings, "w").write(good.replace("enforce", "x") + "unknown: 1\\n")
assert "unknown" in start(gated, KDGUARD_SERVER=settings), "wrong"
open(settings, "w").write(good)
store = start(gated, KDGUARD_SERVER=settings)
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore
from mlflow_kdguard.plugin.store import GateMixin
assert isinstance(store, GateMixin) and isinstance(store, SqlAlchemyStore), store
open(settings, "w").write(good.replace("version: 1", "version: 7"))
start(gated, KDGUARD_SERVER=settings)
open(settings, "w").write(good)
assert "version 7 was in force" in start(gated, KDGUARD_SERVER=settings), "older"
assert not [m for m in ("torch", "onnxruntime", "mlflow_kdguard.pipeline") if m in sys.modules]
print("fine")
""",
    )
    assert "fine" in told


def test_a_broken_plugin_starts_no_server(tmp_path: Path) -> None:
    """The stores behind the entry point cannot be imported: `mlflow server` itself ends."""
    operator = Operator.install(tmp_path / "operator", URI)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text(
        "import sys\nsys.modules['mlflow_kdguard.plugin.server'] = None\n"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mlflow", "server", "--port", "0"),
            *("--backend-store-uri", "sqlite:///m.db"),
            *("--registry-store-uri", "kdguard+sqlite:///m.db"),
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
        env=os.environ
        | {"PYTHONPATH": str(tmp_path / "broken"), "KDGUARD_SERVER": str(operator.settings)},
    )  # fmt: skip
    assert done.returncode != 0
    assert "mlflow-kdguard cannot be loaded" in done.stderr


def test_the_app_starts_no_server_where_not_even_the_entry_can_be_imported(tmp_path: Path) -> None:
    """MLflow drops the scheme with a warning; the app wants a gated store, and ends the command."""
    operator = Operator.install(tmp_path / "operator", URI)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mlflow", "server", "--port", "0", "--app-name", "kdguard"),
            *("--backend-store-uri", "sqlite:///m.db"),
            *("--registry-store-uri", "kdguard+sqlite:///m.db"),
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
        env=os.environ
        | {
            "PYTHONPATH": str(_without_plugin(tmp_path)),
            "KDGUARD_SERVER": str(operator.settings),
            "KDGUARD_AUTH": "none",
        },
    )  # fmt: skip
    assert done.returncode != 0
    assert "kdguard" in done.stderr
    assert "Uvicorn running" not in done.stderr


def test_without_the_plugin_its_scheme_is_unknown_and_every_request_is_refused(
    tmp_path: Path,
) -> None:
    told = _python(
        tmp_path,
        """
told = start("kdguard+sqlite:///m.db", KDGUARD_SERVER="x")
assert "unsupported URI" in told, told
print("refused")
""",
        PYTHONPATH=str(_without_plugin(tmp_path)),
    )
    assert "refused" in told


def _without_plugin(folder: Path) -> Path:
    place = folder / "absent"
    place.mkdir()
    (place / "sitecustomize.py").write_text(
        "import sys\nsys.modules['mlflow_kdguard.plugin.store'] = None\n"
    )
    return place


@pytest.mark.parametrize(
    "scheme",
    ["sqlite", "postgresql", "postgresql+psycopg2", "postgresql+psycopg", "mysql", "mysql+pymysql",
     "sqlite+pysqlite"],
)  # fmt: skip
def test_every_scheme_leads_to_a_gated_store(scheme: str) -> None:
    builder = _get_store_registry().get_store_builder(f"kdguard+{scheme}://host/db")
    assert builder.__module__ == "mlflow_kdguard.plugin.store"
    assert builder.__name__ == "build"


def test_workspaces_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_WORKSPACES", "true")
    files = toy_bundle()
    with registry(tmp_path) as reg:
        assert reg.store.supports_workspaces
        with WorkspaceContext("red"):
            version = reg.certified("digits", files)
            assert "certificate.registry" in reg.refused("digits", version)
            stated = reg.operator.certificate(files, "digits", registry=f"{URI}#workspace=red")
            reg.certify("digits", version, reg.operator.sign(stated))
            reg.promote("digits", version)
            envelope = reg.tags("digits", version)[CERTIFICATE]
        with WorkspaceContext("blue"):
            other = reg.version("digits", files)
            reg.tag("digits", other, CERTIFICATE, envelope)
            assert "certificate.registry" in reg.refused("digits", other)
            reg.store.rename_registered_model("digits", "letters")
        with WorkspaceContext("red"):
            refusal(lambda: reg.store.rename_registered_model("digits", "letters"))
        assert {e["workspace"] for e in reg.entries() if e["model"]} == {"red", "blue"}


def test_a_replica_that_lags_decides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with registry(tmp_path) as first:
        version = first.certified("digits")
    replica = tmp_path / "replica.db"
    shutil.copy(tmp_path / "registry.db", replica)
    monkeypatch.setenv("_MLFLOW_SERVER_READ_REPLICA_BACKEND_STORE_URI", f"sqlite:///{replica}")
    from mlflow.server.constants import READ_REPLICA_BACKEND_STORE_URI_ENV_VAR

    monkeypatch.setenv(READ_REPLICA_BACKEND_STORE_URI_ENV_VAR, f"sqlite:///{replica}")
    monkeypatch.setenv("KDGUARD_SERVER", str(first.operator.settings))
    from mlflow_kdguard.plugin.store import build

    store = build(f"kdguard+sqlite:///{tmp_path / 'registry.db'}")
    assert store.read_engine is not None
    store.delete_model_version_tag("digits", version, CERTIFICATE)
    assert CERTIFICATE in store.get_model_version("digits", version).tags  # the replica's word
    assert "no certificate" in refusal(
        lambda: store.set_registered_model_alias("digits", "champion", version)
    )


# ── A server on PostgreSQL with two workers and users ───────────────────────────────────────────


@pytest.fixture(scope="module")
def gate(postgres_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    engine = sqlalchemy.create_engine(postgres_uri, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("CREATE DATABASE gated_start"))
    engine.dispose()
    database = postgres_uri.rpartition("/")[0] + "/gated_start"
    assert database.startswith("postgresql+psycopg2://")
    folder = tmp_path_factory.mktemp("gate")
    with gated(folder, database=database, workers=2, auth=True) as made:
        yield made


@pytest.mark.postgres
def test_two_workers_promote_refuse_and_log(gate: Gate) -> None:
    versions = [gate.certified("digits") for _ in range(3)]
    bad, _ = gate.registered("digits", toy_bundle())
    start = time.monotonic()
    with pytest.raises(MlflowException) as caught:
        gate.promote("digits", bad)
    assert time.monotonic() - start < 10
    assert "no certificate" in reasons(caught.value)

    def ask(number: int) -> None:
        gate.promote("digits", versions[number % 3])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, range(24)))
    engine = sqlalchemy.create_engine(gate.database)
    with engine.connect() as connection:
        verifiers = [gate.operator.log_signer.verifier]
        report = log.verify(connection, verifiers=verifiers, heads=gate.operator.heads)
        assert report.ok, report.problems
        assert report.head is not None
        rows = [r for r in log.entries(connection, until=report.head.seq) if r["model"]]
    engine.dispose()
    promoted = [row for row in rows if row["action"] == "promote"]
    assert len(promoted) == 24
    assert {row["actor"] for row in rows} == {"admin"}
    assert gate.alias("digits") == promoted[-1]["version"]
    assert read_folder(Path(gate.location("digits", versions[0]).removeprefix("file://")))


@pytest.mark.postgres
def test_a_client_may_judge_before_it_asks(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDGUARD_SERVER", str(gate.operator.settings))
    client = MlflowClient(gate.uri, f"kdguard+{gate.uri}")
    store = client._get_registry_client().store
    assert not isinstance(store, GateMixin)
    heads = gate.operator.heads.read_bytes()
    bad, _ = gate.registered("letters", toy_bundle())
    with pytest.raises(MlflowException) as caught:
        client.set_registered_model_alias("letters", "champion", bad)
    assert "no certificate" in reasons(caught.value)
    assert gate.operator.heads.read_bytes() == heads  # the server was not asked
    good = gate.certified("letters")
    client.set_registered_model_alias("letters", "champion", good)
    client.set_registered_model_alias("letters", "production", good)  # from the content root
    assert gate.alias("letters", "production") == good
