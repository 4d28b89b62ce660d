"""Ctrl-C and limits of `kdguard certify`: what is reported then, and that nobody attests it."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import toys
from mlflow_kdguard import data
from mlflow_kdguard.certify import certify
from mlflow_kdguard.config import CertifySection, ExportSection
from mlflow_kdguard.errors import CertificateError, Interrupted
from mlflow_kdguard.export import to_onnx
from mlflow_kdguard.graph import evaluate, read
from mlflow_kdguard.proof.folder import INDEX
from mlflow_kdguard.records import CertifyReport, Status
from mlflow_kdguard.records.gather import faithful_of
from mlflow_kdguard_cli.main import answer

CPU = torch.device("cpu")
LISTENING = """
import sys, time
from mlflow_kdguard.certify import branch, parallel
divided, closed = branch.Search._branched, branch.Search._close
def dividing(self, parents):
    print("SEARCHING", file=sys.stderr, flush=True)
    return divided(self, parents)
branch.Search._branched = dividing
"""
"""The command, and when it is in its search."""
ENDLESS_CLOSING = """
def closing(self, nodes):
    if not self.stopped:
        return closed(self, nodes)
    print("CLOSING", file=sys.stderr, flush=True)
    while True:
        parallel.go_on()
        time.sleep(0.01)
branch.Search._close = closing
"""
RUN = "from mlflow_kdguard_cli.main import main; main(sys.argv[1:])"
ENDLESS = 10**6


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two MLPs on scikit-learn's digits."""
    folder, images = tmp_path_factory.mktemp("networks"), data.load("digits#train")
    x, y = torch.from_numpy(images.x), torch.from_numpy(images.y)
    for arch, name in (("mlp:32,32", "reference"), ("mlp:24,24", "student")):
        torch.manual_seed(0)
        net = toys.net(arch, settled=False).train()
        optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(60):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimiser.step()
        to_onnx(
            net.eval(), folder / f"{name}.onnx", shape=images.shape, classes=10,
            images=images.x[:200], config=ExportSection(parity_images=200), device=CPU,
        )  # fmt: skip
    return {name: str(folder / f"{name}.onnx") for name in ("reference", "student")}


def asked(networks: dict[str, str], *more: str) -> list[str]:
    return [
        "certify", "--teacher", networks["reference"], "--student", networks["student"],
        "--data", "digits#test", "--eps", "0.1", "--method", "branch", "--classes", "top",
        "--samples", "60", "--nodes", str(ENDLESS), "--device", "cpu", "--json", *more,
    ]  # fmt: skip


def begun(argv: list[str], more: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LISTENING + more + RUN, *argv], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def heard(process: subprocess.Popen[str], word: str) -> None:
    """Wait until the process has said a word."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.strip() == word:
            return
    raise AssertionError(f"it ended ({process.wait()}) before it said {word}")


@pytest.fixture(scope="module")
def interrupted(
    networks: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, CertifyReport, str]:
    """A folder with the document of a real process that a real SIGINT met in its search."""
    folder = tmp_path_factory.mktemp("interrupted")
    process = begun(asked(networks, "--proofs", str(folder / "proofs")))
    heard(process, "SEARCHING")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    (folder / "certify.json").write_text(out)
    return folder, CertifyReport.model_validate(json.loads(out)), err


def test_ctrl_c_returns_the_bounds_so_far(
    networks: dict[str, str], interrupted: tuple[Path, CertifyReport, str]
) -> None:
    """Those of the batch at work hold; images that were not begun are named, with nothing."""
    folder, report, err = interrupted
    assert report.interrupted
    assert "INTERRUPTED" in err
    assert (len(report.samples), report.summary.n) == (60, 60)
    bounded = [s for s in report.samples if s.method == "branch"]
    assert 1 <= len(bounded) < 60
    assert any(s.stopped == "interrupted" and s.upper < 0.9 for s in bounded)
    for sample in report.samples:
        if sample.method != "branch":
            assert (sample.method, sample.stopped) == ("skipped", "interrupted")
            assert (sample.lower, sample.upper) == (0.0, 1.0)
            assert sample.status in (Status.UNDECIDED, Status.MISCLASSIFIED)
    assert report.proofs is None
    assert not (folder / "proofs" / INDEX).exists()
    models = [read(Path(networks[n]).read_bytes(), where=n) for n in ("reference", "student")]
    images, draw = data.load("digits#test"), np.random.default_rng(0)
    for sample in bounded:
        x = images.x[sample.index].astype(np.float64)
        ways = 0.1 * np.sign(draw.normal(size=(300, *x.shape)))
        near = np.concatenate((x[None], (x + ways).clip(0.0, 1.0)))
        r, s = (torch.softmax(torch.from_numpy(evaluate(m, near)), 1) for m in models)
        gaps = (r - s).abs()[:, sample.reference_class]
        assert float(gaps.max()) <= sample.bound
        assert sample.lower <= sample.bound


def test_nobody_attests_an_interrupted_report(
    networks: dict[str, str],
    interrupted: tuple[Path, CertifyReport, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, report, _ = interrupted
    with pytest.raises(CertificateError, match="interrupted"):
        faithful_of(report)
    key, out = folder / "key.pem", folder / "c.json"
    assert answer(["keygen", str(key), "--owner", "Bea", "--role", "builder"]) == 0
    argv = ["attest", networks["student"], "--teacher", networks["reference"], "--key", str(key)]
    argv += ["--reference", networks["reference"], "--model-name", "m", "--out", str(out)]
    document = folder / "certify.json"
    assert answer([*argv, "--certify", str(document)]) == 8
    assert "was interrupted" in capsys.readouterr().err
    assert not out.exists()
    # Whoever hides it states failures: what was not bounded counts against the student.
    told = json.loads(document.read_text())
    assert told.pop("interrupted") is True
    figure = faithful_of(CertifyReport.model_validate(told))
    late = sum(sample["method"] == "skipped" for sample in told["samples"])
    assert figure.within.n == 60
    assert figure.within.k <= 60 - late


def test_a_second_ctrl_c_ends_everything(networks: dict[str, str]) -> None:
    """Also while what is open is bounded anew, which here does not end."""
    process = begun(asked(networks), more=ENDLESS_CLOSING)
    heard(process, "SEARCHING")
    process.send_signal(signal.SIGINT)
    heard(process, "CLOSING")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    told = json.loads(out)
    assert (told["schema"], told["exit"]) == ("kdguard.error/1", 130)


def test_without_being_asked_for_there_is_no_part_of_a_report(networks: dict[str, str]) -> None:
    """As in a pipeline: the stage is not finished, and begins anew."""
    given = [Path(networks[n]).read_bytes() for n in ("reference", "student")]
    config = CertifySection(samples=2, eps=0.1, method="branch", nodes=4)

    def listen(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        certify(*given, data.load("digits#test"), config=config, device=CPU, progress=listen)


@pytest.mark.parametrize("limit", ["seconds", "memory"])
def test_a_limit_that_ended_the_search_is_in_the_report(
    networks: dict[str, str], limit: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With proofs of the bounds that there are: a limit of one's own is no interruption."""
    flag = {"seconds": "--budget", "memory": "--memory"}[limit]
    value = {"seconds": "3", "memory": "1e-6"}[limit]
    argv = asked(networks, "--samples", "3", flag, value, "--proofs", str(tmp_path / "proofs"))
    assert answer(argv) == 0
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert "interrupted" not in told
    report = CertifyReport.model_validate(told)
    found = Counter(sample.stopped for sample in report.samples)
    assert found[limit] >= 1
    noun = "image" if found[limit] == 1 else "images"
    assert f"{found[limit]} {noun} (limit: {limit})" in shown.err.replace("\n", " ")
    assert set(found) <= {None, limit}
    assert all(s.lower <= s.bound < 1.0 for s in report.samples)
    assert faithful_of(report).within.n == 3
    assert report.proofs is not None


def test_a_limit_of_memory_is_for_what_can_be_ended(
    networks: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = asked(networks, "--memory", "4")
    argv[argv.index("branch")] = "crown"
    assert answer(argv) == 2
    assert "not ended by a limit of memory" in capsys.readouterr().err.replace("\n", " ")
    assert answer(asked(networks, "--memory", "-1")) == 2


def test_how_close_a_bound_ends_the_search_can_be_asked_for(networks, capsys):
    """`--relative-gap` and `--absolute-gap` reach the search; negative ones are refused."""
    spent = []
    for gap in ("0", "100"):
        few = ["--samples", "4", "--nodes", "60", "--relative-gap", gap, "--absolute-gap", "0"]
        assert answer(asked(networks, *few)) == 0
        samples = json.loads(capsys.readouterr().out)["samples"]
        assert all(sample["lower"] <= sample["upper"] for sample in samples)
        spent.append(sum(sample["nodes"] for sample in samples))
    assert spent[1] < spent[0]
    assert answer(asked(networks, "--relative-gap", "-1")) == 2
    assert "--relative-gap" in capsys.readouterr().err
