"""The paper's comparison: which student of which teacher, how far apart, and in what order."""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faithful.cells import Cells, Sets

PAPER = ("SD", "ARD", "RSLAD", "FD")
_NAMED = ("teachers", "students")


@dataclass(frozen=True, slots=True)
class Place:
    """One student of one teacher on one set: what its figures are listed under."""

    images: str
    teacher: str
    student: str
    seed: int


Rows = list[dict[str, Any]]


def run(spec: Mapping[str, Any], folder: Path, *, quick: bool) -> tuple[Rows, Rows]:
    """Make or find every cell; one row for each student, radius and bound.

    And one for each student that diverged so far that it cannot be exported, with the reason.
    """
    spec = _quick(spec) if quick else spec
    rows, refused = [], []
    for place, cells, told in _places(spec, folder):
        teacher = cells.teacher(told["teach"], place.seed)
        student = cells.student(told["distill"], teacher, place.seed)
        why = cells.refused(student)
        if why is None:
            rows += _rows(place, cells, (teacher, student), told["eps"], spec)
        else:
            refused.append({**_named(place), "refused": why})
    return rows, refused


def _named(place: Place) -> dict[str, Any]:
    return {
        "set": place.images, "teacher": place.teacher, "student": place.student,
        "seed": place.seed,
    }  # fmt: skip


def _quick(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Fewer of everything, as `quick` says."""
    told = spec["quick"]
    chosen = {name: spec["sets"][name] for name in told["sets"]}
    sets = {
        name: {**given, "epochs": told["epochs"], "eps": [max(given["eps"])]}
        for name, given in chosen.items()
    }
    fewer = {kind: {name: spec[kind][name] for name in told[kind]} for kind in _NAMED}
    return {**spec, **fewer, "seeds": told["seeds"], "bounds": told["bounds"], "sets": sets}


def _places(spec: Mapping[str, Any], folder: Path) -> Iterator[tuple[Place, Cells, dict[str, Any]]]:
    for images, given in spec["sets"].items():
        if given is None:
            continue
        cells = Cells(folder, Sets(given["train"], given["validation"], given["test"]))
        shared = {**spec["loop"], "epochs": given["epochs"], "eps": given["radius"]}
        for seed in spec["seeds"]:
            for teacher, changes in spec["teachers"].items():
                teach = {**shared, **spec["teach"], **changes}
                for student, options in spec["students"].items():
                    distill = {**shared, **spec["distill"], **options}
                    told = {"teach": teach, "distill": distill, "eps": given["eps"]}
                    yield Place(images, teacher, student, seed), cells, told


def _rows(
    place: Place,
    cells: Cells,
    pair: tuple[Path, Path],
    radii: list[float],
    spec: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    teacher, student = pair
    accuracy = {
        "teacher_accuracy": cells.accuracy(teacher, "test"),
        "student_accuracy": cells.accuracy(student, "test"),
    }
    for eps in radii:
        for bound in _bounds(spec, place.student):
            found = cells.bounds(teacher, student, {**bound, "eps": eps, "classes": "top"}, "test")
            yield {
                **_named(place), "eps": eps, "method": bound["method"], **accuracy,
                **{key: found[key] for key in ("n", "lower", "upper", "control")},
            }  # fmt: skip


def _bounds(spec: Mapping[str, Any], student: str) -> Iterator[dict[str, Any]]:
    """Sections of the bounds that a student is given."""
    for told in spec["bounds"]:
        bound = {**told}
        if student in bound.pop("students", [student]):
            yield bound


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and deviation over seeds, by set, teacher, radius, student and bound, as listed."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("set", "teacher", "eps", "method", "student"))
        groups.setdefault(key, []).append(row)
    found = []
    for (images, teacher, eps, method, student), members in groups.items():
        entry = {
            "set": images, "teacher": teacher, "eps": eps, "method": method, "student": student,
            "seeds": len(members),
        }  # fmt: skip
        for name in ("teacher_accuracy", "student_accuracy", "lower", "upper"):
            values = [row[name] for row in members]
            entry[name] = statistics.fmean(values)
            entry[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        found.append(entry)
    return found


def orderings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The paper's statements (table 2), each with the seeds in which it holds.

    Robust teacher, the temperatures of the paper: adversarial students have smaller EmpLB than SD;
    they have smaller FaithUB; FD has the smallest FaithUB of all.
    """
    found = []
    places = sorted({(row["set"], row["eps"], row["method"]) for row in rows})
    for images, eps, method in places:
        seeds: dict[int, dict[str, dict[str, Any]]] = {}
        for row in rows:
            if (row["set"], row["eps"], row["method"], row["teacher"]) == (
                images, eps, method, "robust",
            ):  # fmt: skip
                seeds.setdefault(row["seed"], {})[row["student"]] = row
        for statement, holds in _STATEMENTS.items():
            answers = [holds(by) for by in seeds.values() if all(name in by for name in PAPER)]
            found.append({
                "set": images, "eps": eps, "method": method, "statement": statement,
                "holds": sum(answers), "seeds": len(answers),
            })  # fmt: skip
    return found


_STATEMENTS: dict[str, Any] = {
    "EmpLB: ARD, RSLAD, FD < SD": lambda by: all(
        by[name]["lower"] < by["SD"]["lower"] for name in PAPER[1:]
    ),
    "FaithUB: ARD, RSLAD, FD < SD": lambda by: all(
        by[name]["upper"] < by["SD"]["upper"] for name in PAPER[1:]
    ),
    "FaithUB: FD smallest": lambda by: all(
        by["FD"]["upper"] <= by[name]["upper"] for name in PAPER
    ),
}


def table(spec: Mapping[str, Any], found: list[dict[str, Any]]) -> str:
    """All of it as text."""
    lines = [
        "set            teacher  eps    bound   student        acc T  acc S  EmpLB          FaithUB"
    ]
    lines += [
        f"{row['set']:14} {row['teacher']:7} {row['eps']:6g} {row['method']:7} "
        f"{row['student']:14} {row['teacher_accuracy']:.3f}  {row['student_accuracy']:.3f}  "
        f"{_with(row, 'lower'):15}{_with(row, 'upper')}"
        for row in found
    ]
    empty = [name for name, given in spec["sets"].items() if given is None]
    lines += [f"{name:14} no package ships a labelled set of this kind: empty" for name in empty]
    return "\n".join(lines)


def _with(row: Mapping[str, Any], name: str) -> str:
    deviation = row[f"{name}_sd"]
    return f"{row[name]:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")
