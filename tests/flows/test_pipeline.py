"""The pipeline in this process, on real digits and a real store, with little training."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

from flows.stories import DIGITS, run_states, student
from mlflow_kdguard.data import load
from mlflow_kdguard.errors import REFUSED
from mlflow_kdguard.files import sha256_file
from mlflow_kdguard.records.gather import figures_of
from mlflow_kdguard_cli.main import answer

QUICK = (
    "redteam.clean_loop.epochs=5; redteam.poison_loop.epochs=4; distill.epochs=4; "
    "detox.mask_steps=20; detox.unlearn_steps=30; certify.samples=12; certify.pgd_steps=8; "
    "certify.restarts=2"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


def _uri(place: Path) -> str:
    return f"sqlite:///{place / 'mlflow.db'}"


def _run(place: Path, *more: str) -> int:
    out, uri = str(place / "work"), _uri(place)
    argv = ["run", "-c", str(DIGITS), "--out", out, "--tracking-uri", uri, "--set", QUICK]
    return answer([*argv, "--device", "cpu", "--json", *more])


@pytest.fixture(scope="module")
def story(place: Path) -> dict[str, Any]:
    """A story that was told once; digits are too few for the default policy."""
    assert _run(place) == REFUSED
    document: dict[str, Any] = json.loads((place / "work" / "story.json").read_text())
    return document


def test_four_students_and_both_decisions(story: dict[str, Any]) -> None:
    names = [row["student"] for row in story["students"]]
    assert names == ["naive", "guarded", "clean-teacher", "no-teacher"]
    for name in ("naive", "guarded"):
        decision = student(story, name)["decision"]
        assert decision["decision"] == "refuse"
        assert "export" in [rule["rule"] for rule in decision["rules"] if not rule["ok"]]
        assert all(rule["why"] for rule in decision["rules"])


def test_every_stage_left_its_files_and_a_finished_run(story: dict[str, Any], place: Path) -> None:
    guarded = place / "work" / "guarded"
    for file in (
        "teacher/teacher.onnx",
        "audit/audit.json",
        "detox/reference.onnx",
        "distill/weights.safetensors",
        "export/student.onnx",
        "audit-student/audit-student.json",
        "measure/measure.json",
        "certify/certify.json",
        "attest/certificate.dsse.json",
        "decision.json",
    ):
        assert (guarded / file).is_file(), file
    assert set(run_states(_uri(place))) == {"FINISHED"}
    client = mlflow.MlflowClient(_uri(place))
    experiment = client.get_experiment_by_name("kdguard-digits")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    stages = {run.data.tags.get("kdguard.stage") for run in runs}
    assert {
        "redteam",
        "teacher",
        "audit",
        "detox",
        "distill",
        "export",
        "register",
        "audit-student",
        "measure",
        "certify",
        "attest",
        "gate",
    } <= stages
    metrics = {name for run in runs for name in run.data.metrics}
    assert {"kdguard/accuracy", "kdguard/faithful_upper_mean/reference"} <= metrics
    assert any(name.startswith("kdguard/asr_upper/") for name in metrics)
    assert any(name.startswith("kdguard/feature_variance/") for name in metrics)


def test_the_registered_bytes_are_the_exported_bytes(story: dict[str, Any], place: Path) -> None:
    version = mlflow.MlflowClient(_uri(place)).get_model_version("kdguard-digits", "1")
    exported = place / "work" / "guarded" / "export" / "student.onnx"
    assert version.tags["kdguard.sha256"] == sha256_file(exported)
    assert version.tags["kdguard.decision"] == "refuse"
    assert version.tags["kdguard.certificate"]


def test_run_again_everything_is_taken_from_the_ledger(
    story: dict[str, Any], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = place / "work" / "guarded" / "distill" / "done.json"
    before = done.stat().st_mtime_ns
    assert _run(place) == REFUSED
    assert done.stat().st_mtime_ns == before
    again = json.loads(capsys.readouterr().out)
    assert student(again, "guarded")["asr"] == student(story, "guarded")["asr"]
    assert student(again, "guarded")["decision"] == student(story, "guarded")["decision"]
    versions = mlflow.MlflowClient(_uri(place)).search_model_versions("name='kdguard-digits'")
    assert [str(version.version) for version in versions] == ["1"]


def test_a_changed_section_runs_again_from_there(
    story: dict[str, Any], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guarded = place / "work" / "guarded"
    before = {
        name: (guarded / name / "done.json").stat().st_mtime_ns
        for name in ("detox", "distill", "certify")
    }
    assert _run(place, "--set", "certify.delta=0.3") == REFUSED
    after = {name: (guarded / name / "done.json").stat().st_mtime_ns for name in before}
    assert after["detox"] == before["detox"]
    assert after["distill"] == before["distill"]
    assert after["certify"] > before["certify"]
    capsys.readouterr()


def _written(argv: Sequence[str], path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command with --json and keep its document in a file."""
    capsys.readouterr()
    assert answer([*argv, "--json"]) == 0
    path.write_text(capsys.readouterr().out)
    return str(path)


def test_single_stages_lead_to_the_same_gate(
    story: dict[str, Any], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every stage by hand, from the poisoned teacher's files to a signed certificate."""
    red, reference = place / "work" / "redteam", place / "work/guarded/detox/reference.onnx"
    teacher, student = tmp_path / "teacher.onnx", tmp_path / "student.onnx"
    test, clean = "digits#test", "digits#train[1000:]"
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.dsse.json"

    def stage(name: str, command: str) -> str:
        return _written(command.split(), tmp_path / f"{name}.json", capsys)

    poisoned = red / "poisoned" / "weights.safetensors"
    stage("t", f"export {poisoned} --data {test} --out {teacher}")
    stage(
        "d",
        f"distill --reference {reference} --data npz:{red / 'transfer.npz'} --clean {clean} "
        f"--student cnn:4,8 --out {tmp_path / 's'} --set distill.epochs=2",
    )
    weights = tmp_path / "s" / "weights.safetensors"
    exported = stage("e", f"export {weights} --data {test} --out {student}")
    measured = stage(
        "m",
        f"measure {student} --data {test} --trigger {red / 'trigger.kdt'}:0 --teacher {teacher} "
        f"--reference {reference}",
    )
    bounds = stage(
        "c",
        f"certify --teacher {reference} --student {student} --data {test} --eps 0.01 --samples 5 "
        "--steps 5",
    )
    first, second = (
        stage(f"a-{model.stem}", f"audit {model} --data {clean} --out {tmp_path / 'found'}")
        for model in (teacher, student)
    )
    assert answer(f"keygen {key} --owner tester".split()) == 0
    signed = stage(
        "x",
        f"attest {student} --teacher {teacher} --reference {reference} --measure {measured} "
        f"--certify {bounds} --audit {first} --audit {second} --export {exported} "
        f"--model-name by-hand --key {key} --out {certificate}",
    )
    figures = json.loads(Path(signed).read_text())["figures"]
    assert set(figures["audit"]) == {"teacher", "student"}
    assert figures["paired"] is not None
    assert figures["faithful"][0]["within"]["n"] == 5
    check = f"check {certificate} --key {key}.pub --model"
    assert answer(f"{check} {student} --name by-hand".split()) == 0
    assert answer(f"{check} {teacher}".split()) == 8
    assert answer(f"{check} {student} --name another".split()) == 8


def test_a_teacher_from_the_registry_is_guarded(
    story: dict[str, Any], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Registered, imported by its models:/ URI, distilled from; the user's own configuration."""
    red = place / "work" / "redteam"
    uri = _uri(place)
    weights = red / "poisoned" / "weights.safetensors"
    command = (
        f"teacher register scraped --weights {weights} --data digits#test --tracking-uri {uri}"
    )
    registered = _written(command.split(), tmp_path / "r.json", capsys)
    named = json.loads(Path(registered).read_text())["uri"]
    config = tmp_path / "guard.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "data": {
                    "transfer": f"npz:{red / 'transfer.npz'}",
                    "clean": "digits#train[1000:]",
                    "test": "digits#test",
                },
                "teacher": {"model": named},
                "distill": {"arch": "cnn:4,8", "epochs": 2},
                "registry": {"model_name": "from-registry", "experiment": "kdguard-digits"},
            }
        )
    )
    quick = QUICK.rsplit("distill", maxsplit=1)[-1].partition(";")[2]
    argv = ["run", "-c", str(config), "--set", quick, "--out", str(tmp_path / "work")]
    argv += ["--tracking-uri", uri, "--pin", "digits#test"]
    assert answer([*argv, "--json"]) == REFUSED
    printed = capsys.readouterr()
    answered = json.loads(printed.out)
    assert answered["uri"] == "models:/from-registry/1"
    assert "certificate.figures_from" in _failed(answered)
    assert "data" not in _failed(answered)
    _told_how_to_verify(printed.err, tmp_path, capsys)
    again = [*argv, "--json", "--verifier-key", str(tmp_path / "verifier.pem")]
    assert answer(again) == REFUSED
    seen = json.loads(capsys.readouterr().out)
    assert seen["uri"] == answered["uri"]
    assert "certificate.figures_from" not in _failed(seen)
    assert (tmp_path / "work" / "verify" / "certificate.dsse.json").is_file()
    resumed = answer(["run", "--resume", seen["run"], "--tracking-uri", uri, "--json"])
    assert resumed == REFUSED
    assert answer(["teacher", "import", named, "--tracking-uri", uri]) == 0


def _failed(document: dict[str, Any]) -> list[str]:
    return [rule["rule"] for rule in document["decision"]["rules"] if not rule["ok"]]


def _told_how_to_verify(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Carry out, word by word, what a refused run says, but with a folder for its key."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("  kdguard ")]
    commands = [
        [
            str(folder / word) if word.startswith("verifier.pem") else word
            for word in shlex.split(line)
        ]
        for line in lines
    ]
    assert [command[1] for command in commands] == ["keygen", "verify", "promote"]
    for command, code in zip(commands, (0, 0, REFUSED), strict=True):
        capsys.readouterr()
        assert answer([*command[1:], "--json"]) == code
    decision = json.loads(capsys.readouterr().out)
    assert "certificate.figures_from" not in _failed({"decision": decision})


def test_figures_left_out_stay_out() -> None:
    empty = figures_of()
    assert empty.accuracy is None
    assert empty.asr == ()
    assert empty.faithful == ()
    assert load("digits#test").classes == 10
