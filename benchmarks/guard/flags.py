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
from dataclasses import dataclass
from functools import partial
from typing import Any

from scipy.stats import beta

from benchmarks.guard import command, sweep
from benchmarks.guard.cells import Cells
from benchmarks.guard.rows import Guard, Row, chosen, rows
from benchmarks.record import machine, write
from mlflow_kdguard.errors import UsageError


@dataclass(frozen=True, slots=True)
class Asked:
    """Whose audit, of which pair's teachers."""

    cells: Cells
    row: Row
    guard: Guard


def main() -> None:
    """Train, audit, print, record; end with the command line's exit codes."""
    given = _options()
    with command.ended(given.folder):
        _run(given)


def _run(given: argparse.Namespace) -> None:
    begun = command.begin(given)
    (guard,) = begun.named([given.guard]).values()
    if guard.audit.detectors != ("profile",):
        raise UsageError(
            f"the guard {given.guard!r} does not ask the profile.",
            remedy="Name one whose audit.detectors is [profile].",
        )
    row = chosen(list(rows(begun.spec)), None, given.pair and [given.pair], None)[0]
    asked, first = Asked(begun.cells, row, guard), given.first
    _one(asked, first)  # what all audits share, the calibration, is made first
    seeds = range(first, first + given.count)
    told = sweep.each(partial(_one, asked), seeds, jobs=given.jobs, what="teachers")
    flagged = [each["seed"] for each in told if each["flagged"]]
    bound = upper(len(flagged), len(told))
    largest = max(told, key=lambda each: each["lead"])
    print(
        f"{len(flagged)} of {len(told)} clean teachers flagged (at most {bound:.3f} of all, 95 %); "
        f"largest lead {largest['lead']:.2f}, of class {largest['target']}, seed {largest['seed']}"
    )
    body = {"guard": guard.document(), "pair": row.pair, "teachers": told,
            "flagged": flagged, "upper": bound}  # fmt: skip
    print(f"wrote {write(given.out, {**machine(), **body})}")


def _one(asked: Asked, seed: int) -> dict[str, Any]:
    net = asked.cells.plain(asked.row, seed)
    report, _ = asked.cells.audited(net, asked.guard.audit, seed)
    (found,) = report.detectors
    kept = ("radius", "own", "leads")
    return {"seed": seed, "lead": found.score, "target": found.target,
            "flagged": found.details["flagged"],
            "looks": [{key: look[key] for key in kept} for look in found.details["looks"]],
            }  # fmt: skip


def upper(k: int, n: int) -> float:
    """Clopper and Pearson's one-sided upper bound of a rate at 95 %."""
    return 1.0 if k == n else float(beta.ppf(0.95, k + 1, n - k))


def _options() -> argparse.Namespace:
    parser = command.parser(__doc__ or "", out="guard-flags.json")
    parser.add_argument("--guard", default="guard")
    parser.add_argument("--pair")
    parser.add_argument("--count", type=command.count, default=60)
    parser.add_argument("--first", type=command.count, default=1000)
    return parser.parse_args()


if __name__ == "__main__":
    main()
