"""Parameters: what a project states, what `-P` gives, and the sections that they make up."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from mlflow_kdguard import plain_yaml
from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.plugin.backend import types
from mlflow_kdguard.plugin.backend.manifest import Manifest, Parameter, Stage, builtin, packaged

_CALLERS = {
    "run.work_dir": "The backend configuration (work_dir) says where.",
    "registry.tracking_uri": "MLFLOW_TRACKING_URI says where.",
}


def stated(manifest: Manifest, stages: Sequence[Stage]) -> Iterator[tuple[str, Any]]:
    """What the project says by `section.key`, where it differs from what ships.

    Raises ConfigError for unknown parameters, other types and two opinions.
    """
    places: list[tuple[str, str, Mapping[str, Parameter]]] = [
        (name, f"shared.{name}", parameters) for name, parameters in manifest.shared.items()
    ]
    for stage in stages:
        section = builtin()[stage.name].section if stage.ours else None
        if section is not None:
            places.append((section, stage.name, stage.parameters))
        elif stage.ours and stage.parameters:
            raise ConfigError(f"the stage {stage.name} takes no parameters.")
    found: dict[str, tuple[Any, str]] = {}
    for section, place, parameters in places:
        for key, parameter in parameters.items():
            name = f"{section}.{key}"
            shipped = _shipped(name, place)
            _check(parameter, shipped, f"{place}: {key}")
            if parameter.default == shipped.default:
                continue
            _refuse_callers(name, f"the project's {place}")
            value, other = found.setdefault(name, (parameter.default, place))
            if value != parameter.default:
                raise ConfigError(f"{other} and {place} state different defaults for {name}.")
    yield from ((name, value) for name, (value, _) in found.items())


def give(
    stages: Sequence[Stage],
    name: str,
    text: str,
    *,
    values: dict[str, Any],
    own: dict[str, dict[str, Any]],
) -> None:
    """Take one `-P name=text`: `section.key[.part]` of ours, or `stage.key` of the project's own.

    Raises ConfigError where there is no such parameter, or the text is of another type.
    """
    head, _, rest = name.partition(".")
    if head in own and rest in own[head]:
        stage = next(stage for stage in stages if stage.name == head)
        own[head][rest] = types.read(text, stage.parameters[rest].type or "str", where=name)
        return
    section = builtin()[head].section if head in builtin() else head
    key, _, part = rest.partition(".")
    full = f"{section}.{key}"
    if full not in _names():
        known = [*_names(), *(f"{stage}.{k}" for stage, rows in own.items() for k in rows)]
        close = get_close_matches(name, known, n=3, cutoff=0.4)
        remedy = f"Did you mean {', '.join(close)}?" if close else "See the project's plugin.yaml."
        raise ConfigError(f"-P {name}: there is no such parameter.", remedy=remedy)
    _refuse_callers(full, "-P")
    kind = _shipped(full, "-P").type or "str"
    if not part:
        values[full] = types.read(text, kind, where=name)
    elif kind == "mapping" or kind.startswith("{"):
        values[f"{full}.{part}"] = _parsed(text, name)
    else:
        raise ConfigError(f"-P {name}: {full} is of type {kind} and has no parts.")


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Sections from `section.key` and `section.key.part`; a mapping keeps its other parts."""
    values: dict[str, Any] = {}
    for name, value in sorted(flat.items(), key=lambda item: item[0].count(".")):
        section, key, *parts = name.split(".")
        place = values.setdefault(section, {})
        if not parts and not isinstance(value, dict):
            place[key] = value
            continue
        whole = place.setdefault(key, dict(_shipped(f"{section}.{key}", name).default))
        whole.update({".".join(parts): value} if parts else value)
    return values


def _shipped(name: str, place: str) -> Parameter:
    section, _, key = name.partition(".")
    for parameters in _sections().get(section, ()):
        if key in parameters:
            return parameters[key]
    raise ConfigError(
        f"{place}: there is no parameter {name}.", remedy="See docs/reference/configuration.md."
    )


def _sections() -> dict[str, list[Mapping[str, Parameter]]]:
    found: dict[str, list[Mapping[str, Parameter]]] = {}
    for section, parameters in packaged().shared.items():
        found.setdefault(section, []).append(parameters)
    for stage in builtin().values():
        if stage.section is not None:
            found.setdefault(stage.section, []).append(stage.parameters)
    return found


def _names() -> list[str]:
    return [f"{s}.{key}" for s, rows in _sections().items() for row in rows for key in row]


def _check(parameter: Parameter, shipped: Parameter, where: str) -> None:
    kind = shipped.type or "str"
    if parameter.type not in (None, kind):
        raise ConfigError(f"{where} is of type {kind}, not {parameter.type}.")
    if not types.conforms(parameter.default, kind):
        raise ConfigError(f"{where}: the default {parameter.default!r} is not of type {kind}.")


def _refuse_callers(name: str, who: str) -> None:
    if name in _CALLERS:
        raise ConfigError(f"{who} cannot set {name}.", remedy=_CALLERS[name])


def _parsed(text: str, name: str) -> Any:
    try:
        return plain_yaml.parse(text)
    except ValueError as error:
        raise ConfigError(f"-P {name}={text}: {error}.") from error
