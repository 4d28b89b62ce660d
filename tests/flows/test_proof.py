"""`kdguard certify --proofs`, `attest`, `check --recompute`: by an auditor who has no torch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toys
from mlflow_kdguard.proof import container
from mlflow_kdguard.proof.folder import INDEX
from mlflow_kdguard_cli.main import answer

ROOT = Path(__file__).parents[2]
CERTIFICATE = 8
WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "mlflow", "onnxruntime", "highspy", "gurobipy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from mlflow_kdguard_cli.main import main
main()
"""


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two networks, data, proofs and a certificate."""
    folder = tmp_path_factory.mktemp("audited")
    (folder / "reference.onnx").write_bytes(toys.onnx_tiny(seed=1))
    (folder / "student.onnx").write_bytes(toys.onnx_tiny(seed=2))
    draw = np.random.default_rng(0)
    x = draw.random((12, 1, 2, 2)).astype(np.float32)
    np.savez(folder / "data.npz", x=x, y=draw.integers(0, 3, 12))
    certified(folder, "--method", "branch", "--nodes", "20")
    assert answer(["keygen", str(folder / "key.pem"), "--owner", "Vic"]) == 0
    attested(folder)
    return folder


def certified(folder: Path, *more: str) -> None:
    argv = [
        "certify", "--teacher", str(folder / "reference.onnx"),
        "--student", str(folder / "student.onnx"), "--data", f"npz:{folder / 'data.npz'}",
        "--eps", "0.05", "--samples", "6", "--restarts", "1", "--steps", "5", "--delta", "0.9",
        "--device", "cpu", "--proofs", str(folder / "proofs"), "--json", *more,
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, (folder / "certify.json").open("w") as out:
        patch.setattr(sys, "stdout", out)
        assert answer(argv) == 0


def attested(folder: Path, document: str = "certify.json", out: str = "c.json") -> None:
    reference = str(folder / "reference.onnx")
    argv = [
        "attest", str(folder / "student.onnx"), "--teacher", reference, "--reference", reference,
        "--certify", str(folder / document), "--model-name", "m", "--key", str(folder / "key.pem"),
        "--out", str(folder / out),
    ]  # fmt: skip
    assert answer(argv) == 0


def checking(folder: Path, *more: str) -> list[str]:
    return [
        "check", str(folder / "c.json"), "--model", str(folder / "student.onnx"),
        "--key", str(folder / "key.pem.pub"), "--recompute",
        "--reference", str(folder / "reference.onnx"), *more,
    ]  # fmt: skip


@pytest.fixture
def copied(audited: Path, tmp_path: Path) -> Path:
    """The folder again, to be spoilt; its data are named by the certificate where they were."""
    return Path(shutil.copytree(audited, tmp_path / "copy"))


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    capsys.readouterr()
    assert answer(checking(folder, *more)) == CERTIFICATE
    return " ".join(capsys.readouterr().err.split())


def test_the_bounds_follow_without_torch(audited: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *checking(audited, "--json")],
        env={k: v for k, v in os.environ.items() if not k.startswith("COV")}
        | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "cli")))},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    report = json.loads((audited / "certify.json").read_text())
    assert found["recomputed"]["images"] == len(report["samples"]) == 6
    assert found["recomputed"]["upper_mean"] == pytest.approx(report["summary"]["upper_mean"])


def test_a_missing_proof_is_named(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = min((copied / "proofs").glob("*.kdproof"))
    gone.unlink()
    assert gone.name in refusal(copied, capsys)


@pytest.mark.parametrize("name", ["proof", "index"])
def test_an_empty_file_is_no_proof(
    copied: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    emptied = {
        "proof": min((copied / "proofs").glob("*.kdproof")), "index": copied / "proofs/proofs.json",
    }[name]  # fmt: skip
    emptied.write_bytes(b"")
    assert f"{emptied.name} is empty" in refusal(copied, capsys)


def test_missing_proofs_are_named(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copied / "proofs")
    assert INDEX in refusal(copied, capsys)


def test_an_altered_proof_is_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = min((copied / "proofs").glob("*.kdproof"))
    header, arrays = container.unpack(file.read_bytes())
    file.write_bytes(container.pack({**header, "upper": 0.0}, arrays))
    assert "another proof than the certified one" in refusal(copied, capsys)


def test_an_altered_index_is_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = copied / "proofs" / INDEX
    index.write_bytes(index.read_bytes().replace(b'"eps":0.05', b'"eps":0.06'))
    assert "another index" in refusal(copied, capsys)


def test_another_reference_is_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "reference.onnx").write_bytes(toys.onnx_tiny(seed=3))
    assert "the reference has the SHA-256" in refusal(copied, capsys)


def test_other_data_are_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.zeros((12, 1, 2, 2), dtype=np.float32)
    np.savez(copied / "other.npz", x=x, y=np.zeros(12, dtype=np.int64))
    said = refusal(copied, capsys, "--data", f"npz:{copied / 'other.npz'}")
    assert "the data has the SHA-256" in said


@pytest.mark.parametrize("figure", ["mean", "share"])
def test_figures_that_do_not_follow_are_refused(
    copied: Path, capsys: pytest.CaptureFixture[str], figure: str
) -> None:
    """The signature holds; what was signed is not what the proofs show."""
    report = json.loads((copied / "certify.json").read_text())
    if figure == "mean":
        report["summary"]["upper_mean"] /= 2
    else:
        for sample in report["samples"]:
            sample["status"] = "PROVED"
        report["samples"][0]["status"] = "UNDECIDED"
        if sum(s["status"] == "PROVED" for s in report["samples"]) == _proved(copied):
            report["samples"][1]["status"] = "UNDECIDED"
    (copied / "false.json").write_text(json.dumps(report))
    attested(copied, "false.json")
    assert "its proofs show" in refusal(copied, capsys)


def _proved(folder: Path) -> int:
    report = json.loads((folder / "certify.json").read_text())
    return sum(sample["status"] == "PROVED" for sample in report["samples"])


def test_a_certificate_without_proofs_says_so(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads((copied / "certify.json").read_text())
    del report["proofs"]
    (copied / "bare.json").write_text(json.dumps(report))
    attested(copied, "bare.json")
    assert "names no proofs" in refusal(copied, capsys)


def test_interval_bounds_have_no_proofs(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "certify", "--teacher", str(copied / "reference.onnx"),
        "--student", str(copied / "student.onnx"), "--data", f"npz:{copied / 'data.npz'}",
        "--eps", "0.05", "--method", "interval", "--proofs", str(copied / "new"),
    ]  # fmt: skip
    assert answer(argv) == 2
    assert "have no proofs" in capsys.readouterr().err
    argv[argv.index("interval")] = "crown"
    argv[-1] = str(copied / "proofs")
    assert answer(argv) == 2
    assert "another certification" in " ".join(capsys.readouterr().err.split())
