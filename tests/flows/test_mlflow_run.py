"""`mlflow run .` with a local environment, on servers on loopback."""

import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import toys

from flows.servers import MlflowServer
from flows.stories import ROOT, environment, run_states

pytestmark = pytest.mark.slow


def _mlflow_run(server: MlflowServer, entry: str, folder: Path, **parameters: str) -> str:
    argv = [
        sys.executable,
        "-m",
        "mlflow",
        "run",
        str(ROOT),
        "-e",
        entry,
        "--env-manager",
        "local",
        "--experiment-name",
        f"project-{entry}",
    ]
    for key, value in parameters.items():
        argv += ["-P", f"{key}={value}"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
        env=environment() | {"MLFLOW_TRACKING_URI": server.uri, "PATH": path},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "name", ["mlflow_server", pytest.param("postgres_server", marks=pytest.mark.postgres)]
)
def test_guard_and_audit(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    server: MlflowServer = request.getfixturevalue(name)
    quick = (
        "redteam.clean_loop.epochs=4; redteam.poison_loop.epochs=3; distill.epochs=4; "
        "detox.mask_steps=20; detox.unlearn_steps=30; certify.samples=20; certify.pgd_steps=10"
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(toys.onnx_bytes())
    _mlflow_run(server, "audit", tmp_path, model=str(path), data="digits#train[:100]")
    argv = {
        "config": "examples/digits.yaml",
        "set": quick,
        "out": str(tmp_path / "work"),
        "model_name": f"from-{name}",
    }
    try:
        _mlflow_run(server, "guard", tmp_path, **argv)
    except AssertionError as error:
        assert "REFUSED" in str(error), error  # so short a training need not pass the gate
    client = mlflow.MlflowClient(server.uri)
    assert client.get_model_version(f"from-{name}", "1")
    assert client.get_model_version(f"from-{name}-naive", "1")
    assert "RUNNING" not in run_states(server.uri)
