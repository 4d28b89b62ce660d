"""Guarded names that do not stand for what the log says: somebody went past the gate.

A promotion may happen while a sweep runs. So what looks moved is asked for again, name first and
log second, until both agree or neither has changed.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

from mlflow_kdguard.promoted.history import History, Key, Logged
from mlflow_kdguard.promoted.report import Finding, Holding

STAGES = ("Staging", "Production", "Archived")
_TRIES = 3
_NOT_LOGGED = "The log has no entry by which it was given, or says that it was taken since."
_TABLE = "Find out who wrote to the database; set the name again through the server, or remove it."

Look = Callable[[Key], str | None]
"""The version that an alias stands for now; None where there is none."""


def moved(
    holdings: Sequence[Holding],
    places: Collection[str],
    read: Callable[[], History],
    look: Look,
) -> tuple[History, list[Finding]]:
    """The log's history, and every name that it does not explain.

    `places` are the workspaces that were looked at, `read` reads the log anew, `look` an alias. A
    name that keeps changing is a finding, too.
    """
    held = {_key(holding): holding.version for holding in holdings if holding.kind == "alias"}
    history = read()
    odd = {key: why for key, why in _odd(held, history).items() if key[0] in places}
    for _ in range(_TRIES):
        now = {key: look(key) for key in odd}
        if all(version == held.get(key) for key, version in now.items()):
            break
        for key, version in now.items():
            held.pop(key, None)
            if version is not None:
                held[key] = version
        history = read()
        odd = {key: why for key, why in _odd(held, history).items() if key in now}
    aliases = [_finding(key, held.get(key, ""), why) for key, why in sorted(odd.items())]
    staged = [h for h in holdings if h.kind == "stage"]
    unknown = [h for h in staged if history.given(_key(h), h.version) is None]
    return history, aliases + [_finding(_key(h), h.version, _NOT_LOGGED) for h in unknown]


def _odd(held: dict[Key, str], history: History) -> dict[Key, str]:
    """The aliases that log and registry disagree about, each with the reason."""
    return dict([*_unexplained(held, history), *_gone(held, history)])


def _unexplained(held: dict[Key, str], history: History) -> Iterator[tuple[Key, str]]:
    for key, version in held.items():
        last = history.given(key)
        if last is None:
            yield key, _NOT_LOGGED
        elif last.version != version:
            yield key, f"The log says that it stands for {_said(last)}."


def _gone(held: dict[Key, str], history: History) -> Iterator[tuple[Key, str]]:
    for entry in history.aliases_given():
        if entry.key not in held and entry.alias not in STAGES:
            yield entry.key, f"It is gone, and the log says that it stands for {_said(entry)}."


def _said(entry: Logged) -> str:
    return f"version {entry.version} since {entry.time} (entry {entry.seq}, {entry.actor})"


def _key(holding: Holding) -> Key:
    return (holding.workspace, holding.model, holding.name)


def _finding(key: Key, version: str, why: str) -> Finding:
    workspace, model, name = key
    return Finding(
        kind="moved", workspace=workspace, model=model, name=name, version=version, why=why,
        remedy=_TABLE,
    )  # fmt: skip
