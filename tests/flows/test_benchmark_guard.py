"""The table of guards end to end on a few digits: a backdoor that crosses over, and does not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(folder: Path) -> tuple[str, dict[str, Any]]:
    spec, out = ROOT / "benchmarks" / "guard" / "quick.yaml", folder / "guard.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.guard", "--config", str(spec), "--jobs", "2", "--folder",
         str(folder / "cells"), "--out", str(out)],
        capture_output=True, text=True, check=True, cwd=ROOT, timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.stdout, json.loads(out.read_text())


@pytest.mark.slow
def test_a_backdoor_crosses_over_and_the_guard_stops_it(tmp_path: Path) -> None:
    printed, found = run(tmp_path)
    (row,) = found["rows"]
    assert row["valid"]
    none, guard, alone = (row["scores"][name] for name in ("none", "guard", "no teacher"))
    assert none["asr"] > 0.5
    assert guard["lift_upper"] < 0.05
    assert guard["drop"] < 0.03
    assert none["accuracy"] > alone["accuracy"] + 0.02
    assert "valid" in printed
    # Nothing is made twice: another run finds every cell.
    made = sorted(file.stat().st_mtime_ns for file in (tmp_path / "cells").rglob("done.json"))
    again, same = run(tmp_path)
    assert again.splitlines()[:-1] == printed.splitlines()[:-1]
    assert same["rows"] == found["rows"]
    assert made == sorted(
        file.stat().st_mtime_ns for file in (tmp_path / "cells").rglob("done.json")
    )
