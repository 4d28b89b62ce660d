"""Writers at once, with and without the log: python -m benchmarks.log [--writers N] [--seconds S].

Processes set an alias of their own on one model in one SQLite file, as fast as they can: first with
MLflow's plain store, then in a transaction that also takes the log's lock, appends a signed entry
and publishes the head. Recorded: how many were set, how long each took, and every error. After the
second run the whole log is verified. Writes benchmarks/results/log-writers.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import machine, write
from mlflow_kdguard.attest.signing import Signer, keygen
from mlflow_kdguard.plugin import log

MODEL = "digits"


def store_on(uri: str) -> Any:
    """MLflow's plain store."""
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore

    return SqlAlchemyStore(uri)


def set_plainly(store: Any, alias: str, _folder: Path, _signer: Signer) -> None:
    """As the plain server does."""
    store.set_registered_model_alias(MODEL, alias, 1)


def set_logged(store: Any, alias: str, folder: Path, signer: Signer) -> None:
    """The lock, the alias, the entry, the commit, the published head."""
    from mlflow.store.model_registry.dbmodels.models import SqlRegisteredModelAlias as Alias

    event = log.Event(actor=alias, action="promote", model=MODEL, version="1", alias=alias)
    with store.ManagedSessionMaker(read_only=False) as session:
        log.lock(session)
        found = store._get_sql_model_version(session, MODEL, 1)
        row = Alias(workspace=found.workspace, name=MODEL, alias=alias, version=1)
        session.merge(row)
        entry = log.append(session, event, now=datetime.now(UTC), signer=signer)
    log.publish(entry.head, folder / "heads.jsonl")


def work(mode: str, folder: Path, who: str, seconds: float) -> None:
    """One writer: prints a JSON list of milliseconds, and one of errors."""
    store, signer = store_on(f"sqlite:///{folder / 'registry.db'}"), Signer.load(folder / "log.pem")
    act = {"plain": set_plainly, "logged": set_logged}[mode]
    took, errors = [], []
    print("ready", flush=True)
    sys.stdin.readline()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.perf_counter()
        try:
            act(store, f"alias-{who}", folder, signer)
        except Exception as error:  # whatever it is, it is counted
            errors.append(f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
        took.append((time.perf_counter() - start) * 1000)
    print(json.dumps([took, errors]))


def run(mode: str, folder: Path, writers: int, seconds: float) -> dict[str, Any]:
    """All writers at once."""
    command = [sys.executable, "-m", "benchmarks.log", "--work", mode, "--folder", str(folder)]
    started = [
        subprocess.Popen(
            [*command, "--who", str(number), "--seconds", str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(writers)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    took: list[float] = []
    errors: list[str] = []
    for process in started:
        out, _ = process.communicate(timeout=seconds + 120)
        mine, wrong = json.loads(out)
        took, errors = took + mine, errors + wrong
    return {
        "set": len(took) - len(errors),
        "errors": sorted(set(errors)),
        "failed": len(errors),
        "milliseconds": {
            f"p{p:g}": round(float(np.percentile(took, p)), 2) for p in (50, 95, 99, 100)
        },
    }


def measure(folder: Path, writers: int, seconds: float) -> dict[str, Any]:
    """Both modes on a database each, and the log's verification after the second."""
    body: dict[str, Any] = {"writers": writers, "seconds": seconds, "load": os.getloadavg()[0]}
    for mode in ("plain", "logged"):
        place = folder / mode
        place.mkdir()
        signer = keygen(place / "log.pem", owner="server", role="builder")
        store = store_on(f"sqlite:///{place / 'registry.db'}")
        store.create_registered_model(MODEL)
        store.create_model_version(MODEL, "file:///nowhere")
        log.prepare(store.engine)
        body[mode] = run(mode, place, writers, seconds)
        print(mode, body[mode])
        if mode == "logged":
            start = time.perf_counter()
            with store.engine.connect() as connection:
                heads = place / "heads.jsonl"
                report = log.verify(connection, verifiers=[signer.verifier], heads=heads)
            body["verify"] = {
                "ok": report.ok,
                "entries": report.entries,
                "published": report.published,
                "seconds": round(time.perf_counter() - start, 2),
            }
            print(body["verify"])
    return body


def main() -> None:
    """Measure and record, or be one of the writers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--writers", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--who", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work, given.folder, given.who, given.seconds)
        return
    with tempfile.TemporaryDirectory() as folder:
        body = measure(Path(folder), given.writers, given.seconds)
    write("log-writers.json", machine() | body)


if __name__ == "__main__":
    main()
