"""adopt(): what a registry holds, and what a gate in front of it would need.

It changes nothing and loads nothing: versions are read through the registry's API, and artifact
stores are asked for names of files only.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from pydantic import Field

from mlflow_kdguard.artifacts import CERTIFICATE
from mlflow_kdguard.errors import KDGuardError
from mlflow_kdguard.files import sha256
from mlflow_kdguard.policy import Policy
from mlflow_kdguard.promoted import draft, stock
from mlflow_kdguard.records import Progress, Record, format_time, silent
from mlflow_kdguard.registry import listing
from mlflow_kdguard.registry.client import Connection
from mlflow_kdguard.registry.listing import Listed, Version

_AT_ONCE = 8
"""Versions whose artifacts are listed at once: it is waiting, not work."""


class Found(Record):
    """One version. `guarded` are the names that a gate would guard, `names` all others.

    `certificate` is the SHA-256 of the one that it carries, unchecked. `location` is where its
    bytes finally lie, `root` the artifact root above (None: nowhere that MLflow writes). `formats`
    are told by file names. `next` says what to do, where it holds a guarded name.
    """

    workspace: str
    model: str
    version: str
    guarded: tuple[str, ...]
    names: tuple[str, ...]
    certificate: str | None
    source: str
    location: str | None
    root: str | None
    formats: tuple[str, ...]
    verdict: stock.Verdict
    next: str = ""


class Root(Record):
    """A place below which versions lie; `proposed` where MLflow itself writes there."""

    uri: str
    versions: int
    proposed: bool


class Inventory(Record):
    """What a registry holds (`kdguard.adopt/1`). `settings` is a draft for a gated server."""

    schema_: Literal["kdguard.adopt/1"] = Field("kdguard.adopt/1", alias="schema")
    registry: str
    taken: str
    workspaces: tuple[str, ...]
    models: int
    versions: tuple[Found, ...]
    roots: tuple[Root, ...]
    attention: tuple[str, ...]
    settings: str

    @property
    def guarded(self) -> tuple[Found, ...]:
        """The versions that hold a guarded name."""
        return tuple(found for found in self.versions if found.guarded)


def adopt(
    connection: Connection, policy: Policy, *, now: datetime, progress: Progress = silent
) -> Inventory:
    """Take stock of every version of every model; nothing is changed, and nothing is loaded.

    Raises RegistryError where MLflow does not answer; a version whose artifacts cannot be listed
    is part of the answer.
    """
    places = listing.workspaces(connection)
    versions: list[Found] = []
    attention: list[str] = []
    models = 0
    for workspace in places:
        with listing.inside(workspace):
            listed = list(listing.models(connection))
            models += sum(not model.prompt for model in listed)
            look = _Look(connection, policy, workspace, listed)
            found = list(look.all(list(listing.versions(connection)), progress))
            attention += look.attention({(f.model, f.version) for f in found})
            versions += found
    roots = _roots(versions)
    return Inventory(
        registry=connection.identity,
        taken=format_time(now),
        workspaces=places,
        models=models,
        versions=tuple(versions),
        roots=roots,
        attention=tuple(attention),
        settings=draft.settings(
            connection.identity,
            policy=policy,
            roots=[(root.uri, root.versions) for root in roots if root.proposed],
            strange=[root.uri for root in roots if not root.proposed],
        ),
    )


@dataclass(frozen=True, slots=True)
class _Look:
    connection: Connection
    policy: Policy
    workspace: str
    models: Sequence[Listed]

    def all(self, versions: Sequence[Version], progress: Progress) -> Iterator[Found]:
        """Every version, in the given order."""
        held = self._held()
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            answers = threads.map(self._files, versions)
            for done, (version, (location, files)) in enumerate(
                zip(versions, answers, strict=True), 1
            ):
                names = held.get((version.name, version.version), [])
                if version.stage:
                    names = [*names, version.stage]
                yield self._found(version, names, location, files)
                progress(f"adopt {self.workspace}", done, len(versions), {})

    def attention(self, seen: set[tuple[str, str]]) -> Iterator[str]:
        """What a gate would refuse, or a reader would take for something else."""
        for model in self.models:
            guarded = [alias for alias in model.aliases if self.policy.guards_alias(alias)]
            for alias, version in model.aliases.items():
                where = f"{model.name}@{alias}"
                if alias in guarded and alias not in self.policy.guarded.aliases:
                    yield f"{where} is another spelling of a guarded alias; take it away"
                elif guarded and not alias.isascii():
                    yield f"{where} is not plain ASCII, on a model that holds a guarded name"
                if alias in guarded and not model.prompt and (model.name, version) not in seen:
                    yield f"{where} names version {version}, which is not there"
                if alias in guarded and model.prompt and self._artifacts(model.name, version):
                    yield f"{where} is marked as a prompt, which hides it, and holds artifacts"

    def _artifacts(self, model: str, version: str) -> bool:
        try:
            return not listing.is_text(self.connection, model, version)
        except KDGuardError:
            return True

    def _held(self) -> dict[tuple[str, str], list[str]]:
        held: dict[tuple[str, str], list[str]] = {}
        for model in self.models:
            for alias, version in model.aliases.items():
                held.setdefault((model.name, version), []).append(f"@{alias}")
        return held

    def _files(self, version: Version) -> tuple[str | None, tuple[str, ...] | None]:
        try:
            location = listing.location(self.connection, version)
            return location, listing.file_names(self.connection, location)
        except KDGuardError:
            return None, None

    def _found(
        self,
        version: Version,
        names: Sequence[str],
        location: str | None,
        files: tuple[str, ...] | None,
    ) -> Found:
        guarded = tuple(name for name in names if self._guards(name))
        envelope = version.tags.get(CERTIFICATE)
        verdict = stock.verdict(files, certified=envelope is not None)
        uri = f"models:/{version.name}/{version.version}"
        return Found(
            workspace=self.workspace,
            model=version.name,
            version=version.version,
            guarded=guarded,
            names=tuple(name for name in names if name not in guarded),
            certificate=None if envelope is None else sha256(envelope.encode()),
            source=version.source,
            location=location,
            root=None if location is None else stock.root(location),
            formats=stock.formats(files or ()),
            verdict=verdict,
            next=stock.what_next(verdict, uri) if guarded else "",
        )

    def _guards(self, name: str) -> bool:
        if name.startswith("@"):
            return self.policy.guards_alias(name[1:])
        return self.policy.guards_stage(name)


def _roots(versions: Sequence[Found]) -> tuple[Root, ...]:
    proposed = Counter(found.root for found in versions if found.root is not None)
    strange = Counter(found.location or found.source for found in versions if found.root is None)
    return tuple(
        Root(uri=uri, versions=count, proposed=known)
        for counted, known in ((proposed, True), (strange, False))
        for uri, count in sorted(counted.items())
    )
