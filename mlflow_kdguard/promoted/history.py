"""What the log says that each guarded name stands for, to hold the registry's tables against."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlflow_kdguard.records import Record

GIVES = frozenset({"promote", "stage", "override", "would-refuse"})
"""Actions after which a version holds a name; the last one in audit mode, which blocks nothing."""
_TAKES = frozenset({"demote"})
_MOVES = frozenset({"would-rename-refused", "would-delete-refused"})
"""What audit mode lets happen to a whole model, and writes down."""

Key = tuple[str, str, str]
"""Workspace, model, and alias or stage."""


class Logged(Record):
    """An entry of the log, as far as a sweep shows it."""

    seq: int
    time: str
    actor: str
    action: str
    workspace: str
    model: str
    version: str
    alias: str
    reasons: tuple[str, ...] = ()

    @staticmethod
    def of(row: Mapping[str, Any]) -> "Logged":
        """An entry from a row of the database or of the server's answer."""
        reasons = row["reasons"]
        if isinstance(reasons, str):
            reasons = _texts(reasons)
        told = {key: str(row[key]) for key in Logged.model_fields if key not in ("seq", "reasons")}
        return Logged(seq=int(row["seq"]), reasons=tuple(map(str, reasons)), **told)

    @property
    def key(self) -> Key:
        """What it speaks of."""
        return (self.workspace, self.model, self.alias)


@dataclass(slots=True)
class History:
    """The last word about every name; fill it with hear(), the oldest entry first."""

    aliases: dict[Key, Logged] = field(default_factory=dict)
    versions: dict[tuple[Key, str], Logged] = field(default_factory=dict)
    moved: set[tuple[str, str]] = field(default_factory=set)
    would_refuse: list[Logged] = field(default_factory=list)

    @staticmethod
    def of(rows: Iterable[Mapping[str, Any]]) -> "History":
        """The history that these entries tell, the oldest first."""
        history = History()
        for row in rows:
            history.hear(Logged.of(row))
        return history

    def hear(self, entry: Logged) -> None:
        """Take note of one entry."""
        if entry.action.startswith("would-"):
            self.would_refuse.append(entry)
        if entry.action in _MOVES:
            self.moved.add(entry.key[:2])
        if entry.action in GIVES | _TAKES:
            self.aliases[entry.key] = entry
            self.versions[entry.key, entry.version] = entry

    def given(self, key: Key, version: str | None = None) -> Logged | None:
        """The entry by which the name was given, to this version; None where it was taken since."""
        found = self.aliases.get(key) if version is None else self.versions.get((key, version))
        return found if found is not None and found.action in GIVES else None

    def aliases_given(self) -> Iterable[Logged]:
        """By name, what the log says is held; not of models that audit mode let go."""
        for key, entry in sorted(self.aliases.items()):
            if entry.action in GIVES and key[:2] not in self.moved:
                yield entry


def _texts(text: str) -> list[Any]:
    try:
        found = json.loads(text or "[]")
    except ValueError:  # somebody edited it, which the chain shows
        return [text]
    return found if isinstance(found, list) else [text]
