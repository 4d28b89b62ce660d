"""What the operator of an attacked registry keeps: settings, policy, keys."""

import shutil
from pathlib import Path
from typing import Any

import yaml

import certificates as c
from flows.attacks import papers
from mlflow_kdguard.attest import signing

IDENTITY = "https://registry.example"
"""What the operator calls the registry; certificates name it."""
SERVED = "mlflow-artifacts:/kdguard-content"
"""Where our app serves the content root."""


def write_yaml(path: Path, value: Any) -> None:
    """Write a YAML file; a string is written as it is."""
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value))


POLICY: dict[str, Any] = {
    "data": {"sha256": [c.TEST.sha256]},
    "certificate": {"figures_from": "recomputed"},
}
"""The operator's policy: pinned data, and figures of a verifier."""


def settled(folder: Path, artifacts: Path, **changes: Any) -> tuple[Path, dict[str, Any]]:
    """Write settings, policy, trusted keys and the log's key; returns the settings and all keys."""
    operator = folder / "operator"
    keys = {}
    for name, owner, role in (
        ("verifier", "Vic", "verifier"),
        ("second", "Val", "verifier"),
        ("vic-again", "Vic", "verifier"),
        ("builder", "Bea", "builder"),
    ):
        keys[name] = signing.keygen(folder / "private" / name, owner=owner, role=role, now=EARLY)
        (operator / "keys").mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "private" / f"{name}.pub", operator / "keys")
    keys["stranger"] = signing.keygen(
        folder / "private" / "stranger", owner="Sly", role="verifier", now=EARLY
    )
    signing.keygen(operator / "log.pem", owner="Registry", role="builder")
    (folder / "content").mkdir()
    write_yaml(operator / "policy.yaml", POLICY)
    write_yaml(operator / "revoked.yaml", {"certificates": [], "keys": {}})
    stated: dict[str, Any] = {
        "version": 1,
        "registry": [IDENTITY],
        "mode": "enforce",
        "policy": "policy.yaml",
        "keys": "keys/",
        "revoked": "revoked.yaml",
        "allow": [artifacts.as_uri(), "mlflow-artifacts:/"],
        "log": {"key": "log.pem", "head": str(folder / "log-head.jsonl")},
    }
    write_yaml(operator / "server.yaml", stated | changes)
    return operator / "server.yaml", keys


EARLY = papers.now() - papers.days(300)
