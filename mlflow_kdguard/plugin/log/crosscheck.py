"""The log's other tables against the log: each row there was written together with an entry.

Attempts that are forgotten, or settings that were never in force, would otherwise leave the chain
untouched.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import RowMapping, Select, select

from mlflow_kdguard.files import sha256
from mlflow_kdguard.plugin.log import tables
from mlflow_kdguard.plugin.log.nonces import series_of
from mlflow_kdguard.plugin.log.tables import Database

_Row = tuple[str, ...]


class Companions:
    """What the entries say that the other tables hold: make it, hear() every entry, then ask.

    The tables are read before the log and after it, since the server may be working: what was there
    before must be in the log, and what is in the log must be there afterwards.
    """

    def __init__(self, session: Database) -> None:
        self._before = _held(session)
        self._stated: dict[str, set[_Row]] = {action: set() for action in _TABLES}

    def hear(self, row: RowMapping) -> None:
        """Take note of one entry."""
        if row["action"] in self._stated:
            self._stated[row["action"]].add(_stated(row))

    def problems(self, session: Database) -> Iterator[str]:
        """What a table has more, or less, or otherwise than the entries say."""
        after = _held(session)
        for action, stated in self._stated.items():
            for row in sorted(stated - after[action]):
                yield f"the {action} {_named(row)} is in the log, and not (or not so) in its table"
            for row in sorted(self._before[action] - stated):
                yield f"the {action} {_named(row)} is in its table, and not (or not so) in the log"


def _held(session: Database) -> dict[str, set[_Row]]:
    return {
        action: {read(row) for row in session.execute(rows).mappings()}
        for action, (rows, read) in _TABLES.items()
    }


def _named(row: _Row) -> str:
    return " ".join(part[:64] for part in row if part)


def _stated(row: RowMapping) -> _Row:
    about = (row["workspace"], row["model"])
    if row["action"] == "nonce":
        return _texts(*_reasons(row)[:2], *about, row["certificate"])
    if row["action"] == "settings":
        return _texts(row["version"], row["certificate"])
    why = _reasons(row)
    ends = next((i for i, text in enumerate(why) if text.startswith("until ")), -1)
    return _texts(row["certificate"], *about, row["version"], row["alias"], *why[: ends + 1])


def _reasons(row: RowMapping) -> tuple[str, ...]:
    return _list(row["reasons"])


def _list(text: Any) -> tuple[str, ...]:
    try:
        return _texts(*json.loads(text))
    except (ValueError, TypeError):  # edited: it says nothing that the other side could confirm
        return ()


def _texts(*values: Any) -> _Row:
    return tuple(map(str, values))


def _nonce(row: RowMapping) -> _Row:
    about = (row["workspace"], row["model"], row["subject"])
    series = "" if row["series"] == series_of(*map(str, about[:2])) else "counted elsewhere"
    return _texts(row["nonce"], row["attempt"], *about, *filter(None, [series]))


def _settings(row: RowMapping) -> _Row:
    return _texts(row["version"], row["digest"])


def _override(row: RowMapping) -> _Row:
    about = (row["workspace"], row["model"], row["version"], row["alias"])
    document = str(row["document"]).encode("utf-8", "surrogateescape")
    same = "" if row["sha256"] == sha256(document) else "another document"
    why = (f"reason: {row['reason']}", *(f"signed by {o}" for o in _list(row["owners"])))
    return _texts(row["sha256"], *about, *why, f"until {row['ends']}", *filter(None, [same]))


_TABLES: dict[str, tuple[Select[Any], Callable[[RowMapping], _Row]]] = {
    "nonce": (select(tables.nonces), _nonce),
    "settings": (select(tables.settings), _settings),
    "override": (select(tables.overrides), _override),
}
"""Action of the entry -> the table's rows, and what both must say of each."""
