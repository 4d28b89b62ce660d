"""The types that a manifest spells (`int`, `float?`, `off|bfloat16`, `[str]`), and their values."""

import math
import re
from contextlib import suppress
from typing import Any

from mlflow_kdguard import plain_yaml
from mlflow_kdguard.errors import ConfigError

_LITERAL = re.compile(r"^[A-Za-z0-9_.-]+$")
_KINDS = {"int", "float", "bool", "str", "mapping"}


def known(kind: str) -> bool:
    """Whether `kind` is a type that this file can read."""
    if kind.endswith("?"):
        return known(kind[:-1])
    return all(map(_known_alone, kind.split("|")))


def conforms(value: Any, kind: str) -> bool:
    """Whether a value is of the type; an integer is a float, and no number is a bool."""
    if kind.endswith("?"):
        return value is None or conforms(value, kind[:-1])
    return any(_conforms(value, one) for one in kind.split("|"))


def read(text: str, kind: str, *, where: str) -> Any:
    """The value that `-P where=text` stands for; text stays text where the type is `str`.

    An empty text is null where the type allows it. Raises ConfigError naming `where`.
    """
    if kind.endswith("?") and text in ("", "null"):
        return None
    if conforms(text, kind):
        return text
    try:
        value = plain_yaml.parse(text)
    except ValueError as error:
        raise ConfigError(f"-P {where}={text}: {error}.") from error
    if isinstance(value, str) and "float" in kind.rstrip("?").split("|"):
        with suppress(ValueError):
            value = float(value)  # YAML reads 1e-3 as text
    if not conforms(value, kind):
        raise ConfigError(f"-P {where}={text}: a value of type {kind} is needed.")
    return value


def _known_alone(kind: str) -> bool:
    if kind.startswith("[") and kind.endswith("]"):
        return known(kind[1:-1])
    if kind.startswith("{str: ") and kind.endswith("}"):
        return known(kind[6:-1])
    return kind in _KINDS or _LITERAL.match(kind) is not None


def _conforms(value: Any, kind: str) -> bool:
    if kind.startswith("["):
        return isinstance(value, list) and all(conforms(item, kind[1:-1]) for item in value)
    if kind.startswith("{"):
        items = value.items() if isinstance(value, dict) else [(0, 0)]
        return all(isinstance(k, str) and conforms(v, kind[6:-1]) for k, v in items)
    if kind == "float":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    plain = {"bool": bool, "str": str, "mapping": dict}.get(kind)
    return isinstance(value, plain) if plain is not None else value == kind
