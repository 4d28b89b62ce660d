"""The table of bounds: python -m benchmarks.certify [--rows A,B] [--pairs 1,2] [--images N] …

Trains the pairs of pairs.yaml and of convolutions.yaml (once, into --folder; refused where their
sha256 is not the committed one, unless --other-machine), takes the first images of the split that
the reference gets right, and certifies the exported bytes, row by row. Prints, for each pair, the
ratio of means (upper bound to the largest gap found), the share of images that are closed, seconds
an image (attack and bounds, wall-clock and processor), and what the row is measured against; and
writes benchmarks/results/certify-table.json. Finished batches of 25 images are kept in --folder
and used again after a kill, until the package's code changes.

--train      trains and checks the networks, and ends
--rows       names in the rows of both files, and `roots` (time of all classes against the top one)
--nodes      budgets instead of the rows' own, N or N,N,…: the curve of ratio against time
--seconds    a budget of time an image: nodes are chosen for it, on training images
--split      test, or train for trials: nothing is chosen on test images
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.certify import rows, training
from benchmarks.certify.rows import Asked
from benchmarks.record import machine, write
from mlflow_kdguard import data
from mlflow_kdguard.data import Dataset

HERE = Path(__file__).parent
SPECS = ("pairs", "convolutions")
ROOTS = "roots"
CLEAN = 0.80
"""Least accuracy of a reference on the test images."""
FIRST = 500
"""Nodes of the first trial for a budget of seconds."""
HEAD = (
    "row          pair  nodes    n  witness  upper   ratio  (real)  limit  closed  "
    "s/image  cpu    float32   GiB"
)


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a specification: what is asked, and what it is measured against."""

    name: str
    spec: str
    asked: Asked
    against: dict[str, float]


def main() -> None:
    """Train or find the pairs, certify, print, record."""
    given = _options()
    specs = {name: yaml.safe_load((HERE / f"{name}.yaml").read_text()) for name in SPECS}
    chosen = _chosen(specs, given.rows)
    body: dict[str, Any] = {"threads": given.threads, "split": given.split, "networks": {}}
    done: list[dict[str, Any]] = []
    for name in SPECS:
        mine = [row for row in chosen if row.spec == name]
        numbers = [n for n in specs[name]["seeds"] if given.pairs is None or n in given.pairs]
        if mine or given.train:
            found, told = _judged(specs[name], mine, numbers, given, given.folder / name)
            done += found
            body["networks"][name] = told
    if not given.train:
        body["rows"] = done
        body["gib"] = rows.gib()
        path = write(given.out, {**machine(), **body})
        print(f"largest resident size {body['gib']:.2f} GiB; wrote {path}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=lambda text: text.split(","))
    parser.add_argument("--pairs", type=_numbers)
    parser.add_argument("--images", type=int, default=100)
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--nodes", type=_numbers)
    budget.add_argument("--seconds", type=float)
    parser.add_argument("--split", choices=("test", "train"), default="test")
    parser.add_argument("--method", default="branch")
    parser.add_argument("--folder", type=Path, default=HERE / "trained")
    parser.add_argument("--out", default="certify-table.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--other-machine", action="store_true")
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _chosen(specs: dict[str, Any], names: list[str] | None) -> list[Row]:
    known = {
        row: Row(row, spec, _asked(told), told)
        for spec, body in specs.items()
        for row, told in body["rows"].items()
    }
    known[ROOTS] = Row(ROOTS, SPECS[0], Asked("fd", 0.025, "top", "crown", 1), {"limit": 3.0})
    unknown = set(names or ()) - set(known)
    if unknown:
        raise SystemExit(f"no row {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return [row for name, row in known.items() if names is None or name in names]


def _asked(told: dict[str, Any]) -> Asked:
    return Asked(told["student"], told["eps"], told.get("classes", "top"), "branch", told["nodes"])


def _judged(
    spec: dict[str, Any],
    chosen: list[Row],
    numbers: list[int],
    given: argparse.Namespace,
    folder: Path,
) -> tuple[list[dict[str, Any]], dict[int, Any]]:
    """All rows of the pairs of one specification, and what is known of the networks."""
    done, told = [], {}
    for number in numbers:
        networks = training.train(spec, number, folder)
        digests = training.check(spec, networks, other_machine=given.other_machine)
        committed = digests == spec["sha256"].get(number)
        print(f"pair {number} of {folder.name}: {'as' if committed else 'NOT as'} committed")
        told[number] = {"sha256": digests, "as_committed": committed}
        if given.train:
            continue
        told[number] |= _accuracies(spec, networks)
        images = rows.right(networks.read(training.REFERENCE), data.load(spec[given.split]),
                            given.images)  # fmt: skip
        print(HEAD)
        for row in chosen:
            done += _row(row, networks, images, spec, given)
    return done, told


def _accuracies(spec: dict[str, Any], networks: training.Networks) -> dict[str, Any]:
    test = data.load(spec["test"])
    found = {
        name: rows.accuracy(networks.read(name), test)
        for name in (training.REFERENCE, *spec["students"])
    }
    met = found[training.REFERENCE] >= CLEAN
    print(f"accuracy {found}; the reference's is {'at least' if met else 'BELOW'} {CLEAN}")
    return {"accuracy": found}


def _row(
    row: Row,
    networks: training.Networks,
    images: Dataset,
    spec: dict[str, Any],
    given: argparse.Namespace,
) -> list[dict[str, Any]]:
    """One row at each budget."""
    pair = networks.read(training.REFERENCE), networks.read(row.asked.student)
    work = rows.Work(pair, given.threads, networks.folder / "batches")
    # Imports, first calls and loading are not part of any row.
    rows.judged(pair, images.take(range(1)), replace(row.asked, nodes=2))
    if row.name == ROOTS:
        return [{"pair": networks.number, **_roots(row, work, images)}]
    asked = replace(row.asked, method=given.method)
    budgets = given.nodes or [asked.nodes]
    if given.seconds is not None:
        trial = rows.right(pair[0], data.load(spec["train"]), rows.BATCH * given.threads)
        budgets = [_worth(given.seconds, work, trial, asked)]
    found = []
    for nodes in budgets:
        one = replace(asked, nodes=nodes)
        figures = rows.figures(rows.samples(work, images, one), one)
        found.append({"row": row.name, "pair": networks.number, **figures, **_met(row, figures)})
        print(_line(found[-1]), flush=True)
    return found


def _worth(seconds: float, work: rows.Work, trial: Dataset, asked: Asked) -> int:
    """Nodes that take about `seconds` an image, by two trials on training images."""
    nodes = FIRST
    for _ in range(2):
        one = replace(asked, nodes=nodes)
        spent = rows.figures(rows.samples(work, trial, one), one)["seconds"]
        nodes = max(1, int(nodes * seconds / spent))
    return nodes


def _roots(row: Row, work: rows.Work, images: Dataset) -> dict[str, Any]:
    """Processor seconds of joint CROWN for all classes, against the top one."""
    found = {}
    for classes in ("top", "all"):
        asked = replace(row.asked, classes=classes)
        found[classes] = rows.figures(rows.samples(work, images, asked), asked)
    ratio = found["all"]["cpu_seconds"] / found["top"]["cpu_seconds"]
    print(f"{row.name}: all classes take {ratio:.2f} times the time of the top one (limit 3)")
    return {"row": row.name, "time_ratio": ratio, "limit": row.against["limit"], **found}


def _met(row: Row, figures: dict[str, Any]) -> dict[str, Any]:
    told = row.against
    near = None
    if "witness" in told:
        near = abs(figures["witness_mean"] / told["witness"] - 1.0) <= 0.3
    return {
        "limit": told["limit"],
        "aim": told.get("aim"),
        "seconds_limit": told["seconds"],
        "witness_near": near,
        "met": figures["ratio"] <= told["limit"] and figures["seconds"] <= told["seconds"],
    }


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['row']:12} {row['pair']:4} {row['budget']:6} {row['n']:4} "
        f"{row['witness_mean']:8.4f}{'' if row['witness_near'] in (True, None) else '!'} "
        f"{row['upper_mean']:6.4f} {row['ratio']:7.3f} {row['ratio_real']:7.3f} "
        f"{row['limit']:6.2f} {row['closed']:7.2f} {row['seconds']:8.2f} "
        f"{row['cpu_seconds']:6.2f} {row['float32_margin_mean']:9.1e} {row['gib']:5.2f}"
        f"{'  met' if row['met'] else ''}"
    )


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
