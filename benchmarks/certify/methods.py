"""Bounds side by side: python -m benchmarks.certify.methods [SPEC] [--keep FOLDER] [--threads N].

Trains the pair of the specification (default: fashion-mlp.yaml beside this file), exports both
networks, and certifies the exported bytes once for each row. Prints the table and writes
benchmarks/results/certify-NAME.json. `s/image` is wall-clock time over images, `cpu` processor
time: they differ with threads and where the machine has other work.
With --keep, trained networks are kept in FOLDER and used again; give --reference and --student to
judge networks from elsewhere.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.certify import training
from benchmarks.record import machine, write
from mlflow_kdguard import data
from mlflow_kdguard.certify import certify
from mlflow_kdguard.config import CertifySection, DistillSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.files import read_bytes
from mlflow_kdguard.measure import Session
from mlflow_kdguard.records import CertifyReport

HERE = Path(__file__).parent
CPU = torch.device("cpu")
HEAD = "bound     classes   eps    n   lower   upper  ratio   p95   proved  control  s/image  cpu"


def main() -> None:
    """Train or find the pair, certify it, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", type=Path, nargs="?", default=HERE / "fashion-mlp.yaml")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--student", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    spec = yaml.safe_load(given.spec.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        files = given.reference, given.student
        if files[0] is None or files[1] is None:
            files = folder / "reference.onnx", folder / "student.onnx"
            if not all(file.exists() for file in files):
                train(spec, *files)
        pair = read_bytes(files[0], what="the reference"), read_bytes(files[1], what="the student")
    test = data.load(spec["test"])
    rows = measure(spec, pair, test)
    body = {
        "spec": spec,
        "threads": given.threads,
        "accuracy": accuracies(pair, test),
        "rows": rows,
    }
    path = write(f"certify-{given.spec.stem}.json", {**machine(), **body})
    print(f"accuracy {body['accuracy']}\nwrote {path}")


def train(spec: dict[str, Any], reference: Path, student: Path) -> None:
    """The teacher by Madry's training, the student by faithful distillation from it."""
    images, seed, began = data.load(spec["train"]), spec["seed"], time.monotonic()
    teacher = training.teacher(spec["teacher"], images, seed)
    pupil = training.student(DistillSection(**spec["student"]), teacher, images, seed)
    for net, path in ((teacher, reference), (pupil, student)):
        training.export(net, path, images)
    print(f"trained in {time.monotonic() - began:.0f} s")


def measure(spec: dict[str, Any], pair: tuple[bytes, bytes], test: Dataset) -> list[dict[str, Any]]:
    """One certification a row; the first, small one pays for warming up."""
    certify(*pair, test, config=CertifySection(samples=2), device=CPU)
    rows = []
    print(HEAD)
    for row in spec["rows"]:
        began = time.process_time(), time.monotonic()
        report = certify(*pair, test, config=CertifySection(**row), device=CPU)
        spent = time.process_time() - began[0], time.monotonic() - began[1]
        rows.append(_row(report, *(seconds / report.summary.n for seconds in spent)))
        print(_line(rows[-1]))
    return rows


def _row(report: CertifyReport, cpu: float, wall: float) -> dict[str, Any]:
    summary = report.summary
    return {
        "method": report.samples[0].method,
        "classes": report.classes,
        "norm": report.norm,
        "eps": report.eps,
        "n": summary.n,
        "lower_mean": summary.lower_mean,
        "upper_mean": summary.upper_mean,
        "ratio": summary.upper_mean / summary.lower_mean if summary.lower_mean else None,
        "upper_p95": summary.upper_p95,
        "share_within": summary.share_within,
        "control_gap_mean": report.control.gap_mean,
        "seconds_per_image": wall,
        "cpu_seconds_per_image": cpu,
        "delta": report.delta,
    }


def _line(row: dict[str, Any]) -> str:
    proved = row["share_within"][f"{row['delta']:g}"]
    return (
        f"{row['method']:9} {row['classes']:5} {row['eps']:7.3f} {row['n']:4} "
        f"{row['lower_mean']:7.4f} {row['upper_mean']:7.4f} {row['ratio'] or 0:6.2f} "
        f"{row['upper_p95']:5.3f} {proved:8.2f} {row['control_gap_mean']:8.3f} "
        f"{row['seconds_per_image']:8.3f} {row['cpu_seconds_per_image']:5.3f}"
    )


def accuracies(pair: tuple[bytes, bytes], test: Dataset) -> dict[str, float]:
    """Test accuracy of both files."""
    found = {}
    for name, model in zip(("reference", "student"), pair, strict=True):
        logits = Session(model, device=CPU, where=name).logits(test.x, 256)
        found[name] = float((logits.argmax(1) == test.y).mean())
    return found


if __name__ == "__main__":
    main()
