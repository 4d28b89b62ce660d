"""One row of the table: some images, one budget, image by image in batches that are kept."""

import json
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mlflow_kdguard
from mlflow_kdguard.certify import certify
from mlflow_kdguard.certify.parallel import in_order
from mlflow_kdguard.config import CertifySection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.files import digest_json, sha256, write_json
from mlflow_kdguard.measure import Session

CPU = torch.device("cpu")
BATCH = 25
"""Images that `certify` bounds together; a kill loses the batches in work, one a thread."""
RELATIVE, ABSOLUTE = 0.02, 1e-3
"""A bound is closed where it exceeds the witness by no more than that share, or that much."""
Pair = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Asked:
    """What one row asks of one pair."""

    student: str
    eps: float
    classes: str
    method: str
    nodes: int


@dataclass(frozen=True, slots=True)
class Work:
    """A pair of networks, how many batches go on side by side, and where they are kept."""

    pair: Pair
    threads: int
    keep: Path


@cache
def source() -> str:
    """Digest of the package's code: what was computed by other code is computed again."""
    root = Path(mlflow_kdguard.__file__).parent
    return digest_json({str(p.relative_to(root)): sha256(p.read_bytes())
                        for p in sorted(root.rglob("*.py"))})  # fmt: skip


def right(reference: bytes, images: Dataset, count: int) -> Dataset:
    """The first `count` images that the reference gets right."""
    session = Session(reference, device=CPU, where="the reference")
    found: list[int] = []
    for at in range(0, len(images), 256):
        x, y = images.batch(range(at, min(at + 256, len(images))))
        found += (at + np.flatnonzero(session.logits(x, 256).argmax(1) == y)).tolist()
        if len(found) >= count:
            break
    return images.take(found[:count])


def accuracy(model: bytes, images: Dataset) -> float:
    """Share of all images that a network gets right."""
    logits = Session(model, device=CPU, where="a network").logits(images.x, 256)
    return float((logits.argmax(1) == images.y).mean())


def samples(work: Work, images: Dataset, asked: Asked) -> list[dict[str, Any]]:
    """Every image's bounds, batch by batch. Finished batches are used again; each holds the
    wall-clock and processor seconds that went by since the batch before it was finished."""
    parts = [range(at, min(at + BATCH, len(images))) for at in range(0, len(images), BATCH)]
    places = {part: work.keep / f"{_key(work.pair, images, part, asked)}.json" for part in parts}
    todo = [part for part in parts if not places[part].exists()]

    def judge(part: range) -> list[dict[str, Any]]:
        return judged(work.pair, images.take(part), asked)

    work.keep.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(work.threads)
    began = _clock()
    for part, found in zip(todo, in_order(judge, todo, at_once=work.threads), strict=True):
        now = _clock()
        spent = [after - before for before, after in zip(began, now, strict=True)]
        write_json(places[part], {"spent": spent, "samples": found})
        began = now
    return [json.loads(place.read_text()) for place in places.values()]


def _clock() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def _key(pair: Pair, images: Dataset, part: range, asked: Asked) -> str:
    question = {
        "pair": [sha256(model) for model in pair], "data": images.take(part).sha256,
        "asked": [asked.eps, asked.classes, asked.method, asked.nodes], "code": source(),
    }  # fmt: skip
    return digest_json(question)[:32]


def judged(pair: Pair, images: Dataset, asked: Asked) -> list[dict[str, Any]]:
    """Both bounds of each image."""
    config = CertifySection(
        samples=len(images), eps=asked.eps, classes=asked.classes, method=asked.method,
        nodes=asked.nodes,
    )  # fmt: skip
    report = certify(*pair, images, config=config, device=CPU)
    return [
        {"lower": s.lower, "bound": s.bound, "margin": s.float32_margin, "upper": s.upper,
         "nodes": s.nodes}
        for s in report.samples
    ]  # fmt: skip


def figures(parts: list[dict[str, Any]], asked: Asked) -> dict[str, Any]:
    """The row: ratios of means, closed shares, seconds an image."""
    each = list(_each(parts))
    lower, bound, margin, upper, nodes = (
        np.array([sample[name] for sample in each], dtype=np.float64)
        for name in ("lower", "bound", "margin", "upper", "nodes")
    )
    wall, cpu = (sum(part["spent"][i] for part in parts) / len(each) for i in range(2))
    closed = bound - lower <= np.maximum(RELATIVE * lower, ABSOLUTE)
    return {
        "student": asked.student, "eps": asked.eps, "classes": asked.classes,
        "method": asked.method, "budget": asked.nodes, "n": len(each),
        "witness_mean": float(lower.mean()), "upper_mean": float(upper.mean()),
        "bound_mean": float(bound.mean()), "float32_margin_mean": float(margin.mean()),
        "ratio": float(upper.mean() / lower.mean()),
        "ratio_real": float(bound.mean() / lower.mean()),
        "gap_mean": float((upper - lower).mean()),
        "closed": float(closed.mean()), "nodes_mean": float(nodes.mean()),
        "seconds": wall, "cpu_seconds": cpu, "gib": gib(),
    }  # fmt: skip


def _each(parts: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for part in parts:
        yield from part["samples"]


def gib() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
