"""Files that say what the table is made of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from mlflow_kdguard.config import Section, explain, read_mapping
from mlflow_kdguard.errors import ConfigError

PARTS: dict[str, set[str]] = {
    "sets": {"train", "clean", "validation", "test"}, "pairs": set(), "rows": set(), "guards": set()
}  # fmt: skip
Kind = TypeVar("Kind", bound=Section)


def read(path: Path) -> dict[str, Any]:
    """A specification; one that `extends` another (relative to itself) says what is different.

    Mappings are merged, null takes an entry away, anything else replaces what was there. Raises
    ConfigError for a file that is none or lacks a part, UsageError for one that is not there.
    """
    told = _extended(path, ())
    for part, keys in PARTS.items():
        if not isinstance(told.get(part), dict):
            raise ConfigError(
                f"{path} has no {part}.",
                remedy=f"A specification tells {', '.join(PARTS)}, or extends one that does.",
            )
        if not keys <= set(told[part]):
            raise ConfigError(f"{path}: {part} lack {', '.join(sorted(keys - set(told[part])))}.")
    return told


def _extended(path: Path, through: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in through:
        raise ConfigError(f"{path} extends itself.", remedy="Let one of the files extend nothing.")
    told = read_mapping(path, "the specification")
    base = told.pop("extends", None)
    if base is None:
        return told
    merged: dict[str, Any] = _merged(
        _extended(path.parent / str(base), (*through, path.resolve())), told
    )
    return merged


def _merged(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    merged = {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}
    return {key: value for key, value in merged.items() if key == "instances" or value is not None}


def section(kind: type[Kind], told: Mapping[str, Any]) -> Kind:
    """A section of the configuration; ConfigError says which key is wrong, and how."""
    try:
        return kind(**told)
    except ValidationError as error:
        raise ConfigError(f"{kind.__name__} {dict(told)}: {explain(error)}") from error
