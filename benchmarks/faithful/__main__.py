"""The paper's comparison: python -m benchmarks.faithful [--verifiable] [--quick] [--folder FOLDER].

Trains teachers and students of paper.yaml, bounds their confidence gaps, prints the table and
whether the paper's orderings hold, and writes benchmarks/results/faithful.json and
docs/images/faithful.png. With --verifiable: verifiable.yaml, plain faithful distillation against
the recipe that is made for bounds. Every network and every bound is a cell in FOLDER, finished or
absent: a run that was killed goes on where it was, and one for fewer sets or students (--sets,
--teachers, --students; it writes -part files) leaves its cells to a later one for more. --quick
takes few seeds, epochs and images, and writes -quick files. EmpLB is `lower`, FaithUB `upper`.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.faithful import paper, picture, verifiable
from benchmarks.record import machine, write

HERE = Path(__file__).parent
IMAGES = HERE.parents[1] / "docs" / "images"
KINDS = "sets", "teachers", "students"


def main() -> None:
    """Run what is asked for and record it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--verifiable", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("kdguard-work/faithful"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the specification's")
    for kind in KINDS:
        parser.add_argument(f"--{kind}", nargs="+", help="instead of all")
    given = parser.parse_args()
    chosen = {kind: getattr(given, kind) for kind in KINDS if getattr(given, kind)}
    if chosen and (given.quick or given.verifiable):
        parser.error(f"--{next(iter(chosen))} is for the whole comparison of the paper.")
    torch.set_num_threads(given.threads)
    name = "verifiable" if given.verifiable else "paper"
    spec = yaml.safe_load((HERE / f"{name}.yaml").read_text())
    if given.seeds:
        spec["seeds"] = given.seeds
        spec["quick"]["seeds"] = given.seeds
    for kind, names in chosen.items():
        spec = only(spec, kind, names)
    suffix = "-quick" if given.quick else "-part" if chosen else ""
    body = {**machine(), "spec": spec, "quick": given.quick, "threads": given.threads}
    if given.verifiable:
        rows = verifiable.run({**spec, **spec["quick"]} if given.quick else spec, given.folder)
        print(verifiable.table(rows))
        body |= {"verdict": verifiable.verdict(rows), "rows": rows}
        picture.draw_verifiable(rows, IMAGES / f"faithful-verifiable{suffix}.png")
        print(f"wrote {write(f'faithful-verifiable{suffix}.json', body)}")
        return
    rows, refused = paper.run(spec, given.folder, quick=given.quick)
    means, held = paper.summary(rows), paper.orderings(rows)
    print(paper.table(spec, means))
    for each in held:
        print(
            f"{each['set']:14} {each['eps']:6g} {each['method']:7} {each['statement']:28} "
            f"in {each['holds']} of {each['seeds']}"
        )
    for row in refused:
        print(f"{row['set']:14} {row['teacher']:7} {row['student']} (seed {row['seed']}): diverged")
    body |= {"summary": means, "orderings": held, "refused": refused, "rows": rows}
    picture.draw(rows, IMAGES / f"faithful{suffix}.png")
    print(f"wrote {write(f'faithful{suffix}.json', body)}")


def only(spec: dict[str, Any], kind: str, names: list[str]) -> dict[str, Any]:
    """The specification with these sets, teachers or students alone."""
    unknown = set(names) - set(spec.get(kind, ()))
    if unknown:
        raise SystemExit(f"no {kind} {', '.join(sorted(unknown))}; known: {', '.join(spec[kind])}")
    return {**spec, kind: {name: spec[kind][name] for name in names}}


if __name__ == "__main__":
    main()
