"""Proofs: python -m benchmarks.proof --reference R.onnx --student S.onnx [--data URI] [--eps E].

Certifies images with and without proofs, checks the proofs, and alters them at random. Prints and
writes seconds an image (processor time) of the search, of the search that keeps proofs, and of the
checker; bytes an image; and how many alterations were tried, refused and accepted. Damage to what a
file says about its trees, image, networks or claim must be refused (`structure accepted` is 0);
another number may be accepted where the checker's own bound bears it out: `believed` counts bounds
below a gap that a search has found, and must be 0. `tiny`: the same on networks of two pixels,
where bounds are held against enumeration, and numbers are altered by a search for the least bound
as well; `below exact` must be 0. Exit code 1 otherwise.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.proof import alter, tiny
from benchmarks.proof.alter import KINDS, STRUCTURE, Case
from benchmarks.record import machine, write
from mlflow_kdguard import data
from mlflow_kdguard.certify import certify
from mlflow_kdguard.config import CertifySection
from mlflow_kdguard.errors import CertificateError
from mlflow_kdguard.files import read_bytes
from mlflow_kdguard.proof import Checker, Proof
from mlflow_kdguard.records import CertifyReport


def main() -> None:
    """Certify, check, alter, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--data", default="fashion-mnist#train")
    parser.add_argument("--eps", type=float, default=0.025)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--classes", choices=["top", "all"], default="top")
    parser.add_argument("--alterations", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=100, help="of the search, a tiny pair")
    given = parser.parse_args()
    torch.set_num_threads(1)
    networks = [read_bytes(path, what="the network") for path in (given.reference, given.student)]
    config = CertifySection(
        method="branch", nodes=given.nodes, eps=given.eps, classes=given.classes,
        samples=given.samples, restarts=2, pgd_steps=40,
    )  # fmt: skip
    body = run(networks, config, given.data, given.alterations)
    body["tiny"] = enumerated(given.alterations, given.steps)
    for key, value in body.items():
        print(f"{key:>12}  {value}")
    asked = {k: v for k, v in vars(given).items() if k not in ("reference", "student")}
    name = f"proof-{given.eps:g}-{given.classes}.json"
    print(f"wrote {write(name, {**machine(), 'asked': asked, **body})}")
    parts = (body, body["tiny"])
    sys.exit(any(part["structure accepted"] for part in parts)
             or bool(body["believed"] + body["tiny"]["below exact"]))  # fmt: skip


def run(networks: list[bytes], config: CertifySection, uri: str, tries: int) -> dict[str, Any]:
    """All figures of one configuration."""
    shown = data.load(uri, root=None, download=False)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "proofs"
        began = time.process_time()
        certify(networks[0], networks[1], shown, config=config)
        plain = time.process_time() - began
        began = time.process_time()
        report = certify(networks[0], networks[1], shown, config=config, proofs=folder)
        kept = time.process_time() - began
        files = {s.index: (folder / f"{s.index:06d}.kdproof").read_bytes() for s in report.samples}
    checker = Checker.of(networks[0], networks[1])
    cases, seconds = checked(checker, files, report, shown)
    n, sizes = len(files), [len(file) for file in files.values()]
    return {
        "images": n,
        "search_s": plain / n,
        "keeping_s": kept / n,
        "check_s": seconds / n,
        "check_share": seconds / plain,
        "bytes_mean": float(np.mean(sizes)),
        "bytes_max": max(sizes),
        "upper_mean": report.summary.upper_mean,
        **damaged(checker, cases, tries),
    }


def checked(
    checker: Checker, files: dict[int, bytes], report: CertifyReport, shown: Any
) -> tuple[list[Case], float]:
    """Every proof checked; the seconds that it took, reading included."""
    cases, began = [], time.process_time()
    for sample in report.samples:
        image = shown.batch([sample.index])[0][0]
        proof = Proof.from_bytes(files[sample.index])
        checker.check(proof, image)
        cases.append(Case(proof, image, sample.lower))
    return cases, time.process_time() - began


def damaged(checker: Checker, cases: list[Case], tries: int) -> dict[str, Any]:
    """Random alterations of random proofs: by kind, refused and accepted."""
    draw = np.random.default_rng(0)
    kinds = sorted(KINDS)
    refused, accepted, believed = Counter[str](), Counter[str](), 0
    for turn in range(tries):
        kind = kinds[turn % len(kinds)]
        first, second = draw.choice(len(cases), 2, replace=False)
        case, other = cases[first], cases[second]
        bound = judged(checker, kind, (case, other), draw)
        count(kind, bound, refused, accepted)
        believed += bound is not None and bound < case.witness
    broken = sum(accepted[kind] for kind in STRUCTURE)
    return {"refused": dict(refused), "accepted": dict(accepted), "believed": believed,
            "structure accepted": broken}  # fmt: skip


def judged(
    checker: Checker, kind: str, pair: tuple[Case, Case], draw: np.random.Generator
) -> float | None:
    """The bound of an altered proof; None where it is refused, NaN where there is nothing of the
    kind to alter."""
    try:
        proof, image = KINDS[kind](*pair, draw)
        return checker.check(Proof.from_bytes(proof.to_bytes()), image)
    except CertificateError:
        return None
    except alter.AbsentError:
        return float("nan")


def count(kind: str, bound: float | None, refused: Counter[str], accepted: Counter[str]) -> None:
    """Add one alteration, if there was one."""
    if bound is None:
        refused[kind] += 1
    elif not np.isnan(bound):
        accepted[kind] += 1


def enumerated(tries: int, steps: int) -> dict[str, Any]:
    """Alterations of proofs about tiny networks, by kind and by search, against the exact gaps."""
    draw, refused, accepted = np.random.default_rng(1), Counter[str](), Counter[str]()
    kinds, number, false, closest, sound = sorted(KINDS), 0, 0, 1.0, 0
    while sum(refused.values()) + sum(accepted.values()) < tries:
        made, number = tiny.made(number), number + 1
        if made is None or not alter.groups(made.case.proof, "node"):
            continue
        for kind in kinds:
            other = replace(made.case, image=np.float32(1.0) - made.case.image)
            bound = judged(made.checker, kind, (made.case, other), draw)
            count(kind, bound, refused, accepted)
            closest = min(closest, 1.0 if bound is None else bound - made.case.witness)
        least, tried = tiny.lowest(made, draw, steps)
        closest, sound = min(closest, least - made.case.witness), sound + tried
        false += closest < -tiny.TIE
    return {
        "pairs": number, "refused": dict(refused), "accepted": dict(accepted),
        "structure accepted": sum(accepted[kind] for kind in STRUCTURE),
        "searched": sound, "least bound - exact": closest, "below exact": false,
    }  # fmt: skip


if __name__ == "__main__":
    main()
