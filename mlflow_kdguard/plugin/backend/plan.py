"""What one `mlflow run` comes to: a configuration, and processes in order."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlflow_kdguard import config, policy
from mlflow_kdguard.config import GuardConfig
from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.plugin.backend import parameters, types
from mlflow_kdguard.plugin.backend.manifest import Manifest, Stage
from mlflow_kdguard.policy import Policy

LOAD = "register-teacher"
_PLACED = "{work_dir}"
_HOLE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_-]*)\}")


@dataclass(frozen=True, slots=True)
class Own:
    """A stage of the project's own: its words, and the values that they stand for."""

    name: str
    command: str
    values: Mapping[str, Any]

    def words(self, *, folder: Path, work_dir: Path) -> list[str]:
        """The command's words with every `{parameter}`, `{folder}` and `{work_dir}` filled in.

        No shell reads them, so that no value can become a command.
        """
        placed = {key: _placed(value, work_dir) for key, value in self.values.items()}
        given = {**placed, "folder": folder, "work_dir": work_dir}
        return [_filled(word, given) for word in shlex.split(self.command)]


@dataclass(frozen=True, slots=True)
class Span:
    """Stages of ours that one process runs, up to and including `until`."""

    name: str
    until: str
    limits: Literal["teacher", "stages"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that follows from manifest, parameters and entry point."""

    values: Mapping[str, Any]
    """The configuration (`GuardConfig`), validated."""
    steps: tuple[Own | Span, ...]


def make(
    manifest: Manifest,
    entry_point: str,
    given: Mapping[str, str],
    *,
    folder: Path,
    work_dir: Path,
    tracking_uri: str,
) -> Plan:
    """The plan of a project's run; `given` are the `-P` parameters, as text.

    Raises ConfigError naming the parameter that is unknown or of another type.
    """
    stages = manifest.through(entry_point)
    stated = dict(parameters.stated(manifest, stages))
    own = {s.name: {k: p.default for k, p in s.parameters.items()} for s in stages if not s.ours}
    for name, text in given.items():
        parameters.give(stages, name, text, values=stated, own=own)
    _check_own(stages, own)
    values = parameters.nested({key: _placed(value, work_dir) for key, value in stated.items()})
    values.setdefault("run", {})["work_dir"] = str(work_dir)
    values.setdefault("registry", {})["tracking_uri"] = tracking_uri
    _leave_out(values, {stage.name for stage in manifest.runs})
    checked = config.parse(values, str(folder / "plugin.yaml"))
    return Plan(checked.model_dump(mode="json"), tuple(_steps(stages, own, checked)))


def policies(floor: Policy, manifest: Manifest, where: str) -> tuple[Policy, tuple[str, ...]]:
    """The operator's policy, tightened by the project's; and which of its wishes had no effect.

    Raises ConfigError where the project's block is malformed.
    """
    if not manifest.policy:
        return floor, ()
    result = policy.narrow(floor, manifest.policy, where=f"{where}: policy")
    wished = policy.merged(floor.model_dump(mode="json"), manifest.policy)
    both = dict(_leaves(result.model_dump(mode="json")))
    loose = [
        key
        for key, value in _leaves(policy.parse(wished, where=where).model_dump(mode="json"))
        if key not in both or both[key] != value
    ]
    return result, tuple(loose)


def _check_own(stages: Sequence[Stage], own: Mapping[str, Mapping[str, Any]]) -> None:
    for stage in stages:
        for key, value in own.get(stage.name, {}).items():
            kind = stage.parameters[key].type or "str"
            if not types.conforms(value, kind):
                missing = (
                    "it needs a value" if value is None else f"{value!r} is not of type {kind}"
                )
                raise ConfigError(
                    f"{stage.name}.{key}: {missing}.", remedy=f"Give -P {stage.name}.{key}=…"
                )


def _leave_out(values: dict[str, Any], names: Set[str]) -> None:
    """What leaving out a stage means for the configuration."""
    if "redteam" in names:
        values.setdefault("redteam", {})
    elif "redteam" in values:
        raise ConfigError("-P redteam: the project does not run that stage.")
    if "detox" not in names:
        values.setdefault("detox", {})["chain"] = []
    if "certify-smooth" not in names:
        values.setdefault("smooth", {})["sigma"] = None
    if "certify-patch" not in names:
        values.setdefault("patch", {})["targets"] = []
    if LOAD not in names:
        values.setdefault("teacher", {})["name"] = None


def _steps(
    stages: Sequence[Stage], own: Mapping[str, Mapping[str, Any]], told: GuardConfig
) -> Iterator[Own | Span]:
    """Neighbouring stages of ours share a process; the one that loads the teacher has its own."""
    load = LOAD if told.teacher.name is not None else "teacher"
    loaded, waiting = False, ""
    for stage in stages:
        if waiting and (not stage.ours or waiting == "redteam"):
            yield Span(waiting, waiting, "stages")
            waiting = ""
        if not stage.ours:
            yield Own(stage.name, stage.command or "", own[stage.name])
        elif stage.name == "redteam":
            waiting = stage.name
        elif not loaded:
            loaded = True
            yield Span("teacher", load, "teacher")
            waiting = "" if stage.name == LOAD else stage.name
        else:
            waiting = stage.name
    if waiting:
        yield Span(waiting, waiting, "stages")


def _placed(value: Any, work_dir: Path) -> Any:
    if isinstance(value, str):
        return value.replace(_PLACED, str(work_dir))
    return [_placed(item, work_dir) for item in value] if isinstance(value, list) else value


def _filled(word: str, given: Mapping[str, Any]) -> str:
    """One pass over the word: what a value holds is not filled in again."""
    texts = {name: "" if value is None else str(value) for name, value in given.items()}
    return _HOLE.sub(lambda found: texts.get(found[1], found[0]), word)


def _leaves(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
