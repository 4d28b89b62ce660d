"""Does the guard's audit flag clean teachers? python -m benchmarks.guard.flags [--count 60] …

Trains clean teachers of a pair from seeds that no row and no calibration uses, audits each as the
guard would, and writes how far their foremost classes lead and which were flagged to
benchmarks/results/guard-flags.json, with the exact (Clopper-Pearson) upper 95 % bound of the rate
of false flags. Teachers and audits are kept in --folder: a run that was killed goes on.

--config FILE          another specification (default: spec.yaml beside this file)
--guard, --pair        whose audit, on which pair (default: guard; the first pair)
--count, --first       how many teachers, and the first one's seed
--jobs                 processes (default: 1)
--device, --data-root  where it runs (default: CUDA where there is one), and where images are
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from scipy.stats import beta

from benchmarks.guard import specification
from benchmarks.guard.cells import Cells
from benchmarks.guard.ending import ended
from benchmarks.guard.rows import Guard, Row, chosen, guards, rows
from benchmarks.record import machine, write
from mlflow_kdguard import devices
from mlflow_kdguard.errors import UsageError

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Asked:
    """Whose audit, of which pair's teachers."""

    cells: Cells
    row: Row
    guard: Guard


def main() -> None:
    """Train, audit, print, record; end with the command line's exit codes."""
    given = _options()
    with ended(given.folder):
        _run(given)


def _run(given: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    spec = specification.read(given.config)
    known = guards(spec)
    if given.guard not in known:
        raise UsageError(f"there is no guard {given.guard}.", remedy=f"Known: {', '.join(known)}.")
    row = chosen(list(rows(spec)), None, given.pair and [given.pair], None)[0]
    device = devices.pick(given.device)
    cells = Cells(given.folder, spec["sets"], device=device, root=given.data_root)
    asked = Asked(cells, row, known[given.guard])
    seeds = range(given.first, given.first + given.count)
    cells.audited(cells.plain(row, seeds[0]), asked.guard.audit, seeds[0])  # calibrates, once
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        told = list(track(pool.map(partial(_one, asked), seeds), "teachers", total=len(seeds)))
    flagged = [each["seed"] for each in told if each["flagged"]]
    bound = upper(len(flagged), len(told))
    largest = max(told, key=lambda each: each["lead"])
    print(
        f"{len(flagged)} of {len(told)} clean teachers flagged (at most {bound:.3f} of all, 95 %); "
        f"largest lead {largest['lead']:.2f}, of class {largest['target']}, seed {largest['seed']}"
    )
    body = {"guard": asked.guard.document(), "pair": row.pair, "teachers": told,
            "flagged": flagged, "upper": bound}  # fmt: skip
    print(f"wrote {write(given.out, {**machine(), **body})}")


def _one(asked: Asked, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    net = asked.cells.plain(asked.row, seed)
    report, _ = asked.cells.audited(net, asked.guard.audit, seed)
    (found,) = report.detectors
    return {"seed": seed, "lead": found.score, "target": found.target,
            "flagged": found.details["flagged"],
            "looks": [{"radius": look["radius"], "leads": look["leads"]}
                      for look in found.details["looks"]]}  # fmt: skip


def upper(k: int, n: int) -> float:
    """Clopper and Pearson's one-sided upper bound of a rate at 95 %."""
    return 1.0 if k == n else float(beta.ppf(0.95, k + 1, n - k))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=HERE / "spec.yaml")
    parser.add_argument("--guard", default="guard")
    parser.add_argument("--pair")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--first", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("kdguard-work/guard"))
    parser.add_argument("--out", default="guard-flags.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
