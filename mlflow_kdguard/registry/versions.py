"""Model versions: stored, fetched as bytes, tagged, and given an alias."""

import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from mlflow_kdguard import artifacts
from mlflow_kdguard.artifacts import DECISION, REASON
from mlflow_kdguard.errors import RegistryError, UnsafeModelError, UsageError
from mlflow_kdguard.records import Decision, Record
from mlflow_kdguard.registry import bundle
from mlflow_kdguard.registry.bundle import CERTIFICATE, Bundle
from mlflow_kdguard.registry.client import Connection
from mlflow_kdguard.registry.runs import Run

log = logging.getLogger(__name__)

BUNDLE_TAG = "kdguard.bundle_sha256"
LONGEST_TAG = 100_000
"""Characters that a model version's tag holds; MLflow refuses more."""

_URI = re.compile(r"models:/(?P<name>[^/@:]+)(?:/(?P<version>[0-9]{1,18})|@(?P<alias>[^/@:]+))")
_REMOTE = frozenset(
    {"mlflow-artifacts", "s3", "gs", "wasbs", "abfss", "r2", "b2", "oss", "dbfs", "hdfs"}
)


class Registered(Record):
    """A version that now exists: where it is, and the digest of every file in it."""

    name: str
    version: str
    uri: str
    run_id: str
    registry: str
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class Versions:
    """The registered models behind one connection."""

    connection: Connection

    def register(
        self, name: str, files: Mapping[str, bytes], *, run: Run, kind: str, tags: Mapping[str, str]
    ) -> Registered:
        """Store `files` under `run` and make them a version of `name`; no alias is set.

        The artifacts' place follows from their digest, so that no other version's bytes are ever
        overwritten, and the same bytes of the same run are one version however often this is
        called. The stored bytes are read back and compared. Raises RegistryError.
        """
        digest = bundle.bundle_digest(files)
        version = self._existing(name, run.id, digest)
        if version is None:
            place = f"{kind}/{digest[:16]}"
            self.upload(files, run, place)
            version = self._create(
                name, f"{run.artifact_uri}/{place}", run, {**tags, BUNDLE_TAG: digest}
            )
        uri = f"models:/{name}/{version}"
        stored = self.download(uri).digests
        if stored != bundle.digests(files):
            odd = sorted(set(stored.items()) ^ set(bundle.digests(files).items()))
            raise RegistryError(
                f"{uri} is not stored as it was sent ({odd[0][0]}).",
                remedy="Check the artifact store; somebody may be writing to it.",
            )
        return Registered(
            name=name,
            version=version,
            uri=uri,
            run_id=run.id,
            registry=self.connection.identity,
            files=stored,
        )

    def find(self, uri: str) -> ModelVersion:
        """The version that `models:/name/version` or `models:/name@alias` stands for now."""
        match = _URI.fullmatch(uri)
        if match is None:
            raise UsageError(
                f"{uri!r} does not name a model version.",
                remedy="Write models:/name/version or models:/name@alias.",
            )
        client = self.connection.client
        with self.connection.answering(f"find {uri}"):
            if match["alias"] is None:
                return client.get_model_version(match["name"], match["version"])
            return client.get_model_version_by_alias(match["name"], match["alias"])

    def download(self, uri: str, *, limit: int = bundle.LARGEST) -> Bundle:
        """The bytes of a version or of a folder or file; nothing of it is executed or believed.

        No MLflow flavor is asked: MLmodel and a `code/` folder are files like any other. What
        MLflow's client adds to folders that it loads from is left out where it is exactly that;
        anything else stays, so that a digest check sees it. Raises RegistryError, UsageError
        where the path does not exist, ModelError past `limit` bytes, UnsafeModelError at links
        and odd names.
        """
        if not uri:
            raise UsageError("the model's name is empty.", remedy="Write models:/name/version.")
        if not uri.startswith("models:"):
            return bundle.from_path(Path(uri), limit=limit)
        version = self.find(uri)
        with self.connection.answering(f"locate {uri}"):
            source = self.connection.client.get_model_version_download_uri(
                version.name, version.version
            )
        files = bundle.without_mark(self.fetch(source, limit), version.name, str(version.version))
        return Bundle(
            uri=f"models:/{version.name}/{version.version}",
            files=files,
            name=version.name,
            version=str(version.version),
            run_id=version.run_id or None,
            tags=dict(version.tags),
        )

    def store_certificate(self, uri: str, envelope: bytes) -> None:
        """Store a signed certificate as a tag of the version and as an artifact of its run.

        It is never put inside the model's folder. Raises RegistryError where it is not text or
        longer than a tag holds.
        """
        version = self.find(uri)
        text = _text(envelope, uri)
        if version.run_id:
            place = f"certificates/{version.name}-{version.version}.dsse.json"
            self.run_of(version).log_bytes(envelope, place)
        self.tag(version, {CERTIFICATE: text})

    def run_of(self, version: ModelVersion) -> Run:
        """The run that a version comes from; RegistryError where it has none."""
        with self.connection.answering(f"find the run {version.run_id}"):
            return Run(self.connection, self.connection.client.get_run(version.run_id or ""))

    def record_decision(self, uri: str, decision: Decision) -> None:
        """Say on the version what the gate decided, and why where it refused.

        A gated server keeps these tags for its own decisions: there, nothing is said.
        """
        why = "; ".join(f"{r.rule}: {r.why}" for r in decision.rules if not r.ok)
        said = {DECISION: decision.decision, REASON: why[:5000] or "every rule holds"}
        try:
            self.tag(self.find(uri), said)
        except RegistryError as error:
            if not _refused_by_a_gate(error.__cause__):
                raise
            log.info("%s: the server's own gate decides, and says so itself", uri)

    def tag(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        with self.connection.answering(f"tag models:/{version.name}/{version.version}"):
            for key, value in tags.items():
                self.connection.client.set_model_version_tag(
                    version.name, version.version, key, value
                )

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Let `models:/name@alias` stand for `version`. Raises RegistryError, also if the server's
        own gate refuses; UsageError where the alias is not plain ASCII (look-alikes)."""
        if not alias.isascii():
            raise UsageError(
                f"the alias {alias!r} is not plain ASCII.", remedy="Use ASCII letters."
            )
        with self.connection.answering(f"set {name}@{alias} to version {version}"):
            self.connection.client.set_registered_model_alias(name, alias, version)

    def alias(self, name: str, alias: str) -> str | None:
        """The version that an alias stands for; None where the model has no such alias."""
        with self.connection.answering(f"read the aliases of {name}"):
            found = self.connection.client.get_registered_model(name).aliases.get(alias)
            return None if found is None else str(found)

    def _existing(self, name: str, run_id: str, digest: str) -> str | None:
        with self.connection.answering(f"list versions of {name}"):
            found = self.connection.client.search_model_versions(f"run_id='{run_id}'")
            same = [v for v in found if v.name == name and v.tags.get(BUNDLE_TAG) == digest]
            return str(same[0].version) if same else None

    def upload(self, files: Mapping[str, bytes], run: Run, place: str) -> None:
        """Store files below `place` of a run."""
        with tempfile.TemporaryDirectory() as folder:
            bundle.write(files, Path(folder))
            with self.connection.answering(f"store {place}"):
                self.connection.client.log_artifacts(run.id, folder, place)

    def _create(self, name: str, source: str, run: Run, tags: Mapping[str, str]) -> str:
        client = self.connection.client
        with self.connection.answering(f"create a version of {name}"):
            try:
                client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            version = client.create_model_version(
                name, source, run_id=run.id, tags=dict(tags), await_creation_for=0
            )
            return str(version.version)

    def fetch(self, source: str, limit: int) -> dict[str, bytes]:
        """All files below an artifact URI. Raises as `download` does."""
        scheme = _scheme(source)
        if scheme in ("", "file"):
            folder = Path(unquote(urlsplit(source).path) if scheme else source)
            if not (folder.is_absolute() and _is_folder(folder)):
                raise RegistryError(
                    f"the version's folder {folder} is not on this machine.",
                    remedy="Let the server serve artifacts (--artifacts-destination).",
                )
            with self.connection.answering(f"read {folder}"):
                return bundle.read_folder(folder, limit=limit)
        with self.connection.answering(f"fetch {source}"):
            return artifacts.read_store(store_at(self.connection, source), source, limit=limit)


def store_at(connection: Connection, source: str) -> Any:
    """MLflow's artifact repository of a place that a version names.

    Raises UnsafeModelError where it is none that is known, or another MLflow server than ours: a
    source is anybody's word, and our credentials would be sent there.
    """
    if _scheme(source) not in _REMOTE:
        raise UnsafeModelError(
            f"the version's source {source!r} is not an artifact store.",
            remedy=f"Known: {', '.join(sorted(_REMOTE))}, and local folders.",
        )
    host = urlsplit(source).netloc
    if _scheme(source) == "mlflow-artifacts" and host not in ("", _host(connection.tracking_uri)):
        raise UnsafeModelError(f"the version's source {source!r} lies on another MLflow server.")
    return get_artifact_repository(
        source, tracking_uri=connection.tracking_uri, registry_uri=connection.registry_uri
    )


def _host(uri: str) -> str:
    return urlsplit(uri).netloc.rpartition("@")[2]


def _scheme(source: str) -> str:
    try:
        return urlsplit(source).scheme
    except ValueError as error:
        raise UnsafeModelError(f"the version's source {source!r} is not a URI.") from error


def _is_folder(path: Path) -> bool:
    """Whether a folder is there; a name that no file can have is none."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _refused_by_a_gate(cause: BaseException | None) -> bool:
    denied = isinstance(cause, MlflowException) and cause.error_code == "PERMISSION_DENIED"
    return denied and "kdguard refuses" in str(cause)


def _text(envelope: bytes, uri: str) -> str:
    try:
        text = envelope.decode()
    except UnicodeDecodeError as error:
        raise RegistryError(f"the certificate for {uri} is not text.") from error
    if len(text) > LONGEST_TAG:
        raise RegistryError(
            f"the certificate for {uri} has {len(text)} characters; a tag holds {LONGEST_TAG}.",
            remedy="Keep the proofs outside the certificate.",
        )
    return text
