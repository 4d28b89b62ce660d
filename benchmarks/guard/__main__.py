"""Guards against backdoors that survive distillation: python -m benchmarks.guard [--rows A,B] …

For each row of spec.yaml (an attack on a pair of networks), seed and guard: the poisoned teacher,
the guard's reference, and a student that distils from it on an unlabelled, perhaps contaminated
transfer set, beside a student of a clean teacher (the floor of every rate) and one without any
teacher (the floor of accuracy). Prints the students' accuracy, rate, lift with its one-sided 95 %
bounds, and the value kept; writes benchmarks/results/guard.json. A row in which the undefended
student is not .3 above the clean teacher's student is void, and shown as such. Finished cells are
kept in --folder: a run that was killed goes on where it was.

Without further words it makes the core table: the rows and guards that the specification's `core`
names. --full makes all.

--config FILE               another specification (default: spec.yaml beside this file)
--rows, --guards, --pairs   some of them, separated by commas
--use                       rows for development, or those held out ("held out")
--seeds                     the first so many of each pair's
--jobs                      processes (default: 1)
--device, --data-root       where it runs (default: CUDA where there is one), and where images are
--on                        validation: images to choose settings on (default: test)
--picture FILE              lifts of the valid rows, drawn
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.guard import command, picture, sweep
from benchmarks.guard.cells import CLEAN_TEACHER, FLOORS, NO_TEACHER, NONE, Cells, Judged
from benchmarks.guard.rows import Guard, Row, chosen, rows
from benchmarks.guard.scores import Faith, Score, faith, score, valid
from benchmarks.guard.teachers import JUDGES
from benchmarks.record import machine, write

HEAD = (
    "guard                     accuracy    drop     asr    base    lift  [lower,  upper]   kept"
    "  seconds"
)


def main() -> None:
    """Make the cells, print the tables, record them; end with the command line's exit codes."""
    given = _options()
    with command.ended(given.folder):
        _run(given)


def _run(given: argparse.Namespace) -> None:
    begun = command.begin(given, on=given.on)
    spec, cells = begun.spec, begun.cells
    core = {} if given.full else spec.get("core", {})
    names = given.guards or core.get("guards") or list(begun.guards)
    guards = begun.named([NONE, *names])  # every score needs the undefended student
    asked = any((given.rows, given.pairs, given.use))
    names, pairs = (given.rows, given.pairs) if asked else (core.get("rows"), core.get("pairs"))
    picked = [
        (row, row.seeds[: given.seeds]) for row in chosen(list(rows(spec)), names, pairs, given.use)
    ]
    if given.jobs > 1:
        sweep.make(picked, list(guards.values()), cells, jobs=given.jobs)
    body: dict[str, Any] = {"spec": spec, "on": given.on, "rows": []}
    for row, seeds in picked:
        body["rows"].append(_told(cells, row, seeds, guards))
    print(f"wrote {write(given.out, {**machine(), **body})}")
    if given.picture is not None:
        picture.draw(body["rows"], given.picture)
        print(f"wrote {given.picture}")


def _options() -> argparse.Namespace:
    parser = command.parser(__doc__ or "", out="guard.json")
    for name in ("rows", "guards", "pairs"):
        parser.add_argument(f"--{name}", type=lambda text: text.split(","))
    parser.add_argument("--use")
    parser.add_argument("--seeds", type=command.count)
    parser.add_argument("--on", choices=JUDGES, default=JUDGES[-1])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--picture", type=Path)
    return parser.parse_args()


def _told(cells: Cells, row: Row, seeds: Sequence[int], guards: dict[str, Guard]) -> dict[str, Any]:
    """All guards on one row."""
    teacher = [cells.raw(row, seed) for seed in seeds]
    raw = {"accuracy": [one.accuracy for one in teacher], "asr": [one.asr for one in teacher]}
    accuracy, asr = (sum(values) / len(values) for values in raw.values())
    print(
        f"\n{row.name} on {row.pair} ({row.use}), target {row.teacher.target}, "
        f"seeds {list(seeds)}: teacher's accuracy {accuracy:.3f}, rate {asr:.3f}"
    )
    students: dict[str, list[Judged]] = {
        name: [cells.judged(row, name, seed) for seed in seeds] for name in FLOORS
    }
    none = students[NONE] = [cells.judged(row, guards[NONE], seed) for seed in seeds]
    counts = valid(none, students[CLEAN_TEACHER])
    print(f"{'valid' if counts else 'VOID: the attack does not survive distillation'}\n{HEAD}")
    scores = {}
    for name in (*FLOORS, *guards):
        if name not in students:
            students[name] = [cells.judged(row, guards[name], seed) for seed in seeds]
        scores[name] = score(students[name], none, students[CLEAN_TEACHER], students[NO_TEACHER])
        print(_line(name, scores[name]), flush=True)
    faiths = {} if row.bounds is None else _faiths(students)
    return {"row": row.name, "pair": row.pair, "use": row.use, "seeds": list(seeds),
            "target": row.teacher.target, "valid": counts, "teacher": raw,
            "scores": {name: one.document() for name, one in scores.items()},
            "faith": {name: one.document() for name, one in faiths.items()},
            "cells": {name: [one.told for one in each] for name, each in students.items()},
            }  # fmt: skip


def _faiths(students: dict[str, list[Judged]]) -> dict[str, Faith]:
    """What is certified of every guard's students, printed, too."""
    found = {name: faith(each, students[CLEAN_TEACHER]) for name, each in students.items()
             if name != NO_TEACHER}  # fmt: skip
    print("                           witness   bound   ratio  reference's gap")
    for name, one in found.items():
        print(f"{name:<26}{one.lower:8.4f}{one.upper:8.4f}{one.ratio:8.3f}{one.gap:8.4f}")
    return found


def _line(name: str, one: Score) -> str:
    kept = "      " if one.kept is None else f"{one.kept:6.2f}"
    return (
        f"{name:<26}{one.accuracy:8.3f}{one.drop:8.3f}{one.asr:8.3f}{one.baseline:8.3f}"
        f"{one.lift:8.3f}  [{one.lift_lower:6.3f}, {one.lift_upper:6.3f}] {kept} {one.seconds:8.1f}"
    )


if __name__ == "__main__":
    main()
