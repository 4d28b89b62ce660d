"""Running `kdguard run` as users do: a process, a folder, a database."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "examples" / "digits.yaml"


START = [sys.executable, "-c", "from mlflow_kdguard_cli.main import main; main()"]


def command(folder: Path) -> list[str]:
    """The command line of the digits story in `folder`, which must then hold `mlflow.db`."""
    database = f"sqlite:///{folder / 'mlflow.db'}"
    return [
        *(*START, "run", "-c", str(DIGITS), "--out", str(folder / "work")),
        *("--tracking-uri", database, "--json"),
    ]


def environment() -> dict[str, str]:
    """One thread, so that results repeat; no telemetry."""
    return os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


def told(argv: list[str], *, expect: int) -> dict[str, Any]:
    """Run a story to its end with that exit code; its document."""
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == expect, done.stderr[-3000:]
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def student(document: dict[str, Any], name: str) -> dict[str, Any]:
    """One row of the story."""
    return next(row for row in document["students"] if row["student"] == name)


def run_states(uri: str, *names: str) -> list[str]:
    """The status of every run in the store, or in the experiments with these names."""
    client = mlflow.MlflowClient(uri)
    found = client.search_experiments()
    ids = [e.experiment_id for e in found if not names or e.name in names]
    return [run.info.status for run in client.search_runs(ids, max_results=1000)]
