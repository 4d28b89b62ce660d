"""python -m benchmarks.gate.load [--database KIND] [--clients N] [--seconds S]

Many clients at a gated and at a plain server, with the same mix of requests: promotions of
certified versions, promotions that a gate refuses, reads, and writes that it does not guard.
Reported for each: answers by status, requests a second, medians, and errors; for the gated one
also whether the log holds exactly one record for every promotion and every refusal.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from benchmarks import record
from flows.attacks.crowd import Mix, Tally, crowd
from flows.attacks.database import killable
from flows.attacks.opened import gated
from flows.test_attack_gate import new_database


def main() -> None:
    """Run both servers, one after the other, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--database", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=60)
    asked = parser.parse_args()
    body: dict[str, Any] = {"asked": vars(asked)} | record.machine()
    for name in ("plain", "gated"):
        with tempfile.TemporaryDirectory() as folder, _database(Path(folder), asked.database) as at:
            body[name] = measured(Path(folder), at, name == "gated", asked.clients, asked.seconds)
        print(name, body[name])
    print(record.write(f"gate-load-{asked.database}.json", body))


def measured(folder: Path, database: str, guarded: bool, clients: int, seconds: float) -> Any:
    """What a crowd is answered by one server."""
    with gated(folder / "w", database, guarded=guarded) as w:
        mix = Mix.of(w, models=max(2, clients // 5))
        before = len(w.log()) if guarded else 0
        tally = crowd(w, mix.jobs, clients=clients, seconds=seconds)
        return summary(tally, seconds) | (_records(w.log()[before:], tally) if guarded else {})


def summary(tally: Tally, seconds: float) -> dict[str, Any]:
    """Answers, rates and medians; seconds are milliseconds here."""
    return {
        "answers": {f"{job} {status}": n for (job, status), n in sorted(tally.answers.items())},
        "per_second": round(sum(tally.answers.values()) / seconds, 1),
        "median_ms": {job: round(1000 * tally.median(job), 1) for job in sorted(tally.seconds)},
        "errors": len(tally.oddities),
    }


def _records(records: list[dict[str, Any]], tally: Tally) -> dict[str, Any]:
    count = {a: sum(r["action"] == a for r in records) for a in ("promote", "refuse")}
    refused = tally.count("refuse", 403) + tally.count("promote", 403)
    return {
        "records": count,
        "lost_or_doubled": abs(count["promote"] - tally.count("promote", 200))
        + abs(count["refuse"] - refused),
    }


@contextlib.contextmanager
def _database(folder: Path, kind: str) -> Iterator[str]:
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'mlflow.db'}"
        return
    with killable(folder / "pg") as server:
        yield new_database(server.uri, "load")


if __name__ == "__main__":
    main()
