"""What is certified about a smoothed pair: python -m benchmarks.smooth [--keep FOLDER].

Trains a residual reference and student on Fashion-MNIST under noise, certifies them on drawn test
images at several numbers of draws, compares bounds that the same draws allow (on training images
that neither network saw), and times networks of ResNet's size. Prints the tables and writes
benchmarks/results/smooth-fashion.json and docs/images/smooth-fashion.png. With --keep, the
networks are kept in FOLDER and not trained again. `memory` is the largest resident size so far.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import machine, write
from benchmarks.smooth import alternatives, pair
from mlflow_kdguard import data, noise
from mlflow_kdguard.certify.curve import draw
from mlflow_kdguard.certify.smooth import certify_smooth
from mlflow_kdguard.config import SmoothSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.measure import Session, measure, opened, softmax
from mlflow_kdguard.records import SmoothReport

SPEC: dict[str, Any] = {
    "train": "fashion-mnist#train[:8000]", "compare": "fashion-mnist#train[50000:]",
    "test": "fashion-mnist#test", "reference": "resnet8:8", "student": "resnet8:4",
    "sigma": 0.25, "epochs": 4, "seed": 1,
}  # fmt: skip
ROWS = ({"draws": 200}, {"draws": 1000}, {"draws": 5000, "samples": 10})
COMPARED, SHIFTS = 20, (0.0, 0.25, 0.5, 1.0)
SIZES = (("torchvision:resnet18", (3, 224, 224), 16), ("wrn-16-4", (3, 32, 32), 64))
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "smooth-fashion.png"


def main() -> None:
    """Train or find the pair, certify it, compare, time, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        blobs = _pair(folder)
        test = data.load(SPEC["test"])
        nets = [opened(b, test, where="a network", device=pair.CPU, threads=given.threads)
                for b in blobs]  # fmt: skip
        points = [measure(b, test, device=pair.CPU).accuracy.rate for b in blobs]
        print(f"accuracy without noise: reference {points[0]:.3f}, student {points[1]:.3f}")
        rows = _certified(nets, test)
        compared = _compared(nets, data.load(SPEC["compare"]))
        times = _times(folder, given.threads)
    body = {"spec": SPEC, "accuracy": points, "threads": given.threads, "rows": rows,
            "bounds": compared, "times": times}  # fmt: skip
    print(f"wrote {write('smooth-fashion.json', {**machine(), **body})}")


def _pair(folder: Path) -> tuple[bytes, bytes]:
    files = [folder / f"{name}.onnx" for name in ("reference", "student")]
    if not all(file.exists() for file in files):
        began = time.monotonic()
        keys = ("reference", "student", "sigma", "epochs", "seed")
        pair.trained(data.load(SPEC["train"]), folder, **{key: SPEC[key] for key in keys})
        print(f"trained in {time.monotonic() - began:.0f} s")
    return files[0].read_bytes(), files[1].read_bytes()


def _certified(nets: list[Session], test: Dataset) -> list[dict[str, Any]]:
    rows, reports = [], []
    print("draws  images  r     upper  within .3  share>=  control   s/image   GiB")
    for row in ROWS:
        section = SmoothSection(sigma=SPEC["sigma"], **row)
        report = certify_smooth(nets[0], nets[1], test, config=section)
        reports.append(report)
        rows.append(_row(report))
        for point in report.curve:
            print(
                f"{report.draws:5} {len(report.samples):6} {point.radius:6.3f} "
                f"{point.upper_mean:8.3f} {point.within.rate:8.2f} "
                f"{report.share_lower() if point.radius == report.radius else float('nan'):9.3f} "
                f"{report.control.gap_mean:8.3f} {rows[-1]['seconds']:8.2f} "
                f"{rows[-1]['memory_gib']:6.2f}"
            )
    draw(reports, PICTURE, names=[f"{r.draws} draws, {len(r.samples)} images" for r in reports])
    return rows


def _row(report: SmoothReport) -> dict[str, Any]:
    return {
        "draws": report.draws,
        "images": len(report.samples),
        "within": report.within.document(),
        "share_lower": report.share_lower(),
        "control": report.control.document(),
        "statuses": {s: [x.status for x in report.samples].count(s)
                     for s in {x.status for x in report.samples}},
        "gap_mean": float(np.mean([sample.gap_mean for sample in report.samples])),
        "lower_mean": report.lower_mean,
        "curve": [point.document() for point in report.curve],
        "seconds": report.seconds / len(report.samples),
        "memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip


def _compared(nets: list[Session], images: Dataset) -> dict[str, dict[str, float]]:
    """Mean bound over images, for each kind and distance."""
    found: dict[str, list[list[float]]] = {}
    for index in range(COMPARED):
        random = noise.generator("compared", str(index))
        copies = noise.noisy(images.x[index], sigma=SPEC["sigma"], draws=1000, random=random)
        differences = np.concatenate(
            [softmax(nets[1].logits(x)) - softmax(nets[0].logits(x)) for x in copies]
        )
        tables = [alternatives.table(differences, 0.001, shift) for shift in SHIFTS]
        for name in tables[0]:
            found.setdefault(name, []).append([each[name] for each in tables])
    print(f"mean bound over {COMPARED} images, 1000 draws, r/σ = {SHIFTS}")
    result = {}
    for name, values in found.items():
        means = np.mean(values, axis=0)
        result[name] = {f"{shift:g}": float(m) for shift, m in zip(SHIFTS, means, strict=True)}
        print(f"{name:22}", "  ".join(f"{m:.3f}" for m in means))
    return result


def _times(folder: Path, threads: int) -> list[dict[str, Any]]:
    """Seconds that 1,000 draws of an image take, from fewer."""
    rows = []
    for arch, shape, draws in SIZES:
        blob = pair.untrained(arch, shape, folder / "timed.onnx", seed=0)
        x = np.full((2, *shape), 0.5, np.float32)
        shown = Dataset.of(x, np.zeros(2, np.int64), uri="npz:grey", classes=10)
        net = opened(blob, shown, where=arch, device=pair.CPU, threads=threads)
        section = SmoothSection(sigma=SPEC["sigma"], draws=draws, samples=1, batch=32)
        certify_smooth(net, net, shown, config=section)
        report = certify_smooth(net, net, shown, config=section)
        row = {
            "arch": arch,
            "shape": shape,
            "draws": draws,
            "bytes": len(blob),
            "per_1000": report.seconds / draws * 1000,
            "memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        rows.append(row)
        print(f"{arch} {shape}: {row['per_1000']:.1f} s for 1,000 draws of an image by both, "
              f"{row['memory_gib']:.2f} GiB")  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
