"""Results as files: the machine, the commit, and the figures of one run."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlflow_kdguard.files import write_json

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("mlflow-kdguard", "torch", "numpy", "onnxruntime-gpu", "onnx")


def machine() -> dict[str, Any]:
    """What a figure was taken on: processor, cores, packages, commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    return {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "system": platform.system(),
            "python": platform.python_version(),
        },
        "packages": {name: version(name) for name in PACKAGES},
        "commit": commit,
    }


def write(name: str, body: dict[str, Any]) -> Path:
    """Write one results file."""
    path = RESULTS / name
    write_json(path, body)
    return path


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
