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


def command(folder: Path, *more: str, uri: str | None = None) -> list[str]:
    """The command line of the digits story in `folder`."""
    code = "from mlflow_kdguard_cli.main import main; main()"
    database = uri or f"sqlite:///{folder / 'mlflow.db'}"
    return [
        sys.executable,
        "-c",
        code,
        "run",
        "-c",
        str(DIGITS),
        "--out",
        str(folder / "work"),
        "--tracking-uri",
        database,
        "--json",
        *more,
    ]


def environment() -> dict[str, str]:
    """One thread, so that results repeat; no telemetry."""
    return os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


def told(folder: Path, *more: str, uri: str | None = None) -> dict[str, Any]:
    """Run the story to its end; its document."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        command(folder, *more, uri=uri),
        capture_output=True,
        text=True,
        env=environment(),
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def student(document: dict[str, Any], name: str) -> dict[str, Any]:
    """One row of the story."""
    return next(row for row in document["students"] if row["student"] == name)


def run_states(uri: str) -> list[str]:
    """The status of every run in the store."""
    client = mlflow.MlflowClient(uri)
    ids = [e.experiment_id for e in client.search_experiments()]
    return [run.info.status for run in client.search_runs(ids, max_results=1000)]
