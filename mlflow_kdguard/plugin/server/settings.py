"""What the operator of a gated server states, in one file that KDGUARD_SERVER names.

Every guarded change reads the files anew, byte for byte; parsing is repeated only where a byte has
changed. What cannot be read is an error, never a default: the server then does not start, or
refuses guarded changes where it is running already.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self
from urllib.parse import quote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mlflow_kdguard import plain_yaml
from mlflow_kdguard.attest import Signer, Verifier
from mlflow_kdguard.config import explain
from mlflow_kdguard.errors import ConfigError, UsageError
from mlflow_kdguard.files import digest_json, holds, read_bytes, sha256
from mlflow_kdguard.plugin.server import keys
from mlflow_kdguard.plugin.server.keys import Keys
from mlflow_kdguard.plugin.server.places import Place
from mlflow_kdguard.policy import Policy, block, guarded_name, load, narrow, read

VARIABLE = "KDGUARD_SERVER"
"""Environment variable that names the settings file."""
DEFAULT_WORKSPACE = "default"
_LARGEST = 1 << 20
_REMEDY = "See docs/reference/server.md."


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Content(_Block):
    """Where promoted bytes are copied, and the URI under which clients read them."""

    root: str
    clients: str | None = None

    @field_validator("root", "clients")
    @classmethod
    def _a_place(cls, uri: str | None) -> str | None:
        if uri is not None:
            _absolute(uri)
        return uri

    @field_validator("root")
    @classmethod
    def _no_route_writes_it(cls, root: str) -> str:
        if Place.of(root).scheme == "mlflow-artifacts":
            raise ValueError("content.root lies where every client may write")
        return root

    @property
    def served(self) -> str:
        """The URI that a promoted version names."""
        return self.root if self.clients is None else self.clients


class Log(_Block):
    """The key that signs the log's head, and the file outside of the database that keeps heads."""

    key: str
    head: str


class Stated(_Block):
    """The settings file, as it is written; paths are relative to it."""

    version: int = Field(ge=1)
    registry: list[str] = Field(min_length=1)
    mode: Literal["enforce", "audit"] = "enforce"
    policy: str | None = None
    models: dict[str, str] = Field(default_factory=dict)
    keys: str
    revoked: str | None = None
    allow: list[str] = Field(min_length=1)
    content: Content
    log: Log
    overrides: bool = False
    rollback_days: float = Field(0, ge=0, le=3650, allow_inf_nan=False, strict=False)
    nonces: Literal["required", "optional"] = "optional"

    @field_validator("registry")
    @classmethod
    def _without_credentials(cls, uris: list[str]) -> list[str]:
        for uri in uris:
            parts = urlsplit(uri)
            if not parts.scheme or "@" in parts.netloc or parts.query or parts.fragment:
                raise ValueError(f"{uri!r} is no URI without credentials, query and fragment")
        return [uri.rstrip("/") for uri in uris]

    @field_validator("allow")
    @classmethod
    def _places(cls, uris: list[str]) -> list[str]:
        for uri in uris:
            _absolute(uri)
        return uris

    @model_validator(mode="before")
    @classmethod
    def _yes_is_no_number(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(values.get("rollback_days"), bool):
            raise ValueError("rollback_days is a number of days")  # noqa: TRY004  (pydantic)
        return values


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings with everything that they name, read and checked.

    `digest` covers every byte that decides: the file, policies, keys and revocations.
    """

    path: Path
    stated: Stated
    digest: str
    policy: Policy
    models: Mapping[str, Policy]
    keys: Keys
    signer: Signer
    sources: Mapping[str, bytes]
    places: Mapping[str, str]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the settings in `path`; KDGuardError names the file and what is wrong in it."""
        data = _read(path, "the settings")
        stated = _stated(data, str(path))
        return cls._parsed(path, stated, _sources(path, data, stated))

    def current(self) -> "Settings":
        """These settings where no byte of them has changed since, else new ones."""
        if self._unchanged():
            return self
        data = _read(self.path, "the settings")
        same = data == self.sources["settings"]
        stated = self.stated if same else _stated(data, str(self.path))
        sources = _sources(self.path, data, stated)
        return self if sources == self.sources else self._parsed(self.path, stated, sources)

    def _unchanged(self) -> bool:
        """Whether every file holds the bytes that were read; False where one cannot be read.

        It stands before most calls of the registry, so it opens files and does no more.
        """
        listed = {role[5:] for role in self.sources if role.startswith("keys/")}
        try:
            return keys.names(self.path.parent / self.stated.keys) == listed and all(
                holds(self.places[role], data) for role, data in self.sources.items()
            )
        except OSError:
            return False

    @classmethod
    def _parsed(cls, path: Path, stated: Stated, sources: dict[str, bytes]) -> Self:
        floor = read(sources["policy"], where="the policy") if stated.policy else load()
        narrowed = {
            guarded_name(name): _narrowed(floor, sources[f"models/{name}"], name)
            for name in stated.models
        }
        if len(narrowed) != len(stated.models):
            raise ConfigError(f"{path}: models names one model twice.", remedy=_REMEDY)
        records = {k[5:]: v for k, v in sources.items() if k.startswith("keys/")}
        return cls(
            path,
            stated,
            digest_json({k: sha256(v) for k, v in sources.items() if not k.startswith("log/")}),
            floor,
            MappingProxyType(narrowed),
            keys.trusted(records, sources.get("revoked"), where=stated.keys),
            Signer.load(path.parent / stated.log.key),
            MappingProxyType(sources),
            MappingProxyType({role: str(place) for role, place in _places(path, stated, sources)}),
        )

    def policy_for(self, model: str) -> Policy:
        """The policy of one model: the server's, or tighter."""
        return self.models.get(guarded_name(model), self.policy)

    @property
    def version(self) -> int:
        """The number that only grows."""
        return self.stated.version

    @property
    def enforcing(self) -> bool:
        """Whether a refusal blocks."""
        return self.stated.mode == "enforce"

    @property
    def verifiers(self) -> tuple[Verifier, ...]:
        """The trusted keys, each with the time from which it counts as compromised."""
        return self.keys.verifiers

    @property
    def head(self) -> Path:
        """The file that keeps the log's signed heads."""
        return self.path.parent / self.stated.log.head

    @property
    def allowed(self) -> tuple[Place, ...]:
        """Roots that a version's bytes may lie under: the operator's and the content root."""
        content = self.stated.content
        return tuple(Place.of(uri) for uri in (*self.stated.allow, content.root, content.served))

    def identities(self, workspace: str) -> tuple[str, ...]:
        """What a certificate may name as its registry, for a model of this workspace."""
        mark = "" if workspace == DEFAULT_WORKSPACE else f"#workspace={quote(workspace, safe='')}"
        return tuple(uri + mark for uri in self.stated.registry)


def named() -> Path:
    """The file that KDGUARD_SERVER names; ConfigError where it names none."""
    value = os.environ.get(VARIABLE, "")
    if not value:
        raise ConfigError(
            f"{VARIABLE} is not set: a gated registry does not work without its settings.",
            remedy=f"Set it to the settings file. {_REMEDY}",
        )
    return Path(value).absolute()


def _sources(path: Path, data: bytes, stated: Stated) -> dict[str, bytes]:
    """Every file that the settings consist of, by role."""
    records = keys.files(path.parent / stated.keys)
    sources = {"settings": data} | {f"keys/{name}": data for name, data in records.items()}
    for role, place in _places(path, stated, tuple(sources)):
        if role not in sources:
            sources[role] = _read(place, _WHAT[role.partition("/")[0]])
    return sources


def _places(path: Path, stated: Stated, roles: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """Where each of these files lies, and each that the settings name, by role."""
    folder = path.parent
    yield "settings", path
    if stated.policy:
        yield "policy", folder / stated.policy
    for name, file in stated.models.items():
        yield f"models/{name}", folder / file
    for role in roles:
        if role.startswith("keys/"):
            yield role, folder / stated.keys / role[5:]
    if stated.revoked:
        yield "revoked", folder / stated.revoked
    yield "log/key", folder / stated.log.key


_WHAT = {
    "policy": "the policy",
    "models": "the policy",
    "revoked": "the list of revocations",
    "log": "the log's key",
}


def _read(path: Path, what: str) -> bytes:
    return read_bytes(path, what=what, at_most=_LARGEST)


def _stated(data: bytes, where: str) -> Stated:
    try:
        return Stated.model_validate(plain_yaml.parse(data))
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error)}", remedy=_REMEDY) from error
    except ValueError as error:
        raise ConfigError(f"{where}: {error}.", remedy=_REMEDY) from error


def _narrowed(floor: Policy, data: bytes, name: str) -> Policy:
    where = f"the policy of {name}"
    return narrow(floor, block(data, where=where), where=where)


def _absolute(uri: str) -> None:
    try:
        place = Place.of(uri)
    except UsageError as error:
        raise ValueError(error.message) from error
    if place.scheme in ("runs", "models"):
        raise ValueError(f"{uri!r} is no place of its own")
