"""Registries with certified models behind aliases, and the means to spoil them."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import certificates as c
import toys
from mlflow_kdguard.attest import Signer, issue, signer_of, subjects_of
from mlflow_kdguard.attest.signing import Role
from mlflow_kdguard.config import RegistrySection
from mlflow_kdguard.files import sha256
from mlflow_kdguard.records import Model, format_time
from mlflow_kdguard.registry import Registry

YEAR = timedelta(days=365)


def now() -> datetime:
    return datetime.now(UTC)


def signer(owner: str = "Vic", role: Role = "verifier") -> Signer:
    private = Ed25519PrivateKey.generate()
    return signer_of(private, owner=owner, role=role, valid_from=now() - YEAR)


def opened(uri: str) -> Registry:
    return Registry(RegistrySection(tracking_uri=uri, experiment="promoted"))


def local(folder: Path) -> str:
    """The URI of an MLflow store on this machine."""
    return f"sqlite:///{folder / 'mlflow.db'}"


def stored(registry: Registry, name: str, *, seed: int = 0) -> str:
    """A student as a new version of `name`; its URI."""
    with registry.run("p") as run:
        return registry.register_student(name, toys.onnx_tiny(seed=seed), run=run).uri


def envelope(
    files: Mapping[str, bytes], name: str, registry: str, by: Signer, **changes: Any
) -> bytes:
    """A certificate about `files`, issued yesterday and valid for a month."""
    student = Model(sha256=sha256(files["model.onnx"]))
    values: dict[str, Any] = {
        "subjects": subjects_of(files), "model_name": name, "registry": registry,
        "student": student, "figures_from": "recomputed" if by.verifier.record.role == "verifier"
        else "imported", "issued": format_time(now() - timedelta(days=1)),
        "expires": format_time(now() + timedelta(days=30)),
    }  # fmt: skip
    return issue(c.certificate(**(values | changes)), by)


def certify(registry: Registry, uri: str, by: Signer, /, **changes: Any) -> bytes:
    """Issue a certificate for a stored version and store it with the version."""
    found = registry.download(uri)
    named = changes.pop("registry", registry.identity)
    made = envelope(found.files, str(found.name), named, by, **changes)
    registry.store_certificate(uri, made)
    return made


def champion(registry: Registry, name: str, by: Signer, /, *, seed: int = 0, **changes: Any) -> str:
    """A certified version behind `models:/name@champion`; the URI of the version."""
    uri = stored(registry, name, seed=seed)
    certify(registry, uri, by, **changes)
    registry.promote(uri, "champion")
    return uri


def folder_of(registry: Registry, uri: str) -> Path:
    """Where the files of a version of a local store lie."""
    version = registry._versions.find(uri)
    return Path(str(version.source).removeprefix("file://"))
