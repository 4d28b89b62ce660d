"""A verifiable teacher and its student through the command line, to a certificate of their gap."""

import json
from pathlib import Path

import pytest

from mlflow_kdguard_cli.main import answer

QUICK = [
    "--set",
    "teach.epochs=6",
    "--set",
    "teach.batch=32",
    "--set",
    "teach.augment=none",
    "--set",
    "teach.pgd_steps=1",
]
SHORT = [
    "--set",
    "distill.epochs=2",
    "--set",
    "distill.augment=none",
    "--set",
    "distill.pgd_steps=1",
]


def _teacher(folder: Path, *more: str) -> int:
    data = ["--data", "digits#train[:300]", "--arch", "mlp:12,10", "--device", "cpu"]
    return answer(["teacher", "train", *data, "--out", str(folder), "--json", *QUICK, *more])


def test_a_teacher_and_a_student_are_trained_for_bounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terms = ("interval=0.1", "stability=0.1", "l1=0.0001", "schedule=cosine", "warm_up=0.1")
    given = [word for term in terms for word in ("--set", f"teach.{term}")]
    assert _teacher(tmp_path / "teacher", *given) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["schema"] == "kdguard.teach/1"
    assert body["figures"]["accuracy"] > 0.3
    weights = str(tmp_path / "teacher" / "weights.safetensors")
    reference = str(tmp_path / "reference.onnx")
    shown = ["--data", "digits#test[:50]"]
    assert answer(["export", weights, *shown, "--out", reference, "--device", "cpu"]) == 0
    argv = ["distill", "--reference", reference, "--data", "digits#train[:200]"]
    argv += ["--clean", "digits#train[200:300]", "--student", "mlp:10,8", "--device", "cpu"]
    for key in ("loss=ard", "stability=0.1", "joint_gap=0.01", "l1=0.0001"):
        argv += ["--set", f"distill.{key}"]
    capsys.readouterr()
    assert answer([*argv, "--out", str(tmp_path / "student"), "--json", *SHORT]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]["gap_bound"] > 0
    weights, student = str(tmp_path / "student" / "weights.safetensors"), str(tmp_path / "s.onnx")
    assert answer(["export", weights, *shown, "--out", student, "--device", "cpu"]) == 0
    capsys.readouterr()
    pair = ["--teacher", reference, "--student", student, "--data", "digits#test", "--eps", "0.02"]
    assert answer(["certify", *pair, "--samples", "5", "--device", "cpu", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    assert 0 < summary["lower_mean"] <= summary["upper_mean"]


@pytest.mark.parametrize(
    ("setting", "code", "message"),
    [
        ("teach.interval=2", 2, "teach.interval"),
        ("teach.ramp=[0.5, 0.1]", 2, "before it begins"),
        ("teach.schedule=weekly", 2, "teach.schedule"),
        ("teach.lr=1e30", 5, "diverged"),
    ],
)
def test_what_cannot_be_trained_is_said(
    setting: str, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _teacher(tmp_path / "teacher", "--set", setting) == code
    assert message in capsys.readouterr().err


def test_a_teacher_needs_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    np.savez(tmp_path / "unlabelled.npz", x=np.zeros((4, 1, 8, 8), np.float32), y=np.full(4, -1))
    argv = ["teacher", "train", "--data", f"npz:{tmp_path / 'unlabelled.npz'}", "--arch", "mlp:4"]
    assert answer([*argv, "--out", str(tmp_path / "teacher"), "--device", "cpu"]) == 2
    assert "without labels" in capsys.readouterr().err
