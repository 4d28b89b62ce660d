"""Verifiable training against plain faithful distillation: smaller bounds at equal accuracy."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.faithful.cells import Cells, Sets

AIM = {"upper": 0.7, "lower": 1.1, "accuracy": 0.01}
"""At most 0.7 × the bound and 1.1 × the witness of plain FD, at most 0.01 of accuracy lost."""
ACCURACIES = ("teacher_accuracy", "student_accuracy")
BASELINES = ("plain", "longer")
CROSSED = "verifiable, plain teacher"


def run(spec: Mapping[str, Any], folder: Path, *, split: str = "test") -> list[dict[str, Any]]:
    """Rows for each seed: the plain pair, the verifiable pair, and its student against plain T.

    `longer`, where the specification has it, is the plain pair under the recipe's epochs.
    """
    cells = Cells(folder, Sets(**spec["sets"]))
    rows = []
    for seed in spec["seeds"]:
        pairs = {}
        for name in (*BASELINES, "verifiable"):
            if spec.get(name) is not None:
                teacher = cells.teacher(spec[name]["teach"], seed)
                student = cells.student(spec[name]["distill"], teacher, seed)
                pairs[name] = teacher, student
        crossed = {CROSSED: (pairs["plain"][0], pairs["verifiable"][1])}
        for name, (teacher, student) in {**pairs, **crossed}.items():
            accuracies = {
                "teacher_accuracy": cells.accuracy(teacher, split),
                "student_accuracy": cells.accuracy(student, split),
            }
            for bound in spec["bounds"]:
                found = cells.bounds(teacher, student, {**bound, "classes": "top"}, split)
                rows.append({"pair": name, "seed": seed, **bound, **accuracies, **found})
    return rows


def verdict(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each bound, seed and baseline, and over seeds: ratios, losses, and whether all hold.

    The baseline that the aim speaks of is `plain`; `longer` is plain FD with the recipe's epochs.
    """
    methods = dict.fromkeys(row["method"] for row in rows)
    baselines = [name for name in BASELINES if any(row["pair"] == name for row in rows)]
    seeds = sorted({row["seed"] for row in rows})
    chosen = [[seed] for seed in seeds] + ([seeds] if len(seeds) > 1 else [])
    return [
        _compared(rows, method, each, baseline)
        for method in methods
        for baseline in baselines
        for each in chosen
    ]


def _compared(
    rows: list[dict[str, Any]], method: str, seeds: list[int], baseline: str
) -> dict[str, Any]:
    def mean(pair: str, figure: str) -> float:
        return fmean(
            row[figure]
            for row in rows
            if row["pair"] == pair and row["method"] == method and row["seed"] in seeds
        )

    ratios = {name: mean("verifiable", name) / mean(baseline, name) for name in ("upper", "lower")}
    lost = {name: mean(baseline, name) - mean("verifiable", name) for name in ACCURACIES}
    return {
        "method": method,
        "against": baseline,
        "seeds": seeds,
        "upper_ratio": ratios["upper"],
        "lower_ratio": ratios["lower"],
        "against_plain_teacher": mean(CROSSED, "upper") / mean(baseline, "upper"),
        **{f"{name}_lost": value for name, value in lost.items()},
        "holds": ratios["upper"] <= AIM["upper"]
        and ratios["lower"] <= AIM["lower"]
        and all(value <= AIM["accuracy"] for value in lost.values()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Every row as text, and the verdict under it."""
    lines = [
        "seed  pair                       bound    n    acc T   acc S   EmpLB   FaithUB control"
    ]
    lines += [
        f"{row['seed']:4}  {row['pair']:26} {row['method']:7} {row['n']:4} "
        f"{row['teacher_accuracy']:.4f}  {row['student_accuracy']:.4f}  "
        f"{row['lower']:.4f}  {row['upper']:.4f}  {row['control']:.3f}"
        for row in rows
    ]
    lines.append(
        "bound   against seeds      FaithUB ×  EmpLB ×  vs plain T  acc T lost  acc S lost  holds"
    )
    lines += [
        f"{each['method']:7} {each['against']:7} {','.join(map(str, each['seeds'])):10} "
        f"{each['upper_ratio']:9.3f}  {each['lower_ratio']:7.3f}  "
        f"{each['against_plain_teacher']:10.3f}  {each['teacher_accuracy_lost']:10.4f}  "
        f"{each['student_accuracy_lost']:10.4f}  {'yes' if each['holds'] else 'no'}"
        for each in verdict(rows)
    ]
    return "\n".join(lines)
