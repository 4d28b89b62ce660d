"""What an operator of a gated server keeps, and certificates about toy networks that pass."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

import certificates as c
import toys
from mlflow_kdguard import attest
from mlflow_kdguard.attest import Signer, signing
from mlflow_kdguard.draw import draw
from mlflow_kdguard.files import sha256
from mlflow_kdguard.records import AuditFigure, Certificate, Model, Rate, format_time
from mlflow_kdguard.registry.bundle import student_files

PINNED = {"data": {"sha256": [c.TEST.sha256]}}
"""A policy that accepts the data of `certificates`."""
_seeds = itertools.count(1)


@dataclass
class Operator:
    """What an operator keeps: the settings file, the keys, the content root; all in one folder."""

    folder: Path
    uri: str
    stated: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def install(folder: Path, uri: str, **stated: Any) -> "Operator":
        """Make keys (builder Bea, verifier Vic, a log key) and settings in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        long_ago = datetime(2020, 1, 1, tzinfo=UTC)
        for name, owner, role in (("bea", "Bea", "builder"), ("vic", "Vic", "verifier")):
            signing.keygen(folder / "private" / name, owner=owner, role=role, now=long_ago)  # type: ignore[arg-type]
            record = (folder / "private" / f"{name}.pub").read_bytes()
            (folder / "keys").mkdir(exist_ok=True)
            (folder / "keys" / f"{name}.pub").write_bytes(record)
        signing.keygen(folder / "log.pem", owner="Server", role="builder", now=long_ago)
        made = Operator(folder, uri)
        made.write(
            **{
                "version": 1,
                "registry": [uri],
                "policy": "policy.yaml",
                "keys": "keys",
                "allow": ["mlflow-artifacts:/", f"file://{folder.parent / 'artifacts'}"],
                "content": {"root": f"file://{folder / 'content'}"},
                "log": {"key": "log.pem", "head": "log-head.jsonl"},
            }
            | stated
        )
        return made

    @property
    def settings(self) -> Path:
        """The file that KDGUARD_SERVER names."""
        return self.folder / "server.yaml"

    @property
    def content(self) -> Path:
        """The content root."""
        return self.folder / "content"

    @property
    def heads(self) -> Path:
        """Where the log's heads are published."""
        return self.folder / "log-head.jsonl"

    def write(self, *, rules: Mapping[str, Any] = PINNED, **stated: Any) -> None:
        """Write settings with a higher version; what is not named stays. None takes a key out."""
        if self.stated and "version" not in stated:
            stated["version"] = self.stated["version"] + 1
        self.stated = {k: v for k, v in (self.stated | stated).items() if v is not None}
        (self.folder / "policy.yaml").write_text(yaml.safe_dump({"policy": dict(rules)}))
        self.settings.write_text(yaml.safe_dump(self.stated))

    def signer(self, name: str = "vic") -> Signer:
        """A private key: "bea" or "vic"."""
        return Signer.load(self.folder / "private" / name)

    @property
    def log_signer(self) -> Signer:
        """The key that signs the log's head."""
        return Signer.load(self.folder / "log.pem")

    def certificate(self, files: Mapping[str, bytes], name: str, **changes: Any) -> Certificate:
        """A certificate about these files that passes, unless something in it is changed."""
        return passing(files, **({"name": name, "registry": self.uri} | changes))

    def sign(self, certificate: Certificate, *names: str) -> bytes:
        """Sign a certificate with every key named; the verifier's where none is."""
        first, *others = names or ("vic",)
        envelope = attest.issue(certificate, self.signer(first))
        for name in others:
            envelope = attest.cosign(envelope, self.signer(name))
        return envelope


def toy_bundle(seed: int | None = None) -> dict[str, bytes]:
    """The bundle of a random network of a few neurons; another one at each call without `seed`."""
    chosen = next(_seeds) if seed is None else seed
    return student_files(toys.onnx_tiny(seed=chosen))


def passing(
    files: Mapping[str, bytes],
    *,
    name: str,
    registry: str,
    nonce: str = "",
    days: float = 30,
    now: datetime | None = None,
    **changes: Any,
) -> Certificate:
    """A certificate about `files` that passes the packaged policy with PINNED.

    `now` is when it was issued (by default a minute ago), `days` how long it lasts; other changes
    go to `certificates.certificate`.
    """
    student = Model(sha256=sha256(files["model.onnx"]))
    issued = now or datetime.now(UTC) - timedelta(minutes=1)
    parts = (c.REFERENCE, student.sha256, c.TEST.sha256, nonce)
    drawn = draw(c.POPULATION, c.SAMPLES, *parts)
    values: dict[str, Any] = {
        "subjects": attest.subjects_of(files),
        "model_name": name,
        "registry": registry,
        "student": student,
        "accuracy": Rate(k=945, n=1000),
        "faithful": (
            c.faithful(student=student, indices=drawn, nonce=nonce, within=Rate(k=99, n=c.SAMPLES)),
        ),
        "audit": {
            "teacher": AuditFigure(model=Model(sha256=c.TEACHER), verdict="suspect", target=0),
            "student": AuditFigure(model=student, verdict="undecided"),
        },
        "export": c.parity(model=student),
        "figures_from": "recomputed",
        "issued": format_time(issued),
        "expires": format_time(issued + timedelta(days=days)),
    }
    return c.certificate(**(values | changes))
