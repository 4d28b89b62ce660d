"""`kdguard certify-smooth` on exported networks, and what is served for it to mean something."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import certificates as c
import toys
from mlflow_kdguard import data
from mlflow_kdguard.attest import claimed
from mlflow_kdguard.certify.smooth import certify_smooth
from mlflow_kdguard.config import ExportSection, SmoothSection
from mlflow_kdguard.errors import (
    CertificateError,
    ConfigError,
    DataError,
    ModelError,
    NonFiniteError,
)
from mlflow_kdguard.export import to_onnx
from mlflow_kdguard.measure import opened
from mlflow_kdguard.measure.smoothed import Smoothed
from mlflow_kdguard.promoted.verified import VerifiedModel
from mlflow_kdguard.records import FaithfulFigure, SmoothReport
from mlflow_kdguard_cli.main import answer

CPU = torch.device("cpu")
SECTION = SmoothSection(sigma=0.25, samples=20, draws=300)


def trained(path: Path, arch: str, seed: int, steps: int) -> Path:
    """A network on scikit-learn's digits that has seen noise, if it has seen anything."""
    images = data.load("digits#train")
    x, y = torch.from_numpy(images.x), torch.from_numpy(images.y)
    torch.manual_seed(seed)
    net = toys.net(arch, seed=seed, settled=False).train()
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        shown = (x + 0.25 * torch.randn_like(x)).clamp(0, 1)
        torch.nn.functional.cross_entropy(net(shown), y).backward()
        optimiser.step()
    to_onnx(
        net.eval(), path, shape=images.shape, classes=10, images=images.x[:200],
        config=ExportSection(parity_images=200), device=CPU,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("networks")
    arches = {"reference": ("mlp:40", 0, 60), "student": ("mlp:20", 1, 60)}
    arches["residual"] = ("resnet8:4", 2, 0)
    return {name: str(trained(folder / f"{name}.onnx", *of)) for name, of in arches.items()}


def asked(networks: dict[str, str], *more: str) -> list[str]:
    argv = ["certify-smooth", "--teacher", networks["reference"], "--student", networks["student"]]
    return [*argv, "--data", "digits#test", "--sigma", "0.25", *more]


def session(path: str) -> Any:
    return opened(Path(path).read_bytes(), data.load("digits#test"), where="it", device=CPU)


def body(report: SmoothReport) -> dict[str, Any]:
    found = report.document()
    for sample in found["samples"]:
        del sample["seconds"]
    del found["seconds"]
    return found


def test_a_pair_that_saw_noise_is_certified(
    networks: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "curve.png"
    more = ["--samples", "40", "--json", "--picture", str(path)]
    assert answer(asked(networks, *more)) == 0
    found = json.loads(capsys.readouterr().out)
    report = SmoothReport.model_validate(found)
    assert report.document() == found
    assert report.complete
    assert report.within.k >= 20
    assert report.share_lower() < report.within.lower()
    radii = [point.upper_mean for point in report.curve]
    assert radii == sorted(radii)
    assert path.read_bytes()[:4] == b"\x89PNG"
    for sample in report.samples:
        assert sample.lower <= sample.gap_mean + 1e-12
        assert sample.gap_mean <= sample.upper


def test_the_answer_follows_from_digests_nonce_and_entropy_alone(
    networks: dict[str, str],
) -> None:
    """Not from the batch, for a residual network either; the images follow from the nonce."""
    test, nets = data.load("digits#test"), [session(networks["reference"])]
    nets.append(session(networks["residual"]))

    def taken(**changes: Any) -> SmoothReport:
        told = {key: changes.pop(key) for key in ("nonce", "entropy") if key in changes}
        section = SECTION.model_copy(update=changes)
        return certify_smooth(nets[0], nets[1], test, config=section, **told)

    first = taken()
    assert body(first) == body(taken())
    for batch in (1, 7):
        again = taken(batch=batch)
        assert [s.status for s in first.samples] == [s.status for s in again.samples]
        for one, other in zip(first.samples, again.samples, strict=True):
            assert one.gap_mean == pytest.approx(other.gap_mean, abs=1e-6)
    noisy, elsewhere = taken(entropy="x"), taken(nonce="y")
    assert [s.index for s in noisy.samples] == [s.index for s in first.samples]
    assert all(
        one.gap_mean != two.gap_mean for one, two in zip(noisy.samples, first.samples, strict=True)
    )
    assert [s.index for s in elsewhere.samples] != [s.index for s in first.samples]


def test_more_draws_tighten_and_more_distance_loosens(networks: dict[str, str]) -> None:
    test, nets = data.load("digits#test"), [session(networks[n]) for n in ("reference", "student")]

    def mean(**changes: Any) -> float:
        section = SECTION.model_copy(update=changes)
        return certify_smooth(nets[0], nets[1], test, config=section).upper_mean

    by_draws = [mean(draws=draws) for draws in (50, 300, 2000)]
    assert by_draws == sorted(by_draws, reverse=True)
    by_radius = [mean(radius=radius) for radius in (0.01, 0.25, 0.6)]
    assert by_radius == sorted(by_radius)
    top = [certify_smooth(nets[0], nets[1], test,
                          config=SECTION.model_copy(update={"classes": classes})).samples
           for classes in ("top", "all")]  # fmt: skip
    assert all(one.upper <= two.upper for one, two in zip(*top, strict=True))


def test_a_reference_that_is_wrong_counts_against_the_pair(networks: dict[str, str]) -> None:
    test = data.load("digits#test")
    wrong = data.Dataset.of(test.x, (test.y + 1) % 10, uri="npz:wrong", classes=10)
    nets = [session(networks[n]) for n in ("reference", "student")]
    report = certify_smooth(nets[0], nets[1], wrong, config=SECTION)
    assert report.within.k <= 2
    assert sum(s.status == "MISCLASSIFIED" for s in report.samples) >= 18


def test_a_network_that_only_says_the_same_thing_is_found_out(networks: dict[str, str]) -> None:
    """Noise that drowns the images makes both networks constant: so is the null model's gap."""
    test = data.load("digits#test")
    nets = [session(networks[n]) for n in ("reference", "student")]
    drowned = certify_smooth(
        nets[0], nets[1], test, config=SECTION.model_copy(update={"sigma": 50.0, "draws": 2000})
    )
    clear = certify_smooth(nets[0], nets[1], test, config=SECTION)
    assert drowned.control.within.k == 20
    assert clear.control.gap_mean > drowned.control.gap_mean + 0.3


def nan_model() -> bytes:
    """log(p - 2): NaN for every pixel."""
    nodes = [toys.node("Flatten", ["p"], "f"), toys.node("Sub", ["f", "two"], "s"),
             toys.node("Log", ["s"], "logits")]  # fmt: skip
    made: bytes = toys.proto(nodes, {"two": [2.0]}, shape=(1, 1, 3), classes=3).SerializeToString()
    return made


def test_nan_is_a_refusal() -> None:
    x = np.full((3, 1, 1, 3), 0.5, np.float32)
    images = data.Dataset.of(x, np.zeros(3, np.int64), uri="npz:x", classes=3)
    from mlflow_kdguard.measure import Session

    net = Session(nan_model(), device=CPU, where="the student's ONNX file")
    with pytest.raises(NonFiniteError, match="image"):
        certify_smooth(net, net, images, config=SmoothSection(sigma=0.1, samples=2, draws=10))


def test_networks_and_images_must_fit(networks: dict[str, str]) -> None:
    test = data.load("digits#test")
    net = session(networks["student"])
    with pytest.raises(ConfigError, match="sigma"):
        certify_smooth(net, net, test, config=SmoothSection())
    unlabelled = data.Dataset.of(test.x, None, uri="npz:u", classes=10)
    with pytest.raises(DataError, match="without a label"):
        certify_smooth(net, net, unlabelled, config=SECTION)
    from mlflow_kdguard.measure import Session

    three = Session(toys.onnx_tiny(shape=(1, 8, 8), classes=3), device=CPU, where="three")
    with pytest.raises(ModelError, match="3"):
        certify_smooth(net, three, test, config=SECTION)


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--sigma", "0"], 2, "sigma"),
        (["--sigma", "nan"], 2, "sigma"),
        (["--radius", "-1"], 2, "radius"),
        (["--error", "0"], 2, "error"),
        (["--error", "0.2"], 2, "error"),
        (["--draws", "0"], 2, "draws"),
        (["--samples", "0"], 2, "samples"),
        (["--delta", "2"], 2, "delta"),
        (["--data", "mnist5k#test[:20]"], 5, "shape"),
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
    assert answer(asked(networks, *more)) == code
    assert says in capsys.readouterr().err.replace("\n", " ")


def test_people_read_that_it_is_about_the_smoothed_pair(
    networks: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(asked(networks, "--samples", "5", "--draws", "100")) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "of no answer without it" in shown.err.replace("\n", " ")


def test_ctrl_c_shows_what_was_finished(networks: dict[str, str]) -> None:
    """A signal to a real process: exit code 130, and a whole document with the rest undecided."""
    argv = asked(networks, "--samples", "300", "--draws", "6000", "--json")
    code = "import sys; from mlflow_kdguard_cli.main import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    assert "certify-smooth" in process.stderr.readline()  # the first image is done
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    report = SmoothReport.model_validate(json.loads(out))
    assert not report.complete
    assert len(report.samples) == 300
    finished = [sample for sample in report.samples if sample.draws]
    assert 1 <= len(finished) < 300
    assert all(s.draws == 6000 for s in finished)
    assert report.samples[-1].status == "UNDECIDED"
    assert report.samples[-1].upper == 1.0


def test_a_report_is_attested_for_the_pair_that_it_is_about(
    networks: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    document_file, key, out = tmp_path / "smooth.json", tmp_path / "key.pem", tmp_path / "c.json"
    assert answer(asked(networks, "--samples", "5", "--draws", "50", "--json")) == 0
    document_file.write_text(capsys.readouterr().out)
    assert answer(["keygen", str(key), "--owner", "Bea", "--role", "builder"]) == 0
    for name, code in (("student", 0), ("residual", 8)):
        argv = ["attest", networks[name], "--teacher", networks["residual"], "--key", str(key)]
        argv += ["--reference", networks["reference"], "--certify-smooth", str(document_file)]
        assert answer([*argv, "--model-name", "m", "--out", str(out)]) == code
    assert "the smoothed bound is about the student" in capsys.readouterr().err
    (figure,) = claimed(out.read_bytes()).figures.faithful
    assert (figure.method, figure.sigma, figure.error) == ("smoothed", 0.25, 0.001)


# ── What is served ──────────────────────────────────────────────────────────────────────────────


def test_what_is_served_is_what_was_certified(networks: dict[str, str]) -> None:
    """The served confidences of both networks are apart by the bound at most, also at an image
    near the certified one, up to what finite draws leave open.
    """
    test, nets = data.load("digits#test"), [session(networks[n]) for n in ("reference", "student")]
    report = certify_smooth(nets[0], nets[1], test, config=SECTION)
    served = [Smoothed(net, 0.25, draws=2000, seed=i) for i, net in enumerate(nets)]
    images = test.x[[sample.index for sample in report.samples]]
    random = np.random.default_rng(0)
    ways = random.normal(size=images.shape)
    ways *= 0.25 / np.sqrt((ways**2).sum((1, 2, 3), keepdims=True))
    near = (images + ways).astype(np.float32)
    for shown in (images, near):
        answers = [net.predict(shown) for net in served]
        assert answers[0].sum(1) == pytest.approx(1.0)
        gaps = np.abs(answers[0] - answers[1]).max(1)
        room = 2 * served[0].half_width(1e-6)
        assert (gaps <= np.array([s.upper for s in report.samples]) + room).all()


def test_served_answers_repeat_where_a_seed_is_given(networks: dict[str, str]) -> None:
    net, x = session(networks["student"]), data.load("digits#test").x[:3]
    one, same = (Smoothed(net, 0.25, draws=64, seed=5).predict(x, batch=b) for b in (64, 5))
    assert one == pytest.approx(same, abs=1e-6)
    fresh = [Smoothed(net, 0.25, draws=64).predict(x) for _ in range(2)]
    assert (fresh[0] != fresh[1]).any()
    assert Smoothed(net, 0.25).predict(x[:0]).shape == (0, 10)
    assert Smoothed(net, 0.25, draws=10**6).half_width() < 0.003
    for sigma, draws in ((0.0, 1), (float("nan"), 1), (0.1, 0)):
        with pytest.raises(ValueError, match="no noise"):
            Smoothed(net, sigma, draws=draws)


def test_a_verified_model_serves_the_noise_of_its_certificate(networks: dict[str, str]) -> None:
    net, x = session(networks["student"]), data.load("digits#test").x[:2]

    def loaded(*figures: FaithfulFigure) -> VerifiedModel:
        return VerifiedModel("models:/m/1", c.certificate(faithful=figures), (c.VERIFIER,), net)

    served = loaded(c.faithful(), c.smoothed()).smoothed(draws=32, seed=1)
    assert (served.sigma, served.draws) == (0.25, 32)
    assert (served.predict(x) == Smoothed(net, 0.25, draws=32, seed=1).predict(x)).all()
    for figures in ((c.faithful(),), (c.smoothed(), c.smoothed(sigma=0.5))):
        with pytest.raises(CertificateError, match="names no noise"):
            loaded(*figures).smoothed()
