"""`mlflow run PROJECT -b kdguard` on a real server: runs, statuses, limits, signals, resumption."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import yaml
from mlflow.entities import Run
from mlflow.exceptions import ExecutionException

import toys
from flows.servers import MlflowServer
from flows.stories import environment
from mlflow_kdguard import policy
from mlflow_kdguard.plugin.backend import build

pytestmark = pytest.mark.slow

MAKE = """
import pathlib, shutil, sys, mlflow
with mlflow.start_run():
    mlflow.log_metric("made", 1.0)
shutil.copy("toy.onnx", pathlib.Path(sys.argv[1]) / "teacher.onnx")
print("a teacher was made", flush=True)
sys.exit(int(sys.argv[2]))
"""
QUICK = {
    "audit.steps": "2",
    "detox.chain": "[variance_mask]",
    "detox.mask_steps": "2",
    "distill.epochs": "1",
    "distill.pgd_steps": "1",
    "certify.samples": "4",
    "certify.pgd_steps": "2",
    "certify.restarts": "1",
}
DATA = {
    "transfer": {"default": "digits#train[:200]"},
    "clean": {"default": "digits#train[1000:1100]"},
    "test": {"default": "digits#test[:100]"},
}


def _project(folder: Path, stages: list[Any], **more: Any) -> Path:
    folder.mkdir()
    rows = [{"name": row} if isinstance(row, str) else row for row in stages]
    body = {"name": folder.name, "shared": {"data": DATA}, "stages": rows, **more}
    (folder / "plugin.yaml").write_text(yaml.safe_dump(body))
    (folder / "toy.onnx").write_bytes(toys.onnx_tiny(shape=(1, 8, 8), classes=10))
    (folder / "make.py").write_text(MAKE)
    return folder


def _own(name: str, command: str, **parameters: tuple[str, Any]) -> dict[str, Any]:
    rows = {key: {"type": kind, "default": value} for key, (kind, value) in parameters.items()}
    return {"name": name, "command": command, "parameters": rows}


MADE = _own("make", "python make.py {folder} {code}", code=("int", 0))
TEACHER = {
    "name": "register-teacher",
    "parameters": {"model": {"default": "{work_dir}/project/make/teacher.onnx"}},
}
STAGES = [MADE, TEACHER, "audit", "detox", "distill", "export", "register", "audit-student"]
STAGES += ["measure", "certify", "attest", "gate", "promote"]


def _lenient(folder: Path) -> str:
    """An operator's own policy, which a toy can meet."""
    body = policy.load(None).model_dump(mode="json")
    body |= dict.fromkeys(("accuracy", "asr", "reference", "faithful", "export"))
    body["certificate"]["figures_from"] = "any"
    path = folder / "policy.yaml"
    path.write_text(yaml.safe_dump({"policy": body}))
    return str(path)


def _command(project: Path, folder: Path, config: dict[str, Any], **given: str) -> list[str]:
    (folder / "backend.json").write_text(json.dumps({"work_dir": str(folder / "work"), **config}))
    argv = [sys.executable, "-m", "mlflow", "run", str(project), "-b", "kdguard"]
    argv += ["--backend-config", str(folder / "backend.json"), "--experiment-name", project.name]
    for key, value in given.items():
        argv += ["-P", f"{key}={value}"]
    return argv


def _environment(server: MlflowServer, **more: str) -> dict[str, str]:
    return environment() | {"MLFLOW_TRACKING_URI": server.uri} | more


def _mlflow_run(
    server: MlflowServer, argv: list[str], *, expect: int = 0, **more: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, env=_environment(server, **more)
    )
    assert done.returncode == expect, (done.stdout + done.stderr)[-4000:]
    return done


def _runs(server: MlflowServer, experiment: str) -> tuple[list[Run], list[Run]]:
    """The projects' runs and the nested ones, oldest first."""
    client = mlflow.MlflowClient(server.uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    runs = client.search_runs([found.experiment_id], order_by=["attributes.start_time"])
    above = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    return above, [run for run in runs if run not in above]


def _statuses(runs: list[Run]) -> dict[str, str]:
    return {str(run.info.run_name): run.info.status for run in runs}


def _alive(work: Path) -> list[psutil.Process]:
    """Every process that works in the folder, or was started for it."""
    found = []
    for process in psutil.process_iter():
        try:
            inside = process.environ().get("KDGUARD_WORK_DIR") == str(work)
            if inside or any(str(work) in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def whole(
    mlflow_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Path, str]]:
    """A project that was run from end to end: its folder, the work's, and what was printed."""
    folder = tmp_path_factory.mktemp("backend")
    project = _project(folder / "whole", STAGES)
    config = {
        "policy": _lenient(folder),
        "pins": ["digits#test[:100]"],
        "teacher": {"seconds": 300},
    }
    given = {**QUICK, "registry.model_name": "whole", "teacher.name": "whole-teacher"}
    argv = _command(project, folder, config, **given)
    monitored = {
        "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "true",
        "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.5",
    }
    done = _mlflow_run(mlflow_server, argv, **monitored)
    yield project, folder, done.stdout
    shutil.rmtree(folder, ignore_errors=True)


def test_end_to_end(whole: tuple[Path, Path, str], mlflow_server: MlflowServer) -> None:
    above, nested = _runs(mlflow_server, "whole")
    assert _statuses(above) == {"whole": "FINISHED"}
    names = ["make", "teacher", "register-teacher", *STAGES[2:]]
    assert sorted(_statuses(nested)) == sorted(str(name) for name in names)
    assert set(_statuses(nested).values()) == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in nested} == {above[0].info.run_id}
    client = mlflow.MlflowClient(mlflow_server.uri)
    assert client.get_model_version_by_alias("whole", "champion").version == "1"
    assert client.get_model_version("whole-teacher", "1")
    tags = above[0].data.tags
    assert tags["mlflow.project.backend"] == "kdguard"
    assert tags["mlflow.source.type"] == "PROJECT"
    assert tags["kdguard.decision"] == "pass"
    assert above[0].data.params["distill.epochs"] == "1"
    made = next(run for run in nested if run.info.run_name == "make")
    assert made.data.metrics == {"made": 1.0}


def test_logs_are_streamed_and_stored(
    whole: tuple[Path, Path, str], mlflow_server: MlflowServer
) -> None:
    assert "a teacher was made" in whole[2]
    assert "certify 4/4" in whole[2]
    above, _ = _runs(mlflow_server, "whole")
    client = mlflow.MlflowClient(mlflow_server.uri)
    stored = [file.path for file in client.list_artifacts(above[0].info.run_id, "logs")]
    assert sorted(stored) == ["logs/make.log", "logs/promote.log", "logs/teacher.log"]


def test_system_metrics_where_the_user_enables_them(
    whole: tuple[Path, Path, str], mlflow_server: MlflowServer
) -> None:
    above, _ = _runs(mlflow_server, "whole")
    assert "system/system_memory_usage_megabytes" in above[0].data.metrics


def test_a_projects_policy_cannot_loosen_and_a_refusal_fails_the_run(
    whole: tuple[Path, Path, str], mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    """The same finished work under the packaged policy, which the project tries to waive."""
    project = tmp_path / "loose"
    shutil.copytree(whole[0], project)
    body = yaml.safe_load((project / "plugin.yaml").read_text())
    body["policy"] = {"faithful": None, "accuracy": None, "data": {"allow_unpinned": True}}
    (project / "plugin.yaml").write_text(yaml.safe_dump(body))
    shutil.copytree(whole[1] / "work", tmp_path / "work")
    with pytest.raises(ExecutionException, match=r"the student is refused:.*faithful"):
        _in_process(mlflow_server, project, tmp_path, **QUICK, **{"registry.model_name": "loose"})
    (above, *_), _ = _runs(mlflow_server, "loose")
    assert above.info.status == "FAILED"
    assert "refused" in above.data.tags["kdguard.error"]
    assert above.data.tags["kdguard.decision"] == "refuse"
    client = mlflow.MlflowClient(mlflow_server.uri)
    assert client.get_registered_model("loose").aliases == {}


def _in_process(
    server: MlflowServer, project: Path, folder: Path, /, config: Any = None, **given: str
) -> str:
    """The backend as MLflow calls it, without a command line; the run's id."""
    client = mlflow.MlflowClient(server.uri)
    found = client.get_experiment_by_name(project.name)
    experiment = found.experiment_id if found else client.create_experiment(project.name)
    settings = {"work_dir": str(folder / "work"), **(config or {})}
    done = build().run(str(project), "main", given, None, settings, server.uri, experiment)
    assert done.wait() is True
    return str(done.run_id)


def test_a_stage_that_closes_its_run_and_fails(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    """Its run is FINISHED by then: it ends FAILED, and so does the project; later it goes on."""
    later = _own("later", "python -c 'print(\"later\")'")
    project = _project(tmp_path / "failing", [MADE, later])
    argv = _command(project, tmp_path, {}, **{"make.code": "7"})
    done = _mlflow_run(mlflow_server, argv, expect=1)
    assert "the stage make failed: it ended with exit code 7" in done.stderr
    assert "Traceback" not in done.stderr
    above, nested = _runs(mlflow_server, "failing")
    assert _statuses(above) == {"failing": "FAILED"}
    assert _statuses(nested) == {"make": "FAILED"}
    run_id = _in_process(mlflow_server, project, tmp_path)
    assert run_id == above[0].info.run_id
    above, nested = _runs(mlflow_server, "failing")
    assert _statuses(above) == {"failing": "FINISHED"}
    assert [run.info.status for run in nested] == ["FAILED", "FINISHED", "FINISHED"]
    assert _in_process(mlflow_server, project, tmp_path) != run_id, "a finished run stays as it is"


def _wait_for(path: Path, text: str, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and text in path.read_text(errors="replace"):
            return
        time.sleep(0.1)
    process.kill()
    out, err = process.communicate()
    raise AssertionError(f"{text!r} was never said:\n{out}\n{err}")


def _stopped(server: MlflowServer, argv: list[str], log: Path, text: str, number: int) -> str:
    """Start, wait until `log` says `text`, send the signal, and hear the end."""
    process = subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(server),
        start_new_session=True,
    )
    _wait_for(log, text, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1, said
    return said


def test_ctrl_c_leaves_no_orphan_and_a_run_that_goes_on(
    mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    project = _project(tmp_path / "stopped", STAGES[: STAGES.index("export")])
    work = tmp_path / "work"
    given = QUICK | {"distill.epochs": "2000"}
    argv = _command(project, tmp_path, {}, **given)
    _stopped(mlflow_server, argv, work / "logs" / "distill.log", "student ", signal.SIGINT)
    assert _alive(work) == []
    above, nested = _runs(mlflow_server, "stopped")
    assert _statuses(above) == {"stopped": "KILLED"}
    assert _statuses(nested)["distill"] == "KILLED"
    assert "RUNNING" not in _statuses(nested).values()
    run_id = _in_process(mlflow_server, project, tmp_path, **QUICK)
    assert run_id == above[0].info.run_id
    above, nested = _runs(mlflow_server, "stopped")
    assert _statuses(above) == {"stopped": "FINISHED"}
    assert [run.info.run_name for run in nested].count("detox") == 1, "finished work was repeated"


def test_sigterm_ends_a_projects_own_command(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    code = "import subprocess, sys, time; print('started', flush=True); "
    code += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    project = _project(tmp_path / "long", [_own("wait", f'python -c "{code}"')])
    argv = _command(project, tmp_path, {"grace_seconds": 6})
    work = tmp_path / "work"
    said = _stopped(mlflow_server, argv, work / "logs" / "wait.log", "started", signal.SIGTERM)
    assert "stopped by SIGTERM; run it again to go on" in said
    assert _alive(work) == []
    above, nested = _runs(mlflow_server, "long")
    assert _statuses(above + nested) == {"long": "KILLED", "wait": "KILLED"}
    assert json.loads((work / "project.json").read_text())["status"] == "KILLED"


HOG = """
import time

def forever(shape, classes):
    print("never ending", flush=True)
    while True:
        time.sleep(1)

def hungry(shape, classes):
    import torch
    return [torch.ones(1 << 30) for _ in range(25)]  # 100 GiB
"""


@pytest.mark.parametrize(
    ("factory", "limits", "why"),
    [
        ("forever", {"seconds": 20}, r"loads the teacher.*20 s, its limit of wall time"),
        ("hungry", {"memory_mib": 1500}, r"loads the teacher.*1500 MiB, its limit of memory"),
    ],
)
def test_a_teacher_out_of_bounds_is_stopped(
    mlflow_server: MlflowServer, tmp_path: Path, factory: str, limits: dict[str, int], why: str
) -> None:
    from mlflow_kdguard.nets import load

    project = _project(tmp_path / f"hog-{factory}", ["register-teacher"])
    (project / "hog.py").write_text(HOG)
    load.save(toys.cnn(), project)
    given = {"teacher.model": "weights.safetensors", "teacher.arch": f"hog:{factory}"}
    given |= {"teacher.mean": "[0.5]", "teacher.std": "[0.5]"}
    (project / "architecture.json").unlink()
    config = {"teacher": limits, "trust_code": True}
    with pytest.raises(ExecutionException, match=why):
        _in_process(mlflow_server, project, tmp_path, config=config, **given)
    assert _alive(tmp_path / "work") == []
    above, nested = _runs(mlflow_server, project.name)
    assert {run.info.status for run in above} == {"FAILED"}
    assert "RUNNING" not in _statuses(nested).values()


def test_what_cannot_start_says_so_before_any_run(
    mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    project = _project(tmp_path / "never", ["audit"])
    for given, why in (({"audit.step": "3"}, r"audit\.steps"), ({"audit.steps": "x"}, "type int")):
        with pytest.raises(ExecutionException, match=why):
            _in_process(mlflow_server, project, tmp_path, **given)
    with pytest.raises(ExecutionException, match="workdir: unknown key"):
        _in_process(mlflow_server, project, tmp_path, config={"workdir": "x"})
    above, nested = _runs(mlflow_server, "never")
    assert above == nested == []


def test_one_folder_one_mlflow_run_at_a_time(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    from mlflow_kdguard.plugin.backend.parent import alone

    project = _project(tmp_path / "twice", [_own("one", "python -c pass")])
    with alone(tmp_path / "work"), pytest.raises(ExecutionException, match="another `mlflow run`"):
        _in_process(mlflow_server, project, tmp_path)
    assert [path.name for path in (tmp_path / "work").iterdir()] == [".project.lock"]
