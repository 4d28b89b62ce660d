"""A run that is killed at any moment and started again ends with the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path
import torch
import runs
from mlflow_kdguard.config import Loop
from mlflow_kdguard.training import state_sha256

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
loop = Loop(epochs=6, batch=32, checkpoint_seconds=1e-6)

def run(checkpoint):
    net = runs.Dropping()
    done = runs.fitted(net, runs.noisy, loop=loop, checkpoint=checkpoint)
    return state_sha256(net), done

run(folder / "warm-up")
started = time.monotonic()
expected, undisturbed = run(folder / "undisturbed")
seconds = time.monotonic() - started
moments = random.Random(0)

def written():
    path = folder / "killed"
    return path.stat().st_mtime_ns if path.exists() else 0

for number in range(kills):
    before = written()
    if before and torch.load(folder / "killed", weights_only=True)["done"] == undisturbed.steps:
        break
    child = os.fork()
    if child == 0:
        run(folder / "killed")
        os._exit(0)
    # The first may be killed before it has kept anything; the others get a step further each.
    deadline = time.monotonic() + 60
    while number and written() == before and time.monotonic() < deadline:
        time.sleep(1e-3)
    time.sleep(moments.uniform(0.0, seconds / kills))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
found, done = run(folder / "killed")
left = sorted(path.name for path in folder.iterdir())
assert left == ["killed", "undisturbed", "warm-up"], left
assert found == expected, (found, expected)
assert done.figures == undisturbed.figures
print(done.resumed_at, done.steps)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_at_random_moments_changes_no_bit(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(root), str(root / "tests")])
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "6"],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    resumed_at, steps = map(int, answer.stdout.split())
    assert 0 < resumed_at <= steps
