"""Runs on a real MLflow server: how they end, what they hold, and what a kill leaves."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from flows.servers import MlflowServer, kill_group, serving
from mlflow_kdguard.config import RegistrySection
from mlflow_kdguard.errors import Interrupted, RegistryError
from mlflow_kdguard.files import sha256
from mlflow_kdguard.records import Source
from mlflow_kdguard.registry import Registry, Run

pytestmark = pytest.mark.slow  # two servers have to start


@pytest.fixture(
    params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)], scope="session"
)
def server(request: pytest.FixtureRequest) -> MlflowServer:
    name = "mlflow_server" if request.param == "sqlite" else "postgres_server"
    found: MlflowServer = request.getfixturevalue(name)
    return found


@pytest.fixture
def registry(server: MlflowServer) -> Registry:
    return Registry(section(server))


def section(server: MlflowServer, experiment: str | None = None) -> RegistrySection:
    return RegistrySection(
        tracking_uri=server.uri, experiment=experiment or f"runs-{uuid.uuid4().hex[:8]}"
    )


def client(server: MlflowServer) -> MlflowClient:
    """A second pair of eyes on the server."""
    return MlflowClient(server.uri, server.uri)


def status(server: MlflowServer, run_id: str) -> str:
    return str(client(server).get_run(run_id).info.status)


def test_a_pipeline_is_one_run_with_a_nested_run_a_stage(
    server: MlflowServer, registry: Registry
) -> None:
    with registry.run("pipeline") as parent:
        with parent.stage("audit", inputs="a" * 64) as audit:
            assert status(server, audit.id) == "RUNNING"
        assert status(server, audit.id) == "FINISHED"
        with parent.stage("detox", inputs="b" * 64):
            pass
    assert status(server, parent.id) == "FINISHED"
    nested = parent.nested()
    assert {run.info.run_name for run in nested} == {"audit", "detox"}
    assert all(run.data.tags["mlflow.parentRunId"] == parent.id for run in nested)
    assert all(run.info.end_time is not None for run in nested)
    assert parent.has_finished("audit", "a" * 64)
    assert not parent.has_finished("audit", "b" * 64)
    assert not parent.has_finished("distill", "a" * 64)


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (ValueError("first line\nsecond"), "FAILED"),
        (SystemExit(1), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (Interrupted("half-way"), "KILLED"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_ends_a_stage_is_seen_in_its_run_and_its_parent(
    mlflow_server: MlflowServer, error: BaseException, ends: str
) -> None:
    seen: list[str] = []

    def work() -> None:
        with Registry(section(mlflow_server)).run("pipeline") as parent:
            with parent.stage("before"):
                pass
            with parent.stage("distill") as stage:
                seen.extend((parent.id, stage.id))
                raise error

    with pytest.raises(type(error)) as caught:
        work()
    assert caught.value is error
    assert [status(mlflow_server, run_id) for run_id in seen] == [ends, ends]
    tags = client(mlflow_server).get_run(seen[1]).data.tags
    assert tags["kdguard.error"].startswith(type(error).__name__)
    assert "second" not in tags["kdguard.error"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_figure_that_is_not_finite_is_refused_before_any_is_logged(
    mlflow_server: MlflowServer, bad: float
) -> None:
    run_id = ""

    def work() -> None:
        nonlocal run_id
        with Registry(section(mlflow_server)).run("p") as run:
            run_id = run.id
            run.log_metrics({"kdguard/accuracy": 0.9, "kdguard/asr/x/0": bad})

    with pytest.raises(RegistryError, match="kdguard/asr/x/0"):
        work()
    found = client(mlflow_server).get_run(run_id)
    assert found.data.metrics == {}
    assert found.info.status == "FAILED"


def test_many_figures_go_in_batches(server: MlflowServer, registry: Registry) -> None:
    figures = {f"kdguard/figure/{i}": i / 7 for i in range(1203)}
    with registry.run("p") as run:
        start = time.monotonic()
        run.log_metrics(figures)
        seconds = time.monotonic() - start
    assert client(server).get_run(run.id).data.metrics == pytest.approx(figures)
    assert seconds < 60  # single calls would take minutes


def test_documents_become_metrics(server: MlflowServer, registry: Registry) -> None:
    document = {
        "schema": "kdguard.measure/1",
        "accuracy": {"k": 9, "n": 10},
        "asr": [
            {
                "name": "a@b=c[0]",
                "trigger": "f" * 64,
                "target": 3,
                "k": 1,
                "n": 4,
                "upper": 0.6,
                "lift": None,
            }
        ],
    }
    with registry.run("p") as parent, parent.stage("measure") as stage:
        stage.log_documents([document, {"schema": "kdguard.other/1"}])
    assert client(server).get_run(stage.id).data.metrics == {
        "kdguard/accuracy": 0.9,
        "kdguard/asr/a_b_c_0_/3": 0.25,
        "kdguard/asr_upper/a_b_c_0_/3": 0.6,
    }


def test_long_parameters_are_kept_whole(
    server: MlflowServer, registry: Registry, tmp_path: Path
) -> None:
    long = "x" * 7000
    with registry.run("p") as run:
        run.log_params({"short": 3, "long": long, **{f"p{i}": i for i in range(150)}})
    params = client(server).get_run(run.id).data.params
    assert params["short"] == "3"
    assert len(params) == 152
    file = client(server).download_artifacts(run.id, "long-params.json", str(tmp_path))
    stored = Path(file).read_bytes()
    assert json.loads(stored) == {"long": long}
    assert sha256(stored) in params["long"]


def test_tags_that_would_be_cut_are_refused(mlflow_server: MlflowServer) -> None:
    registry = Registry(section(mlflow_server))
    with registry.run("p") as run, pytest.raises(RegistryError, match=r"kdguard\.big"):
        run.set_tags({"kdguard.big": "x" * 5001})


def test_files_are_stored_with_their_digests(
    server: MlflowServer, registry: Registry, tmp_path: Path
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "mask.npz").write_bytes(b"mask")
    (tmp_path / "sub" / "a.json").write_bytes(b"{}")
    files = {"mask.npz": sha256(b"mask"), "sub/a.json": sha256(b"{}")}
    with registry.run("p") as run:
        run.log_files(tmp_path, files)
        run.log_bytes(b"hello", "notes/hello.txt")
        (tmp_path / "mask.npz").write_bytes(b"other")
        with pytest.raises(RegistryError, match=r"mask\.npz changed"):
            run.log_files(tmp_path, files)
    eyes = client(server)
    tags = eyes.get_run(run.id).data.tags
    assert tags["kdguard.sha256/sub/a.json"] == sha256(b"{}")
    assert tags["kdguard.sha256/notes/hello.txt"] == sha256(b"hello")
    out = tmp_path / "out"
    out.mkdir()
    assert Path(eyes.download_artifacts(run.id, "mask.npz", str(out))).read_bytes() == b"mask"
    assert Path(eyes.download_artifacts(run.id, "sub/a.json", str(out))).read_bytes() == b"{}"
    assert (
        Path(eyes.download_artifacts(run.id, "notes/hello.txt", str(out))).read_bytes() == b"hello"
    )


def test_data_is_an_input_of_the_run(server: MlflowServer, registry: Registry) -> None:
    with registry.run("p") as run:
        run.log_data(Source(uri="digits#test", sha256="ab" * 32), context="test", size=797)
    (found,) = client(server).get_run(run.id).inputs.dataset_inputs
    assert found.dataset.name == "digits#test"
    assert json.loads(found.dataset.source)["sha256"] == "ab" * 32
    assert {tag.key: tag.value for tag in found.tags} == {"mlflow.data.context": "test"}


KILLED = """
import os, signal, sys
from pathlib import Path
from mlflow_kdguard.config import RegistrySection
from mlflow_kdguard.registry import Registry
uri, experiment, folder = sys.argv[1:]
registry = Registry(RegistrySection(tracking_uri=uri, experiment=experiment))
with registry.run("pipeline", work_dir=Path(folder)) as parent:
    with parent.stage("audit", inputs="1"):
        pass
    with parent.stage("distill", inputs="2") as stage:
        print(parent.id, stage.id, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(server: MlflowServer, experiment: str, folder: Path) -> list[str]:
    """Run a pipeline in a process that dies inside its second stage; parent's and stage's id."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, server.uri, experiment, str(folder)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stdout.split()


def running(server: MlflowServer, experiment: str) -> list[Any]:
    eyes = client(server)
    found = eyes.get_experiment_by_name(experiment)
    assert found is not None
    return list(eyes.search_runs([found.experiment_id], "attributes.status = 'RUNNING'"))


def test_resume_continues_the_run_and_closes_what_a_kill_left_running(
    server: MlflowServer, tmp_path: Path
) -> None:
    where = section(server)
    parent_id, stage_id = killed(server, where.experiment, tmp_path)
    assert status(server, parent_id) == status(server, stage_id) == "RUNNING"
    registry = Registry(where)
    assert registry.work_dir(parent_id) == tmp_path
    with registry.run("pipeline", resume=parent_id, work_dir=tmp_path) as parent:
        assert parent.id == parent_id
        assert status(server, parent_id) == "RUNNING"
        assert status(server, stage_id) == "KILLED"
        assert parent.has_finished("audit", "1")
        assert not parent.has_finished("distill", "2")
        with parent.stage("distill", inputs="2"):
            pass
        assert parent.has_finished("distill", "2")
    assert running(server, where.experiment) == []
    assert status(server, parent_id) == "FINISHED"


def test_a_new_run_in_the_same_folder_closes_the_old_one(
    mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    where = section(mlflow_server)
    old = killed(mlflow_server, where.experiment, tmp_path)
    other = Registry(where)
    with other.run("elsewhere", work_dir=tmp_path / "elsewhere") as bystander:
        with Registry(where).run("pipeline", work_dir=tmp_path) as new:
            assert new.id not in old
        assert [status(mlflow_server, run_id) for run_id in old] == ["KILLED", "KILLED"]
        assert status(mlflow_server, bystander.id) == "RUNNING"
    assert running(mlflow_server, where.experiment) == []


def test_a_pipeline_below_another_is_closed_with_it(mlflow_server: MlflowServer) -> None:
    where = section(mlflow_server)
    registry = Registry(where)
    story = registry.run("story")
    outer = story.__enter__()
    inner = registry.run("naive", parent=outer).__enter__()
    stage = inner.stage("distill").__enter__()  # none of the three is ever left
    with Registry(where).run("story", resume=outer.id):
        assert status(mlflow_server, stage.id) == status(mlflow_server, inner.id) == "KILLED"
    assert running(mlflow_server, where.experiment) == []


@pytest.mark.parametrize("run_id", ["0" * 32, "deleted"])
def test_resuming_what_is_not_there_is_an_error(mlflow_server: MlflowServer, run_id: str) -> None:
    registry = Registry(section(mlflow_server))
    if run_id == "deleted":
        with registry.run("p") as run:
            run_id = run.id
        client(mlflow_server).delete_run(run_id)

    def resume() -> None:
        with registry.run("p", resume=run_id):
            raise AssertionError("a run that is not there was opened")

    with pytest.raises(RegistryError, match=run_id):
        resume()


def test_a_deleted_experiment_is_named(mlflow_server: MlflowServer) -> None:
    where = section(mlflow_server)
    registry = Registry(where)
    client(mlflow_server).delete_experiment(registry.experiment_id())
    with pytest.raises(RegistryError, match=f"{where.experiment}.*deleted"):
        registry.experiment_id()


def test_a_server_that_dies_ends_the_work_within_seconds_and_hides_no_error(
    tmp_path: Path,
) -> None:
    seconds: list[float] = []

    def work() -> None:
        with registry.run("p") as parent, parent.stage("measure") as stage:
            kill_group(server.process)
            seconds.append(time.monotonic())
            with pytest.raises(RegistryError, match=server.uri):
                stage.log_metrics({"kdguard/accuracy": 1.0})
            seconds.append(time.monotonic())
            raise ZeroDivisionError("the stage's own")

    with serving(tmp_path) as server:
        registry = Registry(section(server))
        with pytest.raises(ZeroDivisionError, match="the stage's own"):
            work()
        seconds.append(time.monotonic())
    assert seconds[1] - seconds[0] < 30  # three retries
    assert seconds[2] - seconds[1] < 5  # closing two runs


def test_nothing_is_printed_and_no_global_of_mlflow_is_touched(
    mlflow_server: MlflowServer, capfd: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    with Registry(section(mlflow_server)).run("p") as run, run.stage("s") as stage:
        stage.log_metrics({"kdguard/accuracy": 1.0})
        stage.log_bytes(b"x", "x.txt")
        assert isinstance(stage, Run)
    assert (mlflow.get_tracking_uri(), mlflow.get_registry_uri()) == before
    assert mlflow.active_run() is None
    assert capfd.readouterr() == ("", "")
