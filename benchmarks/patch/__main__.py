"""What any patch can do: python -m benchmarks.patch [SPEC] [--keep FOLDER] [--threads N].

Tells the story of the specification (default: fashion-mlp.yaml beside this file) as `kdguard run`
does, and certifies the students that it exports, once for each row. Prints the table and writes
benchmarks/results/patch-NAME.json and docs/images/patch-NAME.png. With --keep, the story is kept
in FOLDER and not told again. `memory` is the largest resident size of this process so far.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.record import machine, write
from mlflow_kdguard import data
from mlflow_kdguard.certify.patch import certify_patch
from mlflow_kdguard.certify.picture import draw
from mlflow_kdguard.config import PatchSection
from mlflow_kdguard.files import read_bytes
from mlflow_kdguard.records import Flips, PatchReport
from mlflow_kdguard_cli.main import answer

HERE = Path(__file__).parent
IMAGES = Path(__file__).parents[2] / "docs" / "images"
REFUSED = 3
"""Nobody but the builder measures here, so that the gate refuses; the students are there."""
HEAD = "student        size  positions  n     clean  each: found certified upper  universal: found certified   s     nodes  GiB"  # noqa: E501


def main() -> None:
    """Tell the story or find it, certify its students, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", type=Path, nargs="?", default=HERE / "fashion-mlp.yaml")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    spec = yaml.safe_load(given.spec.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        if not (folder / "story.json").exists():
            tell(spec["story"], folder)
        torch.set_num_threads(given.threads)
        rows = measure(spec, folder, given.spec.stem)
    body = {"spec": spec, "threads": given.threads, "rows": rows}
    print(f"wrote {write(f'patch-{given.spec.stem}.json', {**machine(), **body})}")


def tell(story: dict[str, Any], folder: Path) -> None:
    """The whole story, on a registry of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "story.yaml"
    path.write_text(yaml.safe_dump(story))
    store = f"sqlite:///{(folder / 'mlflow.db').resolve()}"
    argv = ["run", "-c", str(path), "--out", str(folder), "--tracking-uri", store]
    began = time.monotonic()
    code = answer([*argv, "--registry-uri", store, "--allow-unpinned"])
    if code not in (0, REFUSED):
        raise SystemExit(code)
    print(f"told in {time.monotonic() - began:.0f} s")


def student(folder: Path, name: str) -> bytes:
    """The exported student of that name."""
    place = folder / name / "export" if (folder / name / "export").exists() else folder / name
    return read_bytes(place / "student.onnx", what="the student")


def measure(spec: dict[str, Any], folder: Path, name: str) -> list[dict[str, Any]]:
    """One report a row; the first, small one pays for warming up."""
    test = data.load(spec["story"]["data"]["test"])
    warm = PatchSection(samples=2)
    certify_patch(student(folder, "guarded"), test, target=spec["target"], config=warm)
    rows = []
    print(HEAD)
    for row in spec["rows"]:
        section = PatchSection(**{k: v for k, v in row.items() if k not in ("student", "picture")})
        began = time.monotonic()
        report = certify_patch(
            student(folder, row["student"]), test, target=spec["target"], config=section
        )
        rows.append(_row(row["student"], report, time.monotonic() - began))
        print(_line(rows[-1]))
        if row.get("picture"):
            draw(report, test, IMAGES / f"patch-{name}.png")
    return rows


def _row(name: str, report: PatchReport, seconds: float) -> dict[str, Any]:
    return {
        "student": name,
        "size": report.size,
        "positions": [list(place.position) for place in report.places],
        "n": report.each.n,
        "clean": report.clean.rate,
        "each": _rates(report.each),
        "universal": _rates(report.universal),
        "nodes": sum(sample.nodes for sample in report.samples),
        "limit": report.nodes,
        "seconds": seconds,
        "memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _rates(flips: Flips) -> dict[str, float]:
    return {"found": flips.attack / flips.n, "certified": flips.rate, "upper": flips.upper}


def _line(row: dict[str, Any]) -> str:
    places = row["positions"]
    at = f"{places[0][0]},{places[0][1]}" if len(places) == 1 else f"{len(places)} places"
    each, universal = row["each"], row["universal"]
    return (
        f"{row['student']:14} {row['size']}×{row['size']}   {at:9} {row['n']:5} "
        f"{row['clean']:6.3f} "
        f"{each['found']:12.3f} {each['certified']:9.3f} {each['upper']:5.3f} "
        f"{universal['found']:17.3f} {universal['certified']:9.3f} {row['seconds']:6.1f} "
        f"{row['nodes']:7} {row['memory_gib']:5.2f}"
    )


if __name__ == "__main__":
    main()
