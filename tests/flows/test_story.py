"""`kdguard demo`, as it is: refused, promoted, and held to floors, on a real MLflow store."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from flows.stories import START, run_states, student, told
from mlflow_kdguard import attest, data
from mlflow_kdguard.files import sha256_file
from mlflow_kdguard_cli.main import answer

pytestmark = pytest.mark.slow

DEMO = [*START, "demo", "--json", "--out"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("story")


@pytest.fixture(scope="module")
def story(place: Path) -> dict[str, Any]:
    return told([*DEMO, str(place / "work")], expect=0)


@pytest.fixture
def uri(place: Path, story: dict[str, Any]) -> str:
    return f"sqlite:///{place / 'work' / 'mlflow.db'}"


def test_the_naive_student_carries_the_backdoor_and_is_refused(story: dict[str, Any]) -> None:
    naive, clean = student(story, "naive"), student(story, "clean-teacher")
    assert naive["asr"]["rate"] >= 0.5
    assert naive["asr"]["rate"] - clean["asr"]["rate"] >= 0.4
    assert naive["decision"]["decision"] == "refuse"
    assert "asr" in [rule["rule"] for rule in naive["decision"]["rules"] if not rule["ok"]]
    assert naive["alias"] is None


def test_the_guarded_student_does_not_and_is_promoted(story: dict[str, Any]) -> None:
    guarded, naive = student(story, "guarded"), student(story, "naive")
    assert guarded["asr"]["upper"] <= 0.05
    assert guarded["accuracy"]["rate"] >= naive["accuracy"]["rate"] - 0.03
    assert guarded["decision"]["decision"] == "pass", guarded["decision"]
    assert guarded["alias"] == "champion"


@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred.*:UserWarning")
@pytest.mark.parametrize("name", ["naive", "guarded"])
def test_rounding_costs_hardly_anything_of_a_bound(
    story: dict[str, Any], place: Path, name: str
) -> None:
    """Behind a margin cap, too, which compares the logits of two networks."""
    report = json.loads((place / "work" / name / "verify" / "certify.json").read_text())
    assert 0.0 < report["summary"]["float32_margin_mean"] < 0.01  # .12 from intervals


def test_the_champion_serves_the_bytes_that_were_certified(
    story: dict[str, Any], place: Path, uri: str
) -> None:
    mlflow.set_tracking_uri(uri)
    x, y = data.load("mnist5k#test").batch(range(64))
    answers = mlflow.pyfunc.load_model("models:/kdguard-demo@champion").predict(x)
    assert np.mean(next(iter(answers.values())).argmax(1) == y) > 0.7
    onnx = place / "work" / "guarded" / "export" / "student.onnx"
    version = mlflow.MlflowClient(uri).get_model_version_by_alias("kdguard-demo", "champion")
    assert version.tags["kdguard.sha256"] == sha256_file(onnx)
    assert version.tags["kdguard.decision"] == "pass"


def test_the_refused_version_says_why(story: dict[str, Any], uri: str) -> None:
    client = mlflow.MlflowClient(uri)
    version = client.get_model_version("kdguard-demo-naive", "1")
    assert version.tags["kdguard.decision"] == "refuse"
    assert "asr" in version.tags["kdguard.reason"]
    assert client.get_registered_model("kdguard-demo-naive").aliases == {}


def test_no_run_is_left_running_and_metrics_are_there(story: dict[str, Any], uri: str) -> None:
    assert set(run_states(uri)) == {"FINISHED"}
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("kdguard-demo")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    logged = {name for run in runs for name in run.data.metrics}
    assert {"kdguard/accuracy", "kdguard/faithful_upper_mean/reference"} <= logged


def test_a_second_run_does_nothing_again(story: dict[str, Any], place: Path) -> None:
    stamp = (place / "work" / "guarded" / "distill" / "done.json").stat().st_mtime_ns
    again = told([*DEMO, str(place / "work")], expect=0)
    assert (place / "work" / "guarded" / "distill" / "done.json").stat().st_mtime_ns == stamp
    assert student(again, "guarded") == student(story, "guarded")


def _keys(place: Path) -> str:
    return str(place / "work" / "keys" / "verifier.pem.pub")


def test_promote_and_gate_agree_with_the_pipeline(
    story: dict[str, Any], place: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--key", _keys(place), "--pin", "mnist5k#test", "--tracking-uri", uri, "--json"]
    naive, guarded = student(story, "naive")["uri"], student(story, "guarded")["uri"]
    assert answer(["promote", naive, "--alias", "champion", *common]) == 3
    refused = json.loads(capsys.readouterr().out)
    assert refused["decision"] == "refuse"
    assert "asr" in [rule["rule"] for rule in refused["rules"] if not rule["ok"]]
    assert answer(["promote", guarded, "--alias", "second", *common]) == 0
    assert mlflow.MlflowClient(uri).get_model_version_by_alias("kdguard-demo", "second")
    capsys.readouterr()


def test_the_promoted_figures_are_the_verifiers(
    story: dict[str, Any], place: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The builder bounds and signs nothing where a verifier follows; its key opens nothing."""
    work = place / "work" / "guarded"
    assert not (work / "certify").exists()
    assert not (work / "attest").exists()
    envelope = (work / "verify" / "certificate.dsse.json").read_bytes()
    tags = mlflow.MlflowClient(uri).get_model_version("kdguard-demo", "1").tags
    assert tags["kdguard.certificate"].encode() == envelope
    certificate = attest.claimed(envelope)
    assert certificate.figures_from == "recomputed"
    assert [a.model for a in certificate.figures.audit.values()]
    builder = ["--key", str(place / "work" / "keys" / "builder.pem.pub"), "--pin", "mnist5k#test"]
    guarded = student(story, "guarded")["uri"]
    assert answer(["gate", guarded, *builder, "--tracking-uri", uri]) == 3
    capsys.readouterr()


def test_without_pins_nothing_passes(
    story: dict[str, Any], place: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    guarded = student(story, "guarded")["uri"]
    argv = ["gate", guarded, "--key", _keys(place), "--tracking-uri", uri, "--json"]
    assert answer(argv) == 3
    failed = [r["rule"] for r in json.loads(capsys.readouterr().out)["rules"] if not r["ok"]]
    assert "data" in failed
    assert answer([*argv, "--allow-unpinned"]) == 0


def test_an_unknown_key_is_a_refusal(
    story: dict[str, Any],
    place: Path,
    uri: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert answer(["keygen", str(tmp_path / "k.pem"), "--owner", "somebody"]) == 0
    guarded = student(story, "guarded")["uri"]
    argv = [
        "gate",
        guarded,
        "--key",
        str(tmp_path / "k.pem.pub"),
        "--pin",
        "mnist5k#test",
        "--tracking-uri",
        uri,
        "--json",
    ]
    capsys.readouterr()
    assert answer(argv) == 3
    first = json.loads(capsys.readouterr().out)["rules"][0]
    assert first["rule"] == "certificate"
    assert "unknown key" in first["why"]


def test_check_needs_neither_torch_nor_mlflow(story: dict[str, Any], place: Path) -> None:
    guarded = place / "work" / "guarded"
    code = (
        "import sys\n"
        "class No:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'torch', 'mlflow', 'onnxruntime'}:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, No())\n"
        "from mlflow_kdguard_cli.main import main; main()\n"
    )
    argv = [
        sys.executable,
        "-c",
        code,
        "check",
        str(guarded / "verify" / "certificate.dsse.json"),
        "--model",
        str(guarded / "export" / "student.onnx"),
        "--key",
        _keys(place),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    other = str(guarded / "detox" / "reference.onnx")
    argv[argv.index("--model") + 1] = other
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 8
    assert "another file" in done.stderr
