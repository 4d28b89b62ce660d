"""A gated registry under attack: a real server, its operator's files, and what lies in its tables.

Nothing here asks the product what it thinks: aliases, stages, locations and the log are read from
the database, and bytes from the disk.
"""

import contextlib
import itertools
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
import sqlalchemy
import yaml

import toys
from flows.attacks import papers
from flows.attacks.settled import IDENTITY, SERVED, write_yaml
from flows.servers import MlflowServer
from mlflow_kdguard.attest import signing
from mlflow_kdguard.files import sha256

ADMIN = ("admin", "correct horse battery staple")


@cache
def files(seed: int = 0) -> Mapping[str, bytes]:
    """The bundle that the pipeline makes of a small network."""
    from mlflow_kdguard.registry.bundle import student_files

    return student_files(toys.onnx_tiny(shape=(1, 8, 8), classes=10, seed=seed))


@dataclass(frozen=True)
class Version:
    """A version in the registry; `folder` is where the server keeps its files."""

    name: str
    number: str
    run_id: str
    files: Mapping[str, bytes]
    folder: Path
    source: str


@dataclass
class World:
    """A gated server and everything around it that its operator holds."""

    server: MlflowServer
    database: str
    settings: Path
    keys: dict[str, signing.Signer]
    app: bool = False
    auth: bool = False
    workspaces: bool = False
    again: Any = None
    """Starts the server once more, in the same folder; returns it."""
    sequence: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    _standing: Version | None = None
    _rival: Version | None = None
    _blank: Version | None = None

    def __post_init__(self) -> None:
        self.engine = sqlalchemy.create_engine(self.database, pool_pre_ping=True)
        self.http = requests.Session()
        if self.auth:
            self.http.auth = ADMIN
        self.experiment = self.made("experiments/create", name=f"attacks-{uuid.uuid4().hex[:6]}")[
            "experiment_id"
        ]

    # ── The API, as any client sees it ──────────────────────────────────────────────────────────

    def call(
        self, path: str, body: Any = None, *, method: str = "POST", api: str = "/api/2.0/mlflow/",
        **options: Any,
    ) -> requests.Response:  # fmt: skip
        """One request, never repeated."""
        return self.http.request(
            method, f"{self.server.uri}{api}{path}", json=body, timeout=60, **options
        )

    def made(self, path: str, **body: Any) -> Any:
        """The answer to a request that must work."""
        answer = self.call(path, body)
        assert answer.ok, f"{path}: {answer.status_code} {answer.text}"
        return answer.json()

    def name(self) -> str:
        """A model's name that nobody has used."""
        return f"student-{uuid.uuid4().hex[:8]}"

    def alias(self, asked: Version, alias: str = "champion", **instead: Any) -> requests.Response:
        """Ask for an alias; `instead` overwrites what the request says."""
        body = {"name": asked.name, "alias": alias, "version": asked.number}
        return self.call("registered-models/alias", body | instead)

    def stage(
        self, version: Version, stage: str = "Production", archive: bool = False
    ) -> requests.Response:
        """Ask for a stage."""
        body = {
            "name": version.name, "version": version.number, "stage": stage,
            "archive_existing_versions": archive,
        }  # fmt: skip
        return self.call("model-versions/transition-stage", body)

    def tag(self, version: Version, value: str, key: str = "kdguard.certificate") -> Any:
        """Write a tag of a version."""
        body = {"name": version.name, "version": version.number, "key": key, "value": value}
        return self.call("model-versions/set-tag", body)

    # ── Making versions ─────────────────────────────────────────────────────────────────────────

    def version(
        self,
        name: str | None = None,
        *,
        seed: int = 0,
        content: Mapping[str, bytes] | None = None,
        certified: bool = True,
        tags: Mapping[str, str] | None = None,
    ) -> Version:
        """A version whose files lie in the server's artifacts; `certified`: its tag says so."""
        name, content = name or self.name(), files(seed) if content is None else content
        run = self.made("runs/create", experiment_id=self.experiment)["run"]["info"]
        place = f"{run['artifact_uri']}/student"
        folder = self.on_disk(place)
        for path, data in content.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        made = self.created(name, place, run["run_id"], tags or {})
        assert made.ok, made.text
        number = str(made.json()["model_version"]["version"])
        version = Version(name, number, run["run_id"], content, folder, place)
        if certified:
            self.certify(version)
        return version

    def created(
        self, name: str, source: str, run_id: str | None, tags: Mapping[str, str]
    ) -> requests.Response:
        """Ask for a version of `name`, which is made where it is missing."""
        self.call("registered-models/create", {"name": name})
        body: dict[str, Any] = {"name": name, "source": source}
        body["tags"] = [{"key": k, "value": v} for k, v in tags.items()]
        return self.call("model-versions/create", body | ({"run_id": run_id} if run_id else {}))

    def certify(self, version: Version, envelope: bytes | None = None) -> bytes:
        """Write a certificate's tag; by default one that passes."""
        envelope = self.certificate(version) if envelope is None else envelope
        answer = self.tag(version, envelope.decode())
        assert answer.ok, answer.text
        return envelope

    def certificate(self, version: Version, *signers: str, **changes: Any) -> bytes:
        """A certificate about a version's files, signed by `signers` (the verifier)."""
        own = {"model_name": version.name, "registry": IDENTITY}
        return papers.signed(
            papers.certificate(version.files, **(own | changes)),
            *(self.keys[name] for name in signers or ("verifier",)),
        )

    def champion(self, name: str | None = None, seed: int = 0) -> Version:
        """A certified version that holds `champion`."""
        version = self.version(name, seed=seed)
        answer = self.alias(version)
        assert answer.ok, f"the control did not pass: {answer.status_code} {answer.text}"
        return version

    def standing(self) -> Version:
        """A certified champion that many scenes may share, since none of them moves it."""
        if self._standing is None or self.held(self._standing.name) != self._standing.number:
            self._standing = self.champion()
        return self._standing

    def rival(self) -> Version:
        """An uncertified version of the same model as `standing`."""
        if self._rival is None or self._rival.name != self.standing().name:
            self._rival = self.version(self.standing().name, seed=1, certified=False)
        return self._rival

    def blank(self) -> Version:
        """An uncertified version that many scenes may share, each with its own certificate."""
        if self._blank is None or self.held(self._blank.name) is not None:
            self._blank = self.version(certified=False)
        return self._blank

    def on_disk(self, uri: str) -> Path:
        """The folder behind a location that the server serves or knows as a path."""
        parts = urlsplit(uri)
        if uri.startswith(SERVED):
            return self.server.folder / "content" / uri.removeprefix(SERVED).lstrip("/")
        if parts.scheme == "mlflow-artifacts":
            return self.server.artifacts / unquote(parts.path).lstrip("/")
        assert parts.scheme in ("", "file"), uri
        return Path(unquote(parts.path))

    # ── The operator's files ────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def operated(self, *, policy: Any = None, **changes: Any) -> Iterator[Path]:
        """Other settings (with the next version number) for a while; yields their folder.

        The folder is put back as it was, under a later number, also where the test breaks it.
        """
        folder = self.settings.parent
        kept = folder.with_name(folder.name + ".kept")
        shutil.copytree(folder, kept)
        try:
            if policy is not None:
                write_yaml(folder / "policy.yaml", policy)
            self.restate(changes)
            yield folder
        finally:
            shutil.rmtree(folder)
            shutil.copytree(kept, folder)
            shutil.rmtree(kept)
            self.restate({})

    def restate(self, changes: Mapping[str, Any], *, number: int | None = None) -> None:
        """Write the settings again; the number grows with every change unless one is given."""
        stated = yaml.safe_load(self.settings.read_text()) | dict(changes)
        stated["version"] = next(self.sequence) + 1 if number is None else number
        write_yaml(self.settings, stated)

    def restart(self) -> None:
        """Start the server again after it was killed, on another port."""
        self.server = self.again()

    # ── What is really there ────────────────────────────────────────────────────────────────────

    def rows(self, query: str, **values: Any) -> list[Any]:
        """What a query of the registry's database returns."""
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sqlalchemy.text(query), values)]

    def execute(self, query: str, **values: Any) -> None:
        """What an administrator of the database can do."""
        with self.engine.begin() as connection:
            connection.execute(sqlalchemy.text(query), values)

    def state(self) -> dict[str, Any]:
        """Every alias and stage, and where the versions that carry them resolve."""
        aliases = self.rows("SELECT name, alias, version FROM registered_model_aliases")
        staged = self.rows(
            "SELECT name, current_stage, version FROM model_versions "
            "WHERE current_stage IN ('Production', 'Staging', 'Archived')"
        )
        held = {(name, version) for name, _, version in (*aliases, *staged)}
        places = [
            row
            for row in self.rows(
                "SELECT name, version, source, storage_location FROM model_versions"
            )
            if (row[0], row[1]) in held
        ]
        return {"aliases": sorted(aliases), "stages": sorted(staged), "places": sorted(places)}

    def held(self, name: str, alias: str = "champion") -> str | None:
        """The version that an alias stands for, from its table."""
        query = "SELECT version FROM registered_model_aliases WHERE name = :n AND alias = :a"
        found = self.rows(query, n=name, a=alias)
        return str(found[0][0]) if found else None

    def location(self, version: Version) -> str:
        """Where a version's files are fetched from."""
        query = "SELECT storage_location, source FROM model_versions WHERE name=:n AND version=:v"
        ((stored, source),) = self.rows(query, n=version.name, v=int(version.number))
        return str(stored or source)

    def bytes_of(self, version: Version) -> dict[str, str]:
        """SHA-256 of every file that a consumer of the version would be given."""
        folder = self.on_disk(self.location(version))
        found = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()) for path in found}

    def log(self) -> list[dict[str, Any]]:
        """The audit log, in its order."""
        with self.engine.connect() as connection:
            found = connection.execute(sqlalchemy.text("SELECT * FROM kdguard_log ORDER BY seq"))
            return [dict(row) for row in found.mappings()]
