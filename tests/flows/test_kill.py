"""Kill -9 at random moments, resume, and end with the same bits as undisturbed."""

import base64
import json
import random
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flows.stories import command, environment, run_states, told
from mlflow_kdguard.errors import REFUSED
from mlflow_kdguard.files import sha256_file

pytestmark = pytest.mark.slow

KILLS = 10
SAME = ("**/student.onnx", "**/reference.onnx", "**/*.safetensors", "**/*.npz", "**/*.kdt")


def _digests(work: Path) -> dict[str, str]:
    files = [
        path for pattern in SAME for path in work.glob(pattern) if "training" not in path.parts
    ]
    return {str(path.relative_to(work)): sha256_file(path) for path in files}


def _figures(work: Path) -> dict[str, Any]:
    """The figures of both certificates; they hold no times."""
    found = {}
    for name in ("naive", "guarded"):
        envelope = json.loads((work / name / "attest" / "certificate.dsse.json").read_text())
        statement = json.loads(base64.b64decode(envelope["payload"]))
        found[name] = statement["predicate"]["figures"]
    return found


# Half a thousand test images are too few for the gate's export rule, so the digits end refused.


def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    calm.mkdir()
    told(command(calm), expect=REFUSED)
    stormy.mkdir()
    moments = random.Random(20261121)
    kills = 0
    while kills < KILLS:
        process = subprocess.Popen(
            command(stormy),
            env=environment(),
            cwd=stormy,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            _, said = process.communicate(timeout=moments.uniform(3.0, 12.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == REFUSED, said.decode()[-3000:]
        break
    told(command(stormy), expect=REFUSED)
    work = stormy / "work"
    assert _digests(work) == _digests(calm / "work")
    assert _figures(work) == _figures(calm / "work")
    assert not list(stormy.rglob("*.tmp")), "something half-written is left"
    assert "RUNNING" not in run_states(f"sqlite:///{stormy / 'mlflow.db'}")
    assert kills >= KILLS // 2, "the pipeline was over before it could be disturbed"
