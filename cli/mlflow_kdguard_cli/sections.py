"""Sections of the configuration from a command's flags."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from mlflow_kdguard.config import Section

    S = TypeVar("S", bound=Section)

FLAGS = {"pgd_steps": "--steps", "seconds": "--budget", "positions": "--position"}
"""What flags are called that do not have the names of the configuration's keys."""


def section(kind: "type[S]", given: Mapping[str, Any], command: str) -> "S":
    """`given` as a checked section; ConfigError says which flag of `command` is wrong, and how."""
    from pydantic import ValidationError

    from mlflow_kdguard.config import explain
    from mlflow_kdguard.errors import ConfigError

    try:
        return kind(**given)
    except ValidationError as error:
        names = {key: FLAGS.get(key, "--" + key.replace("_", "-")) for key in given}
        remedy = f"See `kdguard {command} --help`."
        raise ConfigError(explain(error, names), remedy=remedy) from error
