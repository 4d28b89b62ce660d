"""A gated store without a server: a database, a folder of artifacts, and an operator.

Rules are tested here, in milliseconds; that a server asks this very store is tested over HTTP.
"""

import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities.model_registry import ModelVersionTag, RegisteredModelTag
from mlflow.exceptions import MlflowException
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore

from flows.operators import Operator, toy_bundle
from mlflow_kdguard.artifacts import CERTIFICATE
from mlflow_kdguard.plugin import log
from mlflow_kdguard.plugin.store import sql

URI = "http://registry"
_numbers = itertools.count(1)


@dataclass
class Registry:
    """A gated store and everything around it."""

    store: Any
    operator: Operator
    folder: Path

    def model(self, name: str, **tags: str) -> None:
        """Create a registered model."""
        self.store.create_registered_model(
            name, [RegisteredModelTag(k, v) for k, v in tags.items()]
        )

    def version(
        self,
        name: str,
        files: Mapping[str, bytes] | None = None,
        *,
        source: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Create a version of a model, which is created where it is missing."""
        try:
            self.store.get_registered_model(name)
        except MlflowException:
            self.model(name)
        if source is None:
            place = self.folder / "artifacts" / str(next(_numbers))
            write(place, toy_bundle() if files is None else files)
            source = f"file://{place}"
        made = self.store.create_model_version(
            name, source, tags=[ModelVersionTag(k, v) for k, v in (tags or {}).items()]
        )
        return str(made.version)

    def certified(self, name: str, files: Mapping[str, bytes] | None = None, **changes: Any) -> str:
        """Create a version with a certificate that passes, unless something is changed."""
        held = toy_bundle() if files is None else files
        version = self.version(name, held)
        self.certify(name, version, self.operator.sign(
            self.operator.certificate(held, name, **changes)
        ))  # fmt: skip
        return version

    def certify(self, name: str, version: str, envelope: bytes) -> None:
        """Store a certificate."""
        self.tag(name, version, CERTIFICATE, envelope.decode())

    def tag(self, name: str, version: str, key: str, value: str) -> None:
        """Set a version's tag."""
        self.store.set_model_version_tag(name, version, ModelVersionTag(key, value))

    def promote(self, name: str, version: str, alias: str = "champion") -> None:
        """Ask for an alias."""
        self.store.set_registered_model_alias(name, alias, version)

    def aliases(self, name: str) -> dict[str, str]:
        """A model's aliases."""
        return {k: str(v) for k, v in self.store.get_registered_model(name).aliases.items()}

    def refused(self, name: str, version: str, alias: str = "champion") -> str:
        """Ask for an alias, see that it is refused with a 403, and leaves no trace."""
        before = self.aliases(name)
        text = refusal(lambda: self.promote(name, version, alias))
        assert self.aliases(name) == before
        return text

    def tags(self, name: str, version: str) -> dict[str, str]:
        """A version's tags."""
        return dict(self.store.get_model_version(name, version).tags)

    def location(self, name: str, version: str) -> Path:
        """Where clients are sent to."""
        uri = self.store.get_model_version_download_uri(name, version)
        return Path(uri.removeprefix("file://"))

    def entries(self) -> list[dict[str, Any]]:
        """The log, which must hold."""
        with self.store.engine.connect() as connection:
            report = log.verify(
                connection,
                verifiers=[self.operator.log_signer.verifier],
                heads=self.operator.heads,
            )
            assert report.ok, report.problems
            assert report.head is not None
            return [dict(row) for row in log.entries(connection, until=report.head.seq)]

    def actions(self) -> list[str]:
        """What the log says was done, without settings."""
        return [row["action"] for row in self.entries() if row["action"] != "settings"]


def refusal(act: Any) -> str:
    """What a refusal says; it must be a 403."""
    with pytest.raises(MlflowException) as caught:
        act()
    assert caught.value.get_http_status_code() == 403, caught.value
    return str(caught.value.message)


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files below a folder."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@cache
def _template() -> bytes:
    """A database with MLflow's tables: its own migrations take seconds."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "template.db"
        SqlAlchemyStore(f"sqlite:///{file}").engine.dispose()
        return file.read_bytes()


def _fresh(file: Path) -> str:
    file.write_bytes(_template())
    return f"sqlite:///{file}"


@contextmanager
def registry(folder: Path, *, database: str | None = None, **stated: Any) -> Iterator[Registry]:
    """Open a gated store; what is `stated` goes to the settings."""
    operator = Operator.install(folder / "operator", URI, **stated)
    before = os.environ.get("KDGUARD_SERVER")
    os.environ["KDGUARD_SERVER"] = str(operator.settings)
    uri = database or _fresh(folder / "registry.db")
    try:
        made = Registry(sql.opened(uri), operator, folder)
        yield made
        made.store.engine.dispose()
    finally:
        os.environ.pop("KDGUARD_SERVER")
        if before is not None:
            os.environ["KDGUARD_SERVER"] = before
