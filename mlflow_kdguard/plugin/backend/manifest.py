"""A project's `plugin.yaml`: which stages it runs, with which parameters, under which policy.

The format is that of the packaged manifest. A project's copy may leave out stages, state other
defaults, tighten the policy, and put stages of its own between ours, each with a command.
"""

import shlex
from collections.abc import Mapping
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from mlflow_kdguard import plain_yaml
from mlflow_kdguard.config import Section, explain, read_mapping
from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.plugin.backend import types

FILE = "plugin.yaml"
MAIN = "main"
"""MLflow's name for the entry point where the user names none."""

LEAVABLE = frozenset(
    {"redteam", "register-teacher", "detox", "certify-smooth", "certify-patch", "verify"}
)
"""Stages of ours that the later ones do without."""


class Parameter(Section):
    """One parameter: its type as text, what it is where nobody says otherwise, and what for."""

    type: str | None = None
    default: Any = None
    help: str = ""


class Stage(Section):
    """One stage; `command` is needed for a project's own, and fixed for ours."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,63}$")
    command: str | None = None
    section: str | None = None
    optional: bool = False
    parameters: dict[str, Parameter] = Field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether it is a stage of the packaged manifest."""
        return self.name in builtin()


class Manifest(Section):
    """The whole file; `main` names the last stage of `mlflow run` without `-e`."""

    name: str = Field(min_length=1)
    version: str | None = None
    provides: Any = None
    main: str | None = None
    shared: dict[str, dict[str, Parameter]] = Field(default_factory=dict)
    stages: tuple[Stage, ...] = Field(min_length=1)
    policy: dict[str, Any] = Field(default_factory=dict)

    @property
    def runs(self) -> tuple[Stage, ...]:
        """The stages that a run goes through: an optional one is only offered."""
        return tuple(stage for stage in self.stages if not stage.optional)

    def through(self, entry_point: str) -> tuple[Stage, ...]:
        """The stages up to the entry point: a stage's name, or `main`.

        Raises ConfigError where the project has no such stage.
        """
        names = [stage.name for stage in self.runs]
        last = entry_point
        if entry_point == MAIN and MAIN not in names:
            last = self.main or names[-1]
        if last not in names:
            raise ConfigError(
                f"the project {self.name} runs no stage {last!r}.",
                remedy=f"Its stages are {', '.join(names)}.",
            )
        return self.runs[: names.index(last) + 1]


@cache
def packaged() -> Manifest:
    """The manifest that ships with this package."""
    text = package_files("mlflow_kdguard").joinpath(FILE).read_bytes()
    return Manifest.model_validate(plain_yaml.parse(text))


@cache
def builtin() -> Mapping[str, Stage]:
    """Our own stages by name, in their order."""
    return {stage.name: stage for stage in packaged().stages}


def load(folder: Path) -> Manifest:
    """Read a project's manifest; ConfigError names the file and what is wrong with it."""
    path = folder / FILE
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no {FILE}: the kdguard backend runs the stages that it declares.",
            remedy="See examples/project, or use `mlflow run` without -b for an MLproject.",
        )
    values = read_mapping(path, f"the project's {FILE}")
    try:
        found = Manifest.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error)}") from error
    _check(found, str(path))
    return found


def _check(found: Manifest, where: str) -> None:
    names = [stage.name for stage in found.stages]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{where}: the stage {twice[0]} is declared twice.")
    if not found.runs:
        raise ConfigError(f"{where}: every stage is optional, so nothing would run.")
    for stage in found.stages:
        _check_ours(stage, where) if stage.ours else _check_own(stage, where)
    _check_order([stage.name for stage in found.runs if stage.ours], where)
    found.through(MAIN)


def _check_ours(stage: Stage, where: str) -> None:
    ours = builtin()[stage.name]
    for key in ("command", "section"):
        stated = getattr(stage, key)
        if stated not in (None, getattr(ours, key)):
            raise ConfigError(
                f"{where}: the {key} of the stage {stage.name} is {getattr(ours, key)!r}, "
                f"not {stated!r}.",
                remedy="Give a stage of your own another name.",
            )


def _check_own(stage: Stage, where: str) -> None:
    place = f"{where}: the stage {stage.name}"
    if not stage.command or stage.section is not None:
        raise ConfigError(
            f"{place} is not one of ours, so it needs a command and no section.",
            remedy=f"Ours are {', '.join(builtin())}.",
        )
    try:
        words = shlex.split(stage.command)
    except ValueError as error:
        raise ConfigError(f"{place}: its command cannot be split: {error}.") from error
    if not words:
        raise ConfigError(f"{place}: its command is empty.")
    for name, parameter in stage.parameters.items():
        if parameter.type is None or not types.known(parameter.type):
            raise ConfigError(f"{place}: parameter {name} has the unknown type {parameter.type!r}.")


def _check_order(names: list[str], where: str) -> None:
    """Ours come in their order, and nothing is left out that a later one needs."""
    order = list(builtin())
    if names != sorted(names, key=order.index):
        raise ConfigError(
            f"{where}: our stages are out of order: {', '.join(names)}.",
            remedy=f"Their order is {', '.join(order)}.",
        )
    reached = order.index(names[-1]) if names else -1
    missing = [n for n in order[: reached + 1] if n not in names and n not in LEAVABLE]
    if missing:
        raise ConfigError(f"{where}: {names[-1]} needs the stage {missing[0]}, which is left out.")
