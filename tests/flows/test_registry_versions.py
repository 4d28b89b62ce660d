"""Model versions on a real MLflow server: bytes in, the same bytes out, nothing executed."""

import uuid
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnxruntime as ort
import pytest
import yaml
from mlflow.tracking import MlflowClient

import toys
from flows.servers import MlflowServer
from mlflow_kdguard import bundle
from mlflow_kdguard.config import RegistrySection
from mlflow_kdguard.errors import ModelError, RegistryError, UnsafeModelError, UsageError
from mlflow_kdguard.files import sha256
from mlflow_kdguard.records import Decision, RuleResult, Source
from mlflow_kdguard.registry import Registry, Run
from mlflow_kdguard.registry.bundle import student_files, write

pytestmark = [
    pytest.mark.slow,  # two servers have to start
    # said by mlflow.pyfunc about its own types when it is first imported
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
]


@pytest.fixture(
    params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)], scope="session"
)
def server(request: pytest.FixtureRequest) -> MlflowServer:
    name = "mlflow_server" if request.param == "sqlite" else "postgres_server"
    found: MlflowServer = request.getfixturevalue(name)
    return found


def opened(server: MlflowServer) -> Registry:
    return Registry(RegistrySection(tracking_uri=server.uri, experiment="versions"))


def new_name() -> str:
    return f"student-{uuid.uuid4().hex[:8]}"


def client(server: MlflowServer) -> MlflowClient:
    return MlflowClient(server.uri, server.uri)


def stored_as(server: MlflowServer, name: str, folder: Path, *, source: str | None = None) -> str:
    """What a stranger does with plain MLflow: a folder as a new version of `name`."""
    eyes = client(server)
    found = eyes.get_experiment_by_name("stranger")
    experiment = found.experiment_id if found else eyes.create_experiment("stranger")
    run = eyes.create_run(experiment)
    eyes.log_artifacts(run.info.run_id, str(folder), "model")
    eyes.create_registered_model(name)
    version = eyes.create_model_version(
        name, source or f"{run.info.artifact_uri}/model", run_id=None if source else run.info.run_id
    )
    return f"models:/{name}/{version.version}"


def test_a_student_is_stored_byte_for_byte_promoted_and_served(server: MlflowServer) -> None:
    registry, name, blob = opened(server), new_name(), toys.onnx_tiny(seed=3)
    with registry.run("p") as run:
        done = registry.register_student(name, blob, run=run, tags={"kdguard.teacher": "t"})
    assert done.uri == f"models:/{name}/1"
    assert done.run_id == run.id
    assert done.registry == registry.identity == server.uri
    assert set(done.files) == bundle.ALLOWED
    assert done.files["model.onnx"] == sha256(blob)
    found = registry.download(done.uri)
    assert found.onnx == blob
    assert found.digests == done.files
    assert (found.name, found.version, found.run_id) == (name, "1", run.id)
    assert found.tags["kdguard.sha256"] == sha256(blob)
    assert found.tags["kdguard.teacher"] == "t"
    bundle.check(found.files)
    assert client(server).get_registered_model(name).aliases == {}
    assert registry.alias(name, "champion") is None

    registry.promote(done.uri, "champion")
    assert registry.alias(name, "champion") == "1"
    by_alias = registry.download(f"models:/{name}@champion")
    assert (by_alias.uri, by_alias.files) == (done.uri, found.files)
    mlflow.set_tracking_uri(server.uri)
    served = mlflow.pyfunc.load_model(f"models:/{name}@champion")
    x = toys.images(5, (1, 2, 2))
    expected = ort.InferenceSession(blob, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    np.testing.assert_array_equal(served.predict(x)["logits"], expected[0])
    assert served.metadata.signature.inputs.to_dict()[0]["tensor-spec"] == {
        "dtype": "float32",
        "shape": (-1, 1, 2, 2),
    }
    with pytest.raises(mlflow.exceptions.MlflowException):
        served.predict(x.astype(np.float64)[:, :, :1])


def test_registering_again_overwrites_nothing_and_doubles_nothing(
    mlflow_server: MlflowServer,
) -> None:
    registry, name = opened(mlflow_server), new_name()
    first, second = toys.onnx_tiny(seed=1), toys.onnx_tiny(seed=2)
    with registry.run("p") as run:
        one = registry.register_student(name, first, run=run)
        assert registry.register_student(name, first, run=run) == one
        two = registry.register_student(name, second, run=run)
    with registry.run("p") as other:
        three = registry.register_student(name, first, run=other)
    assert [one.version, two.version, three.version] == ["1", "2", "3"]
    assert registry.download(one.uri).onnx == first
    assert registry.download(two.uri).onnx == second
    assert one.files == three.files


def test_bytes_that_change_in_the_store_are_seen(mlflow_server: MlflowServer) -> None:
    registry, name, blob = opened(mlflow_server), new_name(), toys.onnx_tiny(seed=1)
    with registry.run("p") as run:
        done = registry.register_student(name, blob, run=run)
        (path,) = mlflow_server.artifacts.rglob(f"{run.id}/**/model.onnx")
        path.write_bytes(toys.onnx_tiny(seed=9))
        assert registry.download(done.uri).digests != done.files
        with pytest.raises(RegistryError, match=rf"{done.uri} is not stored .*model\.onnx"):
            registry.register_student(name, blob, run=run)


def test_a_teacher_keeps_its_parts_and_its_lineage(server: MlflowServer, tmp_path: Path) -> None:
    registry, name, blob = opened(server), new_name(), toys.onnx_tiny()
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    (tmp_path / "architecture.json").write_bytes(b'{"arch": "mlp:5"}')
    done = registry.register_teacher(
        name,
        blob,
        weights=tmp_path,
        data={"train": Source(uri="digits#train", sha256="ab" * 32)},
        lineage={"kdguard.source_sha256": "cd" * 32},
    )
    found = registry.download(done.uri)
    assert found.onnx == blob
    assert found.files["weights.safetensors"] == b"weights"
    assert found.main == "weights.safetensors"
    assert found.tags["kdguard.sha256/weights.safetensors"] == sha256(b"weights")
    assert found.tags["kdguard.data/train"] == f"digits#train sha256:{'ab' * 32}"
    assert found.tags["kdguard.source_sha256"] == "cd" * 32
    assert client(server).get_run(done.run_id).info.status == "FINISHED"
    path = registry.fetch(done.uri, tmp_path / "out")
    assert path.read_bytes() == b"weights"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "architecture.json",
        "weights.safetensors",
    ]


def payload(folder: Path, marker: Path) -> None:
    """A model folder whose MLmodel runs code of its own when a flavor loads it."""
    (folder / "code").mkdir(parents=True)
    text = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    (folder / "code" / "kdguard_payload.py").write_text(f"{text}_load_pyfunc = Path\n")
    (folder / "model.onnx").write_bytes(toys.onnx_tiny())
    flavor = {"loader_module": "kdguard_payload", "code": "code", "data": "model.onnx"}
    body = {"flavors": {"python_function": {**flavor, "env": {}}}, "model_uuid": "0" * 32}
    (folder / "MLmodel").write_text(yaml.safe_dump(body))


def test_nothing_of_a_strangers_model_is_executed(
    mlflow_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, name = tmp_path / "executed", new_name()
    payload(tmp_path / "bad", marker)
    uri = stored_as(mlflow_server, name, tmp_path / "bad")
    registry = opened(mlflow_server)
    found = registry.download(uri)
    assert found.onnx == toys.onnx_tiny()
    assert "code/kdguard_payload.py" in found.files
    assert registry.fetch(uri, tmp_path / "out").name == "model.onnx"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.onnx"]
    assert not marker.exists()
    with pytest.raises(UnsafeModelError, match="code/kdguard_payload"):
        bundle.check(found.files)
    # The trap is real: MLflow's own loader walks into it.
    monkeypatch.syspath_prepend(str(tmp_path))
    mlflow.set_tracking_uri(mlflow_server.uri)
    with pytest.raises(mlflow.exceptions.MlflowException, match="predict"):
        mlflow.pyfunc.load_model(uri)
    assert marker.exists()


def test_what_the_client_adds_is_left_out_and_what_is_stored_stays(
    mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    place = tmp_path / "model"
    write(student_files(toys.onnx_tiny()), place)
    (place / "registered_model_meta").write_text("model_name: x\n")
    registry = opened(mlflow_server)
    assert set(registry.download(str(place)).files) == bundle.ALLOWED
    stored = registry.download(stored_as(mlflow_server, new_name(), place)).files
    assert "registered_model_meta" in stored
    with pytest.raises(UnsafeModelError, match="registered_model_meta"):
        bundle.check(stored)


@pytest.mark.parametrize(
    "source", ["http://169.254.169.254/latest", "ftp://host/x", "models:/other/1"]
)
def test_a_source_that_is_no_artifact_store_is_refused_before_any_connection(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow_kdguard.registry import versions
    from mlflow_kdguard.registry.client import Connection

    there = Connection(RegistrySection(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}"))

    def connect(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(versions, "get_artifact_repository", connect)
    with pytest.raises(UnsafeModelError, match="artifact store"):
        versions.Versions(there).fetch(source, 1000)


def test_a_logged_model_of_plain_mlflow_is_read_too(mlflow_server: MlflowServer) -> None:
    import onnx

    mlflow.set_tracking_uri(mlflow_server.uri)
    mlflow.set_experiment("stranger")
    blob, name = toys.onnx_tiny(seed=8), new_name()
    with mlflow.start_run():
        info = mlflow.onnx.log_model(
            onnx.load_model_from_string(blob),
            name="model",
            registered_model_name=name,
            save_as_external_data=False,
            pip_requirements=["onnx"],
        )
    found = opened(mlflow_server).download(f"models:/{name}/{info.registered_model_version}")
    assert onnx.load_model_from_string(found.onnx) == onnx.load_model_from_string(blob)


def test_too_much_is_not_fetched(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "model.onnx").write_bytes(b"x" * 5000)
    uri = stored_as(mlflow_server, new_name(), tmp_path / "big")
    registry = opened(mlflow_server)
    for place in (uri, str(tmp_path / "big"), str(tmp_path / "big" / "model.onnx")):
        assert registry.download(place, limit=5000).onnx == b"x" * 5000
        with pytest.raises(ModelError, match="4999"):
            registry.download(place, limit=4999)


def test_links_in_a_folder_are_refused(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.onnx").symlink_to("/etc/passwd")
    with pytest.raises(UnsafeModelError, match="link"):
        opened(mlflow_server).download(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("models:/nobody-has-this/1", RegistryError),
        ("models:/nobody-has-this@champion", RegistryError),
        ("models:/name", UsageError),
        ("models:/name/latest", UsageError),
        ("models:/../1", RegistryError),
        ("no/such/file.onnx", UsageError),
    ],
)
def test_what_is_not_there_is_named(
    mlflow_server: MlflowServer, uri: str, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=uri) as caught:
        opened(mlflow_server).download(uri)
    assert type(caught.value) is kind


def registered(server: MlflowServer) -> tuple[Registry, str, Run]:
    registry = opened(server)
    with registry.run("p") as run:
        return registry, registry.register_student(new_name(), toys.onnx_tiny(), run=run).uri, run


def test_a_certificate_lies_beside_the_model_never_inside(
    server: MlflowServer, tmp_path: Path
) -> None:
    registry, uri, run = registered(server)
    before = registry.download(uri)
    assert before.certificate() is None
    envelope = '{"payload": "é'.encode() + b"x" * 99_900 + b'"}'
    registry.store_certificate(uri, envelope)
    after = registry.download(uri)
    assert after.certificate() == envelope
    assert after.files == before.files
    path = f"certificates/{after.name}-1.dsse.json"
    assert (
        Path(client(server).download_artifacts(run.id, path, str(tmp_path))).read_bytes()
        == envelope
    )
    with pytest.raises(RegistryError, match="100001 characters"):
        registry.store_certificate(uri, b"x" * 100_001)
    with pytest.raises(RegistryError, match="not text"):
        registry.store_certificate(uri, b"\xff")
    assert registry.download(uri).certificate() == envelope


def test_a_decision_says_why_on_the_version(server: MlflowServer) -> None:
    registry, uri, _ = registered(server)
    rules = (
        RuleResult(rule="asr", limit=0.05, figure=0.9, ok=False, why="0.9 exceeds 0.05"),
        RuleResult(rule="accuracy", limit=0.03, figure=0.01, ok=True, why="fine"),
    )
    registry.record_decision(uri, Decision(decision="refuse", rules=rules))
    tags = registry.download(uri).tags
    assert tags["kdguard.decision"] == "refuse"
    assert tags["kdguard.reason"] == "asr: 0.9 exceeds 0.05"
    registry.record_decision(uri, Decision(decision="pass", rules=rules[1:]))
    assert registry.download(uri).tags["kdguard.decision"] == "pass"


def test_an_alias_that_looks_like_another_is_refused(mlflow_server: MlflowServer) -> None:
    registry, uri, _ = registered(mlflow_server)
    with pytest.raises(UsageError, match="châmpion"):
        registry.promote(uri, "châmpion")
    with pytest.raises(RegistryError):
        registry.set_alias(new_name(), "champion", "1")


def test_sqlite_without_a_server_keeps_artifacts_beside_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    section = RegistrySection(tracking_uri=f"sqlite:///{tmp_path / 'demo' / 'mlflow.db'}")
    registry = Registry(section)
    with registry.run("p") as run:
        done = registry.register_student("s", toys.onnx_tiny(), run=run)
    assert registry.download(done.uri).digests == done.files
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert {p.name for p in (tmp_path / "demo").iterdir()} >= {"mlflow.db", "mlartifacts"}
    registry.promote(done.uri, "champion")
    mlflow.set_tracking_uri(section.tracking_uri or "")
    assert mlflow.pyfunc.load_model("models:/s@champion").predict(toys.images(2, (1, 2, 2)))[
        "logits"
    ].shape == (2, 3)
    assert list((tmp_path / "elsewhere").iterdir()) == []
