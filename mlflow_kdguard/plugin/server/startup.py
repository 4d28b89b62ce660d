"""Would a gated server start here: what its store asks for at its start, asked beforehand.

Nothing is changed: settings that the database has not seen yet are compared, not accepted.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_kdguard.errors import KDGuardError
from mlflow_kdguard.plugin.server.places import Place
from mlflow_kdguard.plugin.server.settings import Settings
from mlflow_kdguard.records import parse_time

if TYPE_CHECKING:
    from sqlalchemy import Connection

SOON = timedelta(days=30)
"""How long before its end a key is called ending."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One question and its answer; `warning` is what works now, and asks for attention."""

    what: str
    ok: bool
    why: str
    warning: bool = False


def examine(path: Path, database: str | None, *, now: datetime) -> tuple[Finding, ...]:
    """Everything that a start needs, in order; whatever cannot be answered is not ok.

    `path` is the settings file, `database` the registry's URI (None leaves it out, with a warning).
    Never raises for what it examines.
    """
    found: list[Finding] = []
    settings = _settings(path, found)
    if settings is None:
        return tuple(found)
    found += _keys(settings, now)
    found.append(_log_key(settings, now))
    found += _content(settings)
    found.append(_heads(settings))
    if database is None:
        found.append(Finding("database", True, "not named (--database): not asked", warning=True))
    else:
        found += _answered("database", lambda: list(_database(settings, database)))
    return tuple(found)


def _settings(path: Path, found: list[Finding]) -> Settings | None:
    try:
        settings = Settings.load(path)
    except KDGuardError as error:
        found.append(Finding("settings", False, str(error)))
        return None
    audit = not settings.enforcing
    mode = ", mode audit: refusals are logged, and nothing is blocked" if audit else ", enforcing"
    found.append(Finding("settings", True, f"version {settings.version}{mode}", warning=audit))
    guarded = settings.policy.guarded
    names = ", ".join([*guarded.aliases, *(f"stage {stage}" for stage in guarded.stages)])
    text = f"{settings.policy.digest[:16]}… guards {names or 'nothing'}"
    found.append(Finding("policy", bool(names), text))
    return settings


def _keys(settings: Settings, now: datetime) -> Iterator[Finding]:
    usable = [v for v in settings.verifiers if v.objection(issued=now, now=now) is None]
    verifiers = [v for v in usable if v.record.role == "verifier"]
    text = f"{len(settings.verifiers)} trusted, {len(usable)} usable, {len(verifiers)} a verifier's"
    yield Finding("keys", bool(verifiers), text)
    owners = {v.record.owner for v in usable}
    if settings.stated.overrides:
        enough = len(owners) >= 2
        yield Finding("overrides", True, f"{len(owners)} owners could sign one", not enough)
    for verifier in usable:
        end = verifier.record.valid_until
        if end is not None and parse_time(end) < now + SOON:
            yield Finding("keys", True, f"the key of {verifier.record.owner} ends at {end}", True)


def _log_key(settings: Settings, now: datetime) -> Finding:
    verifier = settings.signer.verifier
    if verifier.key_id in {trusted.key_id for trusted in settings.verifiers}:
        why = "is among the trusted keys: whoever has the server could sign for an owner"
        return Finding("log key", True, f"{verifier.key_id[:16]}… {why}", warning=True)
    objection = verifier.objection(issued=now, now=now)
    return Finding("log key", objection is None, objection or f"{verifier.key_id[:16]}…")


def _content(settings: Settings) -> Iterator[Finding]:
    stated = settings.stated
    yield Finding("roots", True, ", ".join(stated.allow))
    root = Place.of(stated.content.root)
    text = f"{stated.content.root}, read under {stated.content.served}"
    if root.scheme == "file":
        why = _unwritable(root.path, folder=True)
        yield Finding("content root", why is None, why or text)
    else:
        yield Finding("content root", True, f"{text}; whether it can be written is not asked", True)


def _heads(settings: Settings) -> Finding:
    why = _unwritable(settings.head, folder=False)
    return Finding("published heads", why is None, why or str(settings.head))


def _unwritable(path: Path, *, folder: bool) -> str | None:
    """Why `path` cannot be written; a folder may still be made where its parent is writable."""
    if path.exists() and path.is_dir() is not folder:
        return f"{path} is {'no' if folder else 'a'} folder"
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if not os.access(place, os.W_OK):
        return f"{path} cannot be written"
    return None if folder or place in (path, path.parent) else f"{path.parent} does not exist"


def _database(settings: Settings, uri: str) -> Iterator[Finding]:
    from mlflow_kdguard.plugin.log import database

    with database.opened(uri) as engine, engine.connect() as connection:
        yield Finding("database", True, engine.url.render_as_string())
        yield from _answered("settings' version", lambda: [_in_force(settings, connection)])
        yield from _answered("log", lambda: [_end(settings, connection)])


def _in_force(settings: Settings, connection: "Connection") -> Finding:
    from mlflow_kdguard.plugin.log import versions

    same = versions.in_force(connection, settings.version, settings.digest)
    text = "is in force" if same else "is new, and will be remembered"
    return Finding("settings' version", True, f"{settings.version} {text}")


def _end(settings: Settings, connection: "Connection") -> Finding:
    """The log's end only; the whole of it is `kdguard server log verify`'s question."""
    from mlflow_kdguard.plugin.log import require_end

    head = require_end(
        connection,
        verifiers=(settings.signer.verifier, *settings.verifiers),
        heads=settings.head,
    )
    return Finding("log", True, f"{head.seq} entries")


def _answered(what: str, ask: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return ask()
    except KDGuardError as error:
        return [Finding(what, False, str(error))]
