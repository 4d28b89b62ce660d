"""What must hold before a guarded alias may move, as the operator of a registry writes it.

A policy is read over the packaged one (`plugin.yaml`): a key that is left out keeps the packaged
value, and only an explicit `null` waives a rule. `tighten` takes the tighter value of every field,
so that a project can demand more than the server does, and never less.
"""

import unicodedata
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib.resources import files as package_files
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from mlflow_kdguard import plain_yaml
from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.files import digest_json, read_bytes
from mlflow_kdguard.policy.blocks import (
    Accuracy,
    Asr,
    Audit,
    Block,
    CertificateRule,
    Certified,
    Data,
    Export,
    Faithful,
    Guarded,
    Patch,
    Reference,
    Smoothed,
)

__all__ = [
    "Accuracy",
    "Asr",
    "Audit",
    "CertificateRule",
    "Certified",
    "Data",
    "Export",
    "Faithful",
    "Guarded",
    "Patch",
    "Policy",
    "Reference",
    "Smoothed",
    "block",
    "guarded_name",
    "load",
    "merged",
    "narrow",
    "parse",
    "read",
    "tighten",
]


def guarded_name(name: str) -> str:
    """What a reader takes a name for: NFKD, without marks and invisible characters, casefolded.

    MLflow accepts `châmpion` beside `champion`, and a consumer may ask for either.
    """
    if name.isascii():  # the same, sooner: there are neither marks nor invisible characters
        return name.strip().casefold()
    return _bare(_bare(name).casefold())


def _bare(name: str) -> str:
    kept = (c for c in unicodedata.normalize("NFKD", name) if unicodedata.category(c)[0] != "M")
    return "".join(c for c in kept if unicodedata.category(c) != "Cf").strip()


@lru_cache
def _guarded_names(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(map(guarded_name, names))


class Policy(Block):
    """The whole policy. A block or limit that is None is waived, in writing."""

    guarded: Guarded
    data: Data
    accuracy: Accuracy | None
    asr: Asr | None
    reference: Reference | None
    faithful: Faithful | None
    patch: Patch | None
    audit: Audit | None
    export: Export | None
    certificate: CertificateRule

    @property
    def digest(self) -> str:
        """SHA-256 of every value."""
        return digest_json(self.model_dump(mode="json"))

    def guards_alias(self, alias: str) -> bool:
        """Whether `alias` is guarded, however it is spelled."""
        return guarded_name(alias) in _guarded_names(self.guarded.aliases)

    def guards_stage(self, stage: str) -> bool:
        """Whether `stage` is guarded, however it is spelled."""
        return guarded_name(stage) in _guarded_names(self.guarded.stages)


def load(path: Path | None = None) -> Policy:
    """The packaged policy, or the operator's file read over it.

    The file holds the block itself or, like `plugin.yaml`, has it under `policy:`. Raises
    UsageError for an unreadable file, ConfigError naming the file and every wrong key.
    """
    if path is None:
        return parse(_packaged(), where="plugin.yaml")
    return read(read_bytes(path, what="the policy"), where=str(path))


def read(data: bytes, *, where: str) -> Policy:
    """The bytes of an operator's file, read over the packaged policy; ConfigError as `load`."""
    return parse(merged(_packaged(), block(data, where=where)), where=where)


def parse(values: Mapping[str, Any], *, where: str) -> Policy:
    """Validate a complete policy; ConfigError names `where` and every wrong key."""
    try:
        return Policy.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            f"{where}: {_complaints(error)}", remedy="See docs/reference/policy.md."
        ) from error


def tighten(floor: Policy, other: Policy) -> Policy:
    """The policy that lets pass only what `floor` and `other` both let pass."""
    return floor.tightened(other)


def narrow(floor: Policy, values: Mapping[str, Any], *, where: str) -> Policy:
    """`floor`, tightened by a project's partial policy: what it leaves out stays as it is."""
    return tighten(floor, parse(merged(floor.model_dump(mode="json"), values), where=where))


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below`, with every key that `above` states; mappings are merged, lists replaced."""
    result = dict(below)
    for key, value in above.items():
        ours = result.get(key)
        both = isinstance(ours, Mapping) and isinstance(value, Mapping)
        result[key] = merged(ours, value) if both else value  # type: ignore[arg-type]
    return result


@cache
def _packaged() -> Mapping[str, Any]:
    file = package_files("mlflow_kdguard").joinpath("plugin.yaml")
    return MappingProxyType(block(file.read_bytes(), where="plugin.yaml"))


def block(data: bytes, *, where: str) -> dict[str, Any]:
    """What a file states, complete or not, with or without `policy:` above it; ConfigError."""
    try:
        values = plain_yaml.parse(data)
    except ValueError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}.") from error
    stated = values.get("policy", values) if isinstance(values, dict) else None
    known = Policy.model_fields.keys()
    beside = () if stated is values or stated is None else values.keys() & known
    if beside:
        raise ConfigError(
            f"{where} holds {min(beside)!r} beside `policy:`, where it has no effect.",
            remedy="Move it below `policy:`.",
        )
    if not isinstance(stated, dict) or not all(isinstance(key, str) for key in stated):
        raise ConfigError(f"{where} holds no policy.", remedy="See docs/reference/policy.md.")
    return stated


def _complaints(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False, include_context=False):
        key = ".".join(str(part) for part in item["loc"]) or "policy"
        lines.append(
            f"{key}: {'unknown key' if item['type'] == 'extra_forbidden' else item['msg']}"
        )
    return "; ".join(lines) + "."
