"""docs/tutorials/gate.md, typed into a shell as it stands, from an empty folder.

Only the port is another one, because 5000 may be taken. `pip install` finds the package installed.
"""

import os
import resource
import sys
from pathlib import Path

import pytest

from flows.pages import ROOT, Block, Shell, blocks, follow
from flows.servers import free_port

pytestmark = pytest.mark.slow
PAGE = ROOT / "docs" / "tutorials" / "gate.md"
LONGEST = 300.0
"""Seconds of computing, half of the ten minutes that the page promises: other tests run beside."""


def test_the_tutorial_to_the_letter(tmp_path: Path) -> None:
    port = str(free_port())
    found = [
        Block(b.language, b.text.replace("5000", port), b.heading, b.number) for b in blocks(PAGE)
    ]
    assert len([block for block in found if block.language == "bash"]) >= 10
    own = str(Path(sys.executable).parent)
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("MLFLOW_", "KDGUARD_", "COV"))
    } | {"PATH": f"{own}{os.pathsep}{os.environ['PATH']}", "MLFLOW_DISABLE_TELEMETRY": "true"}
    place = tmp_path / "empty"
    place.mkdir()
    before = _computing()
    with Shell(place, environment) as shell:
        follow(shell, found)
    seconds = _computing() - before
    transcript = "".join(printed for _, printed, _ in shell.transcript)
    assert "Traceback" not in transcript
    print(
        f"{seconds:.0f} s of computing",
        *(f"{t:6.1f} s  {c[:60]!r}" for c, _, t in shell.transcript),
        sep="\n",
    )
    assert seconds < LONGEST


def _computing() -> float:
    """Seconds that processors have spent on what this test started, and has ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime
