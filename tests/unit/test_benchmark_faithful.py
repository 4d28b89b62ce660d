"""benchmarks/faithful: what the verdict compares, and with whom; every column has figures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import toys
from benchmarks.faithful import paper
from benchmarks.faithful.__main__ import only
from benchmarks.faithful.cells import Cells, Sets
from benchmarks.faithful.verifiable import CROSSED, verdict
from mlflow_kdguard import graph
from mlflow_kdguard.errors import ExportError

PAIR = toys.onnx_tiny(seed=1), toys.onnx_tiny(seed=2)
SPEC = yaml.safe_load((Path(paper.__file__).parent / "paper.yaml").read_text())

FIGURES = {
    "plain": (0.2, 0.05, 0.84, 0.83),
    "longer": (0.3, 0.04, 0.85, 0.83),
    "verifiable": (0.1, 0.055, 0.835, 0.825),
    CROSSED: (0.16, 0.06, 0.84, 0.825),
}


def rows(seeds: tuple[int, ...] = (0, 1), **changed: tuple[float, ...]) -> list[dict[str, Any]]:
    names = ("upper", "lower", "teacher_accuracy", "student_accuracy")
    return [
        {"pair": pair, "seed": seed, "method": "crown", **dict(zip(names, figures, strict=True))}
        for seed in seeds
        for pair, figures in (FIGURES | changed).items()
    ]


def test_the_recipe_is_held_against_both_baselines_seed_by_seed_and_in_the_mean() -> None:
    found = verdict(rows())
    assert [(each["against"], each["seeds"]) for each in found] == [
        ("plain", [0]), ("plain", [1]), ("plain", [0, 1]),
        ("longer", [0]), ("longer", [1]), ("longer", [0, 1]),
    ]  # fmt: skip
    plain, longer = found[2], found[5]
    assert plain["upper_ratio"] == pytest.approx(0.5)
    assert plain["lower_ratio"] == pytest.approx(1.1)
    assert plain["against_plain_teacher"] == pytest.approx(0.8)
    assert plain["teacher_accuracy_lost"] == pytest.approx(0.005)
    assert longer["upper_ratio"] == pytest.approx(1 / 3)
    assert longer["teacher_accuracy_lost"] == pytest.approx(0.015)
    assert not longer["holds"]  # of accuracy and of EmpLB


@pytest.mark.parametrize(
    "figures",
    [
        (0.141, 0.05, 0.84, 0.83),
        (0.1, 0.0551, 0.84, 0.83),
        (0.1, 0.05, 0.8299, 0.83),
        (0.1, 0.05, 0.84, 0.8199),
    ],
)
def test_every_part_of_the_aim_counts(figures: tuple[float, ...]) -> None:
    (held,) = verdict(rows((0,), longer=FIGURES["plain"], verifiable=(0.1, 0.05, 0.84, 0.83)))[:1]
    assert held["holds"]
    (failed,) = verdict(rows((0,), longer=FIGURES["plain"], verifiable=figures))[:1]
    assert not failed["holds"]


def test_one_seed_has_no_mean_of_its_own() -> None:
    assert [each["seeds"] for each in verdict(rows((3,)))] == [[3], [3]]


@pytest.fixture
def cells(tmp_path: Path) -> Cells:
    """Two toy networks beside each other and 40 images of which the first gets two thirds right."""
    x = toys.images(40, (1, 2, 2))
    answers = graph.evaluate(graph.read(PAIR[0], where="toy"), x.astype(np.float64)).argmax(1)
    answers[::3] = (answers[::3] + 1) % 3
    np.savez(tmp_path / "toy.npz", x=x, y=answers)
    for name, network in zip(("reference", "student"), PAIR, strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_bytes(network)
    uri = f"npz:{tmp_path / 'toy.npz'}"
    return Cells(tmp_path, Sets(uri, uri, uri))


@pytest.mark.parametrize("method", sorted({each["method"] for each in SPEC["bounds"]}))
def test_every_column_of_the_comparison_has_figures(cells: Cells, method: str) -> None:
    told = {"method": method, "eps": 0.05, "classes": "top", "samples": 5, "nodes": 5}
    found = cells.bounds(cells.folder / "reference", cells.folder / "student", told, "test")
    assert found["n"] == len(found["uppers"]) == 5
    assert all(a <= b for a, b in zip(found["lowers"], found["uppers"], strict=True))
    assert found["cpu_seconds"] > 0
    (file,) = (cells.folder / "bounds").iterdir()
    file.write_text(file.read_text().replace('"n": 5', '"n": 77'))  # found again, not made again
    again = cells.bounds(cells.folder / "reference", cells.folder / "student", told, "test")
    assert again["n"] == 77


def test_a_part_of_the_comparison_is_what_was_named() -> None:
    part = only(SPEC, "students", ["FD", "SD"])
    assert list(part["students"]) == ["FD", "SD"]
    assert part["sets"] == SPEC["sets"]
    with pytest.raises(SystemExit, match="no students KD; known: SD, ARD"):
        only(SPEC, "students", ["KD"])


def test_a_student_that_cannot_be_exported_is_a_row_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that diverged; it is not trained again, and nothing is bounded."""
    place = Cells(tmp_path, Sets("a", "b", "c"))
    made: list[Path] = []

    def diverged(folder: Path) -> None:
        made.append(folder)
        raise ExportError("the weights are too large.")

    def network(_: Cells, told: Any, *rest: Any) -> Path:
        return place._network("student", {"told": told, "to": len(rest)}, rest[-1], diverged)

    monkeypatch.setattr(Cells, "teacher", network)
    monkeypatch.setattr(Cells, "student", network)
    spec = only(only(only(SPEC, "students", ["FD"]), "teachers", ["plain"]), "sets", ["mnist5k"])
    for _ in range(2):
        rows, refused = paper.run({**spec, "seeds": [4]}, tmp_path, quick=False)
    assert rows == []
    assert refused == [{
        "set": "mnist5k", "teacher": "plain", "student": "FD", "seed": 4,
        "refused": "the weights are too large.",
    }]  # fmt: skip
    assert len(made) == 2
