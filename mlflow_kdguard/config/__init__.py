"""What a guarded distillation is told: one frozen section a stage (`sections`), and how it is read.

Sources, later ones win: the packaged `plugin.yaml`, the user's file, `--set section.key=value`.
Unknown keys are errors. What only the caller may grant (keys, the policy, `--trust-code`,
`--download`) has no field here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mlflow_kdguard import plain_yaml
from mlflow_kdguard.config.base import Loop, Section, Verifiable
from mlflow_kdguard.config.sections import (
    AttestSection,
    AuditSection,
    CertifySection,
    DataSection,
    DetoxSection,
    DistillSection,
    ExportSection,
    GuardConfig,
    MeasureSection,
    PatchSection,
    RedteamSection,
    RegistrySection,
    RunSection,
    SmoothSection,
    TeacherSection,
    TeachSection,
)
from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.files import read_bytes

__all__ = [
    "AttestSection",
    "AuditSection",
    "CertifySection",
    "DataSection",
    "DetoxSection",
    "DistillSection",
    "ExportSection",
    "GuardConfig",
    "Loop",
    "MeasureSection",
    "PatchSection",
    "RedteamSection",
    "RegistrySection",
    "RunSection",
    "Section",
    "SmoothSection",
    "TeachSection",
    "TeacherSection",
    "Verifiable",
    "explain",
    "load",
    "parse",
    "read_mapping",
]


def load(
    path: Path | None = None,
    overrides: Sequence[str] = (),
    named: Mapping[str, str] | None = None,
) -> GuardConfig:
    """Read a configuration file and apply `section.key=value` overrides, values in YAML.

    `named` holds values by `section.key` that are text as they stand, such as paths.
    Raises ConfigError naming the file, the key and what would be right.
    """
    values = read_mapping(path, "the configuration") if path is not None else {}
    for override in overrides:
        _assign(values, override)
    for key, text in (named or {}).items():
        place = _section(values, key.split("."), key)
        place[key.rpartition(".")[2]] = text
    return parse(values, str(path) if path is not None else "--set")


def parse(values: Mapping[str, Any], where: str) -> GuardConfig:
    """Validate a mapping; ConfigError names `where` and every wrong key."""
    try:
        return GuardConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            f"{where}: {explain(error)}",
            remedy="docs/reference/configuration.md has every key with its range.",
        ) from error


def explain(error: ValidationError, names: Mapping[str, str] | None = None) -> str:
    """One line for all of pydantic's complaints: key, what is wrong, what was given.

    `names`: what some keys are called where their value came from.
    """
    names = {} if names is None else names
    lines = []
    for item in error.errors(include_url=False, include_context=False):
        key = ".".join(names.get(str(part), str(part)) for part in item["loc"]) or "(document)"
        what = "unknown key" if item["type"] == "extra_forbidden" else item["msg"]
        lines.append(f"{key}: {what}")
    return "; ".join(lines) + "."


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """A YAML file that holds one mapping; ConfigError otherwise."""
    try:
        values = plain_yaml.parse(read_bytes(path, what=what))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}.") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} must hold sections such as `distill:`.")
    return values


def _assign(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or len(parts) < 2 or not all(parts):
        raise ConfigError(
            f"--set {override!r} does not name a value.", remedy="Write section.key=value."
        )
    place = _section(values, parts, override)
    try:
        place[parts[-1]] = plain_yaml.parse(text)
    except ValueError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML.") from error


def _section(values: dict[str, Any], parts: Sequence[str], override: str) -> dict[str, Any]:
    """The mapping that holds the last of `parts`, made where it is missing."""
    place = values
    for part in parts[:-1]:
        inner = place.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override!r}: {part} is not a section.")
        place = inner
    return place
