"""`mlflow run .` with a local environment, on servers on loopback."""

import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import yaml

import toys
from flows.servers import MlflowServer
from flows.stories import ROOT, environment, run_states
from mlflow_kdguard import policy

pytestmark = pytest.mark.slow

QUICK = (
    "redteam.clean_loop.epochs=4; redteam.poison_loop.epochs=3; distill.epochs=4; "
    "detox.mask_steps=20; detox.unlearn_steps=30; certify.samples=20; certify.pgd_steps=10"
)


def _mlflow_run(server: MlflowServer, entry: str, folder: Path, **parameters: str) -> str:
    argv = [
        *(sys.executable, "-m", "mlflow", "run", str(ROOT), "-e", entry),
        *("--env-manager", "local", "--experiment-name", f"project-{entry}"),
    ]
    for key, value in parameters.items():
        argv += ["-P", f"{key}={value}"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = environment() | {"MLFLOW_TRACKING_URI": server.uri, "PATH": path}
    done = subprocess.run(
        argv, capture_output=True, text=True, cwd=folder, check=False, env=settings
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


def _lenient(folder: Path) -> str:
    """An operator's own policy, which so short a training on so few images can meet."""
    body = policy.load(None).model_dump(mode="json")
    body["accuracy"] = {"drop_upper_at_most": 1.0}
    body["asr"]["upper_at_most"] = 1.0
    body["reference"]["gap_mean_at_most"] = 1.0
    body["faithful"] = None
    body["export"] = None
    body["certificate"]["figures_from"] = "any"  # nobody verifies here
    (folder / "policy.yaml").write_text(yaml.safe_dump({"policy": body}))
    return str(folder / "policy.yaml")


@pytest.mark.parametrize(
    "name", ["mlflow_server", pytest.param("postgres_server", marks=pytest.mark.postgres)]
)
def test_guard_and_audit(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    server: MlflowServer = request.getfixturevalue(name)
    model = tmp_path / "model.onnx"
    model.write_bytes(toys.onnx_tiny(shape=(1, 8, 8), classes=10))
    _mlflow_run(server, "audit", tmp_path, model=str(model), data="digits#train[:100]")
    _mlflow_run(
        server,
        "guard",
        tmp_path,
        config="examples/digits.yaml",
        set=QUICK,
        out=str(tmp_path / "work"),
        policy=_lenient(tmp_path),
        model_name=f"from-{name}",
    )
    client = mlflow.MlflowClient(server.uri)
    assert client.get_model_version_by_alias(f"from-{name}", "champion").version == "1"
    assert client.get_model_version(f"from-{name}-naive", "1")
    states = run_states(server.uri, "project-audit", "project-guard")
    assert set(states) == {"FINISHED"}, states
