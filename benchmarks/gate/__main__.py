"""Latency of a gated server against plain ones: `python -m benchmarks.gate [--calls N] [--mib N]`.

Servers on SQLite run side by side, and every call is made on each in turn, so that whatever else
the machine does slows all. A guarded alias may cost 1.5 × the plain call and 1.5 × `sha256sum` of
the same files and 50 ms; every other call may cost 5 % more. Two processes of the very same program
differ by several per cent, for as long as they live: so the other calls are timed in several groups
of fresh servers, each a gated one and two plain ones. What a call costs is the median over the
groups of gated ÷ mean of the two plain ones; beside it stands plain ÷ plain, which is noise alone.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from typing import Any

import requests

from benchmarks import record

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import toys
from flows.gates import Gate, gated
from flows.servers import MlflowServer, serving

API = "/api/2.0/mlflow"
ALLOWED = 1.05
SERVERS = ("gated", "plain", "other")


class Server:
    """One server, asked through one connection."""

    def __init__(self, server: MlflowServer) -> None:
        self.uri, self.session, self._leader = server.uri, requests.Session(), server.process.pid

    def cpu(self) -> float:
        """Seconds of processor time that the server's processes have spent so far."""
        ticks = 0
        for file in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                fields = file.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self._leader:  # of its session
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def ask(self, method: str, route: str, **body: Any) -> dict[str, Any]:
        """One call of MLflow's REST API; the answer must be a yes."""
        where = {"params": body} if method == "GET" else {"json": body}
        answer = self.session.request(method, f"{self.uri}{API}/{route}", timeout=60, **where)
        answer.raise_for_status()
        return dict(answer.json())


def main() -> None:
    """Measure, print, and write benchmarks/results/gate-latency.json."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.gate")
    options.add_argument("--calls", type=int, default=60, help="calls of each kind and group")
    options.add_argument("--groups", type=int, default=7, help="groups of fresh servers")
    options.add_argument("--mib", type=float, default=16.0, help="size of the large model")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        gate = stack.enter_context(gated(Path(folder) / "gated"))
        plain = stack.enter_context(serving(Path(folder) / "plain"))
        body: dict[str, Any] = {"calls": chosen.calls, "groups": chosen.groups}
        body["guarded"] = [
            guarded(gate, plain, 0, chosen.calls),
            guarded(gate, plain, int(chosen.mib * (1 << 20)), max(5, chosen.calls // 4)),
        ]
    body["others"] = others(chosen.groups, chosen.calls)
    for row in [*body["guarded"], *body["others"]]:
        print(row)
    print(record.write("gate-latency.json", body | record.machine()))


def guarded(gate: Gate, plain: MlflowServer, size: int, calls: int) -> dict[str, Any]:
    """Setting a guarded alias on new versions of `size` bytes more than a toy network."""
    name = f"guarded-{size}"
    versions = [(v, f) for v, f in _certified(gate, name, size, calls)]
    there, here = Server(plain), Server(gate.server)
    there.ask("POST", "registered-models/create", name=name)
    there.ask("POST", "model-versions/create", name=name, source="s3://bucket/x")
    ask = {"name": name, "alias": "champion"}
    rows: dict[str, list[float]] = {"plain": [], "gated": [], "again": [], "sha256sum": []}
    spent: dict[str, float] = {"plain": 0.0, "gated": 0.0, "again": 0.0}
    for version, folder in versions:
        before = there.cpu()
        _timed(
            rows["plain"], lambda: there.ask("POST", "registered-models/alias", version="1", **ask)
        )
        spent["plain"] += there.cpu() - before
        files = [str(path) for path in sorted(folder.iterdir())]
        _timed(
            rows["sha256sum"],
            lambda files=files: subprocess.run(
                ["sha256sum", *files], check=True, stdout=subprocess.DEVNULL
            ),
        )
        for kind in ("gated", "again"):
            before = here.cpu()
            _timed(
                rows[kind],
                lambda v=version: here.ask("POST", "registered-models/alias", version=v, **ask),
            )
            spent[kind] += here.cpu() - before
    middle = {kind: median(times) for kind, times in rows.items()}
    limit = 1.5 * middle["plain"] + 1.5 * middle["sha256sum"] + 0.05
    return {
        "bytes": sum(path.stat().st_size for path in versions[0][1].iterdir()),
        "n": calls,
        "median_ms": {kind: round(seconds * 1e3, 2) for kind, seconds in middle.items()},
        "limit_ms": round(limit * 1e3, 2),
        "cpu_ms": {kind: round(seconds / calls * 1e3, 2) for kind, seconds in spent.items()},
        "ok": max(middle["gated"], middle["again"]) <= limit,
    }


def others(groups: int, calls: int) -> list[dict[str, Any]]:
    """Every other kind of call, in turn on the servers of each group."""
    rows: dict[str, list[dict[str, float]]] = {}
    for number in range(groups):
        for kind, middle in group(calls, backwards=bool(number % 2)).items():
            rows.setdefault(kind, []).append(middle)
    return [_compared(kind, middles) for kind, middles in rows.items()]


def group(calls: int, *, backwards: bool) -> dict[str, dict[str, float]]:
    """Medians of one group of fresh servers: seconds by kind of call and server."""
    order = list(SERVERS)
    rows: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = {}
        for which in reversed(order) if backwards else order:
            place = Path(folder) / which
            if which == "gated":
                servers[which] = Server(stack.enter_context(gated(place)).server)
            else:
                servers[which] = Server(stack.enter_context(serving(place)))
        for number in range(calls):
            first = number % len(order)  # Whoever is asked later finds warm caches: take turns.
            for kind, call in _calls(f"model-{number}"):
                for which in order[first:] + order[:first]:
                    times = rows.setdefault(kind, {}).setdefault(which, [])
                    _timed(times, lambda which=which, call=call: call(servers[which]))
    return {
        kind: {which: median(seconds) for which, seconds in times.items()}
        for kind, times in rows.items()
    }


def _calls(name: str) -> Iterator[tuple[str, Callable[[Server], Any]]]:
    """The life of one model, call by call."""

    def post(route: str, **body: Any) -> Callable[[Server], Any]:
        return lambda server: server.ask("POST", route, **body)

    version = {"name": name, "version": "1"}
    yield "create model", post("registered-models/create", name=name)
    yield "create version", post("model-versions/create", name=name, source="s3://bucket/x")
    yield "tag version", post("model-versions/set-tag", key="mine", value="x", **version)
    yield "tag model", post("registered-models/set-tag", name=name, key="mine", value="x")
    yield "free alias", post("registered-models/alias", alias="candidate", **version)
    yield "get model", lambda server: server.ask("GET", "registered-models/get", name=name)
    yield "get version", lambda server: server.ask("GET", "model-versions/get", **version)
    yield (
        "get by alias",
        lambda server: server.ask("GET", "registered-models/alias", name=name, alias="candidate"),
    )
    yield "search", lambda server: server.ask("GET", "registered-models/search", max_results=10)
    yield (
        "stage",
        post(
            "model-versions/transition-stage",
            stage="Staging",
            archive_existing_versions=False,
            **version,
        ),
    )
    yield "rename", post("registered-models/rename", name=name, new_name=f"{name}-renamed")
    version = {"name": f"{name}-renamed", "version": "1"}
    yield "delete version", lambda server: server.ask("DELETE", "model-versions/delete", **version)
    yield (
        "delete model",
        lambda server: server.ask("DELETE", "registered-models/delete", name=f"{name}-renamed"),
    )


def _compared(kind: str, middles: list[dict[str, float]]) -> dict[str, Any]:
    ratios = [2 * at["gated"] / (at["plain"] + at["other"]) for at in middles]
    return {
        "call": kind,
        "median_ms": {w: round(median(at[w] for at in middles) * 1e3, 2) for w in SERVERS},
        "ratio": round(median(ratios), 3),
        "ratios": sorted(round(ratio, 3) for ratio in ratios),
        "plain_by_plain": sorted(round(at["other"] / at["plain"], 3) for at in middles),
        "ok": median(ratios) <= ALLOWED,
    }


def _certified(gate: Gate, name: str, size: int, calls: int) -> Iterator[tuple[str, Path]]:
    """New versions with a certificate each, and the folders in which the server has their files."""
    from mlflow_kdguard.registry.bundle import student_files

    side = max(2, int((size / 4 / 5) ** 0.5))
    for number in range(calls):
        network = toys.onnx_tiny(seed=number, shape=(1, side, side))
        version = gate.certified(name, student_files(network))
        found = gate.client.get_model_version(name, version)
        yield version, gate.server.artifacts / found.source.partition(":/")[2]


def _timed(times: list[float], call: Callable[[], Any]) -> None:
    start = time.perf_counter()
    call()
    times.append(time.perf_counter() - start)


if __name__ == "__main__":
    main()
