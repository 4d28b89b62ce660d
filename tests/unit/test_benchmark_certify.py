"""benchmarks/certify: its networks are the committed ones, and a killed row goes on."""

from pathlib import Path

import numpy as np
import pytest
import yaml

import toys
from benchmarks.certify import rows, training
from mlflow_kdguard import graph
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.files import sha256

PAIR = toys.onnx_tiny(seed=1), toys.onnx_tiny(seed=2)
ASKED = rows.Asked("fd", 0.02, "top", "crown", 1)
SPECS = Path(training.__file__).parent


def images(n: int = 60) -> Dataset:
    x = toys.images(n, (1, 2, 2))
    answers = graph.evaluate(graph.read(PAIR[0], where="toy"), x.astype(np.float64)).argmax(1)
    answers[::3] = (answers[::3] + 1) % 3
    return Dataset.of(x, answers, uri="npz:toy", classes=3)


def test_the_images_are_the_first_that_the_reference_gets_right() -> None:
    everything = images()
    found = rows.right(PAIR[0], everything, 7)
    np.testing.assert_array_equal(found.x, everything.x[[1, 2, 4, 5, 7, 8, 10]])


def test_a_row_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, some = rows.Work(PAIR, 1, tmp_path), images()
    real, calls = rows.judged, []

    def judged(*given: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(rows, "judged", judged)
    with pytest.raises(KeyboardInterrupt):
        rows.samples(work, some, ASKED)
    kept = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    assert len(kept) == 1
    before = len(calls)
    parts = rows.samples(work, some, ASKED)
    assert len(calls) == before + 2
    assert [len(part["samples"]) for part in parts] == [25, 25, 10]
    assert all(path.read_bytes() == data for path, data in kept.items())
    whole = rows.figures(rows.samples(rows.Work(PAIR, 2, tmp_path / "b"), some, ASKED), ASKED)
    assert whole["ratio"] == pytest.approx(rows.figures(parts, ASKED)["ratio"])
    assert len(calls) == before + 5


def test_other_code_and_other_questions_are_not_answered_from_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, some = rows.Work(PAIR, 1, tmp_path), images(4)
    rows.samples(work, some, ASKED)
    rows.samples(work, some, rows.Asked("fd", 0.03, "top", "crown", 1))
    monkeypatch.setattr(rows, "source", lambda: "edited")
    rows.samples(work, some, ASKED)
    assert len(list(tmp_path.glob("*.json"))) == 3


def test_closed_means_two_percent_or_a_thousandth() -> None:
    told = [(0.1, 0.1019), (0.1, 0.1021), (0.001, 0.0019), (0.001, 0.0021)]
    samples = [
        {"lower": low, "bound": bound, "margin": 0.001, "upper": bound + 0.001, "nodes": 1}
        for low, bound in told
    ]
    found = rows.figures([{"spent": [3.0, 5.0], "samples": samples}], ASKED)
    assert found["closed"] == 0.5
    assert (found["seconds"], found["cpu_seconds"]) == (0.75, 1.25)
    assert found["ratio"] > found["ratio_real"]


@pytest.mark.parametrize("name", ["pairs", "convolutions"])
def test_every_network_of_a_specification_has_its_digest(name: str) -> None:
    spec = yaml.safe_load((SPECS / f"{name}.yaml").read_text())
    networks = {training.REFERENCE, *spec["students"]}
    assert {number: set(found) for number, found in spec["sha256"].items()} == dict.fromkeys(
        spec["seeds"], networks
    )
    assert all(len(digest) == 64 for found in spec["sha256"].values() for digest in found.values())
    assert {row["student"] for row in spec["rows"].values()} <= set(spec["students"])


def test_other_weights_are_refused_unless_granted(tmp_path: Path) -> None:
    networks = training.Networks(1, tmp_path)
    networks.path("fd").parent.mkdir()
    networks.path(training.REFERENCE).write_bytes(PAIR[0])
    networks.path("fd").write_bytes(PAIR[1])
    digests = {training.REFERENCE: sha256(PAIR[0]), "fd": sha256(PAIR[1])}
    spec = {"students": {"fd": {}}, "sha256": {1: digests}}
    assert training.check(spec, networks, other_machine=False) == digests
    networks.path("fd").write_bytes(PAIR[0])
    with pytest.raises(SystemExit, match=r"fd in .* are not the networks"):
        training.check(spec, networks, other_machine=False)
    assert training.check(spec, networks, other_machine=True)["fd"] == sha256(PAIR[0])
