"""`kdguard certify-patch` on small networks that were really trained, one with a backdoor."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import toys
from mlflow_kdguard import data
from mlflow_kdguard.attest import claimed
from mlflow_kdguard.config import ExportSection
from mlflow_kdguard.export import to_onnx
from mlflow_kdguard.records import PatchReport
from mlflow_kdguard.redteam.badnets import trigger
from mlflow_kdguard_cli.main import answer

CPU = torch.device("cpu")
SQUARE = trigger((1, 8, 8), size=2, row=6, column=6)


def trained(path: Path, *, poisoned: bool) -> Path:
    """An MLP on scikit-learn's digits; poisoned, it sends a white corner to class 0."""
    images = data.load("digits#train")
    x, y = torch.from_numpy(images.x), torch.from_numpy(images.y)
    if poisoned:
        some = torch.arange(0, len(x), 4)
        x = torch.cat((x, torch.from_numpy(SQUARE.apply(images.x[some.numpy()]))))
        y = torch.cat((y, torch.zeros(len(some), dtype=torch.int64)))
    net = toys.net("mlp:24,24", settled=False).train()
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=1e-4)
    for _ in range(120):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    to_onnx(
        net.eval(), path, shape=images.shape, classes=10, images=images.x[:200],
        config=ExportSection(parity_images=200), device=CPU,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    return {
        name: str(trained(folder / f"{name}.onnx", poisoned=name == "poisoned"))
        for name in ("clean", "poisoned")
    }


def asked(model: str, *more: str) -> list[str]:
    return ["certify-patch", model, "--data", "digits#test", "--target", "0", "--size", "2", *more]


def document(model: str, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    assert answer(asked(model, "--samples", "40", "--json", *more)) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert PatchReport.model_validate(found).document() == found
    return found


def test_a_backdoor_is_seen_where_it_is(
    networks: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The poisoned network's corner is wide open, the clean one's hardly, and both are proved."""
    poisoned, clean = (document(networks[name], capsys) for name in ("poisoned", "clean"))
    for found in (poisoned, clean):
        assert (found["each"]["n"], found["places"][0]["position"]) == (40, [6, 6])
        assert found["each"]["certified"] - found["each"]["attack"] <= 1
    assert poisoned["universal"]["attack"] >= 36
    assert clean["each"]["certified"] <= 12
    assert clean["each"]["upper"] > clean["each"]["rate"]


def test_several_positions_and_a_picture(
    networks: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "patches.png"
    places = ["--position", "top-left", "--position", "6,6", "--picture", str(path)]
    found = document(networks["poisoned"], capsys, *places)
    assert [place["position"] for place in found["places"]] == [[0, 0], [6, 6]]
    certified = [place["each"]["certified"] for place in found["places"]]
    assert max(certified) <= found["each"]["certified"] <= sum(certified)
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_people_read_a_table(networks: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(asked(networks["clean"], "--samples", "10")) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "certified attack success" in shown.err
    assert "6,6" in shown.err


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--target", "10"], 2, "there is no class 10"),
        (["--size", "0"], 2, "size"),
        (["--size", "9"], 2, "leaves images of 8×8"),
        (["--position", "centre"], 2, "no position of a patch"),
        (["--position", "7,7"], 2, "leaves images"),
        (["--nodes", "0"], 2, "nodes"),
        (["--margin", "-1"], 2, "margin"),
        (["--margin", "nan"], 2, "margin"),
        (["--samples", "0"], 2, "samples"),
        (["--data", "mnist5k#test[:20]"], 2, "images of shape"),
        (["--data", "nowhere"], 2, "nowhere"),
    ],
)
def test_bad_requests(
    networks: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    code: int,
    says: str,
) -> None:
    assert answer(asked(networks["clean"], *more)) == code
    assert says in capsys.readouterr().err.replace("\n", " ")


def test_bad_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    assert answer(asked(str(broken))) == 5
    assert answer(asked(str(tmp_path / "absent.onnx"))) == 2
    (tmp_path / "weights.pt").write_bytes(b"weights")
    assert answer(asked(str(tmp_path / "weights.pt"))) == 2
    assert "is not an ONNX file" in capsys.readouterr().err


def test_ctrl_c_shows_what_was_finished(networks: dict[str, str], tmp_path: Path) -> None:
    """A signal to a real process: exit code 130, and a whole document with the rest unproved."""
    argv = asked(networks["clean"], "--samples", "300", "--size", "5", "--json", "--nodes", "99999")
    code = "import sys; from mlflow_kdguard_cli.main import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    assert "certify-patch" in process.stderr.readline()  # the first batch is done
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    found = json.loads(out)
    assert not found["complete"]
    assert found["each"]["n"] == 300
    assert found["each"]["certified"] > found["each"]["attack"]


def test_a_report_is_attested_for_the_model_that_it_is_about(
    networks: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    document_file, key, out = tmp_path / "patch.json", tmp_path / "key.pem", tmp_path / "c.json"
    assert answer(asked(networks["clean"], "--samples", "5", "--json")) == 0
    document_file.write_text(capsys.readouterr().out)
    assert answer(["keygen", str(key), "--owner", "Bea", "--role", "builder"]) == 0
    for name, code in (("clean", 0), ("poisoned", 8)):
        argv = ["attest", networks[name], "--teacher", networks["poisoned"], "--key", str(key)]
        argv += ["--reference", networks["poisoned"], "--certify-patch", str(document_file)]
        assert answer([*argv, "--model-name", "m", "--out", str(out)]) == code
    assert "the bound of patches towards class 0" in capsys.readouterr().err
    (figure,) = claimed(out.read_bytes()).figures.patch
    assert figure.each.document() == json.loads(document_file.read_text())["each"]
