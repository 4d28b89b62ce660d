"""YAML with one reading: what decides about a promotion is read strictly, or not at all.

Of two values for one key YAML readers keep one and drop the other without a word; an alias (`*x`)
lets a few lines stand for more than any memory holds; and PyYAML's own constructors raise errors
of every kind.
"""

from collections.abc import Hashable
from typing import Any

import yaml

_DEEPEST = 64


class _Loader(yaml.SafeLoader):
    """The safe loader, which refuses repeated keys, aliases, and what is nested too deeply."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias (*), which stands for a part above")
        if self._depth > _DEEPEST:  # three thousand braces took seconds to be read
            raise yaml.YAMLError("it is nested too deeply")
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.YAMLError(f"it holds the key {key!r} twice")
                seen.add(key)
        return super().construct_mapping(node, deep)


def parse(data: bytes | str) -> Any:
    """The value of one YAML document; ValueError says in one line why there is none."""
    try:
        return yaml.load(data, _Loader)  # noqa: S506  (a subclass of the safe loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        # What PyYAML lets through from `2026-13-45`, `!!bool x`, `!!int ""` or `!!timestamp x`.
        raise ValueError(f"a value in it is malformed ({type(error).__name__})") from error
