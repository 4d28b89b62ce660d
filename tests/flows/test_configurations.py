"""`kdguard run` as users configure it: variants, odd paths, what MLflow is told, and resuming."""

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

import toys
from mlflow_kdguard import data
from mlflow_kdguard.errors import REFUSED
from mlflow_kdguard.files import sha256_file
from mlflow_kdguard.redteam import badnets
from mlflow_kdguard_cli.main import answer

CONFIG: dict[str, Any] = {
    "run": {"device": "cpu"},
    "data": {
        "transfer": "digits#train[:200]",
        "clean": "npz:clean set.npz",
        "test": "digits#test[:100]",
    },
    "teacher": {"model": "teacher.onnx"},
    "audit": {"steps": 2, "radius": 1.0},
    "detox": {"mask_steps": 3, "unlearn_steps": 3, "max_drop": 1.0},
    "distill": {"arch": "mlp:8", "epochs": 1, "pgd_steps": 1, "augment": "none"},
    "certify": {"samples": 3, "pgd_steps": 2, "restarts": 1},
    "registry": {"experiment": "own", "model_name": "own"},
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: configuration, teacher, clean images and a trigger, named as people do."""
    folder = tmp_path / "my project: #1"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "teacher.onnx").write_bytes(toys.onnx_tiny(shape=(1, 8, 8), classes=10))
    data.save(data.load("digits#train[1000:1100]"), folder / "clean set.npz")
    badnets.trigger((1, 8, 8), size=2).save(folder / "patch.kdt")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'own.db'}")
    (folder / "guard.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def _run(*more: str) -> int:
    return answer(["run", "-c", "guard.yaml", "--out", "work: #2", "--json", *more])


def _runs(folder: Path) -> tuple[mlflow.MlflowClient, list[mlflow.entities.Run]]:
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'own.db'}")
    experiment = client.get_experiment_by_name("own")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], max_results=1000)
    return client, [run for run in found if run.data.tags["kdguard.stage"] == "pipeline"]


def _verdicts(document: dict[str, Any]) -> list[tuple[str, bool]]:
    return [(rule["rule"], rule["ok"]) for rule in document["decision"]["rules"]]


def test_the_run_shows_configuration_data_figures_and_lineage(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("--set", "teacher.name=their-teacher; measure.triggers=[patch.kdt:3]") == REFUSED
    said = json.loads(capsys.readouterr().out)
    client, (run,) = _runs(place)
    assert said["run"] == run.info.run_id
    assert run.data.params["distill.arch"] == "mlp:8"
    assert run.data.params["measure.triggers"] == "['patch.kdt:3']"
    assert {"kdguard/accuracy", "kdguard/asr/badnets/3"} <= set(run.data.metrics)
    assert "kdguard/faithful_upper_mean/reference" in run.data.metrics
    assert run.inputs is not None
    assert {item.tags[0].value for item in run.inputs.dataset_inputs} == {
        "transfer",
        "clean",
        "test",
    }
    teacher = sha256_file(place / "work: #2" / "teacher" / "teacher.onnx")
    assert run.data.tags["kdguard.teacher"] == teacher
    stored = client.get_model_version("their-teacher", "1")
    assert stored.tags["kdguard.sha256"] == teacher
    assert stored.tags["kdguard.source"] == "teacher.onnx"
    assert client.get_model_version("own", "1").tags["kdguard.teacher"] == teacher
    names = [file.path for file in client.list_artifacts(run.info.run_id)]
    assert "config.json" in names
    assert run.info.artifact_uri.startswith(str(place / "mlartifacts"))


def test_patches_are_a_stage_and_a_rule_where_they_are_asked_for(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "strict.yaml").write_text(
        "policy: {patch: {targets: [3], size: 2, positions: [[6, 6]], upper_at_most: 0.001}}"
    )
    asked = "patch.targets=[0, 3]; patch.size=2; patch.samples=5; patch.nodes=5; patch.pgd_steps=2"
    assert _run("--set", asked, "--policy", "strict.yaml", "--allow-unpinned") == REFUSED
    said = json.loads(capsys.readouterr().out)
    rule = next(rule for rule in said["decision"]["rules"] if rule["rule"] == "patch")
    assert not rule["ok"]
    assert "towards class 3 may flip" in rule["why"]
    assert "5 images were drawn" in rule["why"]
    assert "draw gives" not in rule["why"]
    client, (run,) = _runs(place)
    assert {"kdguard/patch_asr_upper/2/0", "kdguard/patch_asr_upper/2/3"} <= set(run.data.metrics)
    folder = place / "work: #2" / "certify-patch"
    report = json.loads((folder / "patch-3.json").read_text())
    assert rule["figure"] >= report["each"]["rate"]
    done = (folder / "done.json").stat().st_mtime_ns
    assert _run("--set", asked, "--policy", "strict.yaml", "--allow-unpinned") == REFUSED
    assert (folder / "done.json").stat().st_mtime_ns == done
    assert client.get_model_version("own", "1").tags["kdguard.certificate"]


def test_a_smoothed_pair_is_a_stage_and_one_way_to_be_faithful(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rule names the smoothed option's shortcomings, and nothing about its draw."""
    (place / "smoothed.yaml").write_text(
        "policy: {faithful: {any_of: [{method: smoothed, norm: l2, sigma: 0.25, radius: 0.25,"
        " delta: 0.3, share_lower_at_least: 0.8, samples_at_least: 100}]}}"
    )
    asked = "smooth.sigma=0.25; smooth.samples=12; smooth.draws=60"
    more = ("--policy", "smoothed.yaml", "--allow-unpinned")
    assert _run("--set", asked, *more) == REFUSED
    said = json.loads(capsys.readouterr().out)
    rule = next(rule for rule in said["decision"]["rules"] if rule["rule"] == "faithful")
    assert not rule["ok"]
    assert "12 images were drawn" in rule["why"]
    for absent in ("draw gives", "there is no smoothed", "by chance", "another", "nonce"):
        assert absent not in rule["why"]
    client, (run,) = _runs(place)
    assert "kdguard/smoothed_share_within/0.25/0.25" in run.data.metrics
    folder = place / "work: #2" / "certify-smooth"
    report = json.loads((folder / "smooth.json").read_text())
    assert len(report["samples"]) == 12
    done = (folder / "done.json").stat().st_mtime_ns
    assert _run("--set", asked, *more) == REFUSED
    assert (folder / "done.json").stat().st_mtime_ns == done
    assert client.get_model_version("own", "1").tags["kdguard.certificate"]
    capsys.readouterr()
    assert _run("--set", asked.replace("sigma=0.25", "sigma=0.5"), *more) == REFUSED
    said = json.loads(capsys.readouterr().out)
    rule = next(rule for rule in said["decision"]["rules"] if rule["rule"] == "faithful")
    assert "smoothed with sigma 0.5, not 0.25" in rule["why"]


def test_without_targets_there_is_no_such_stage(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run() == REFUSED
    said = json.loads(capsys.readouterr().out)
    assert not (place / "work: #2" / "certify-patch").exists()
    assert not (place / "work: #2" / "certify-smooth").exists()
    assert ("patch", True) in _verdicts(said)


def test_resumed_from_another_folder_with_relative_paths(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("--set", "measure.triggers=[patch.kdt:3]") == REFUSED
    first = json.loads(capsys.readouterr().out)
    done = place / "work: #2" / "distill" / "done.json"
    before = done.stat().st_mtime_ns
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert answer(["run", "--resume", first["run"], "--json"]) == REFUSED
    again = json.loads(capsys.readouterr().out)
    assert _verdicts(again) == _verdicts(first)
    assert again["uri"] == first["uri"]
    assert done.stat().st_mtime_ns == before
    # That finished run's folder belongs to the newer run by now.
    assert answer(["run", "--resume", first["run"]]) == 2
    assert "by now" in capsys.readouterr().err


def test_what_is_gone_from_the_registry_is_registered_again(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run() == REFUSED
    client, _ = _runs(place)
    client.delete_model_version("own", "1")
    capsys.readouterr()
    assert _run() == REFUSED
    assert json.loads(capsys.readouterr().out)["uri"] == "models:/own/2"
    assert client.get_model_version("own", "2").tags["kdguard.certificate"]


def test_a_run_that_the_server_does_not_know_is_begun_anew(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = place / "work: #2" / "run.json"
    state.parent.mkdir()
    state.write_text(json.dumps({"run_id": "0" * 32, "parent": None, "status": "RUNNING"}))
    assert _run() == REFUSED
    assert json.loads(capsys.readouterr().out)["run"] != "0" * 32


@pytest.mark.parametrize(
    "changes",
    [
        "detox.chain=[variance_mask]; audit.detectors=[variance]",
        "detox.chain=[margin_cap]; distill.loss=sd; distill.amp=bfloat16; data.labelled=true",
        "detox.chain=[unlearn, margin_cap]; detox.suspects=[3, 5]; distill.channels_last=true",
        "audit.detectors=[profile]; audit.shadows=2; audit.shadow_loop.epochs=1; audit.lead=99; "
        "detox.chain=[unlearn, margin_swap]; detox.unflagged=none; detox.unlearn_radius=auto",
        "detox.chain=[unlearn, margin_swap]; detox.suspects=all",
    ],
    ids=["mask alone", "cap alone", "two suspects", "nobody is suspect", "everybody is suspect"],
)
def test_variants(place: Path, changes: str) -> None:
    assert _run("--set", changes) == REFUSED


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ("teacher.model=nowhere.onnx", "nowhere.onnx"),
        ("teacher.model=.", "cannot read the teacher"),
        ("measure.triggers=['patch.kdt:33']", "target 33"),
        ("measure.triggers=['patch.kdt:²']", "patch.kdt:²"),
        ("teacher.arch=mlp:8; teacher.mean=[0.1, 0.2]", "mean and std"),
        ("detox.layers=[]", "detox.layers"),
        ("teacher.mean=[0.1]; teacher.std=[0.1]", "teacher.arch"),
    ],
)
def test_what_cannot_be_meant_is_said(
    place: Path, changes: str, names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("--set", changes) == 2
    assert names in json.loads(capsys.readouterr().out)["error"]


def test_a_users_folder_is_never_cleared(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = place / "teacher" / "weights.safetensors"
    own.parent.mkdir()
    own.write_bytes(b"months of training")
    assert answer(["run", "-c", "guard.yaml", "--out", ".", "--json"]) == 2
    assert own.read_bytes() == b"months of training"
    assert "in the way" in capsys.readouterr().out
