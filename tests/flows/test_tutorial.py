"""docs/tutorials/gate.md, typed into a shell as it stands, from an empty folder.

Only the port is another one, because 5000 may be taken. `pip install` finds the package installed.
"""

import os
import sys
import time
from pathlib import Path

import pytest

from flows.pages import ROOT, Block, Shell, blocks, follow
from flows.servers import free_port

pytestmark = pytest.mark.slow
PAGE = ROOT / "docs" / "tutorials" / "gate.md"
LONGEST = 600.0
"""Seconds that the page promises."""


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
    begun = time.monotonic()
    with Shell(place, environment) as shell:
        follow(shell, found)
    seconds = time.monotonic() - begun
    transcript = "".join(printed for _, printed, _ in shell.transcript)
    assert "Traceback" not in transcript
    assert seconds < LONGEST
