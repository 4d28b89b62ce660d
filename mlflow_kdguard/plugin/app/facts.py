"""What the registry and the log hold about guarded versions, read for people and for scrapers.

Everything comes from the database, so that every worker answers the same. Pages go on behind the
last row that was seen: no page costs more than the first, however long the list.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

from mlflow.entities.model_registry.model_version_stages import STAGE_DELETED_INTERNAL, STAGE_NONE
from mlflow.prompt.constants import _PROMPT_SOURCE_PLACEHOLDERS, IS_PROMPT_TAG_KEY
from mlflow.store.model_registry.dbmodels.models import (
    SqlModelVersion,
    SqlModelVersionTag,
    SqlRegisteredModelAlias,
    SqlRegisteredModelTag,
)
from sqlalchemy import and_, func, or_, select

from mlflow_kdguard.artifacts import CERTIFICATE, DECISION, REASON
from mlflow_kdguard.plugin.log import tables
from mlflow_kdguard.plugin.server.settings import Settings

_CHUNK = 200
_VERSION: Any = SqlModelVersion
_ALIAS: Any = SqlRegisteredModelAlias
_TAG: Any = SqlModelVersionTag
_MODEL_TAG: Any = SqlRegisteredModelTag
_NO_SOURCE = tuple(_PROMPT_SOURCE_PLACEHOLDERS)

Key = tuple[str, str, int]
"""Workspace, model name and version."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A version with one alias or stage, guarded or not."""

    key: Key
    stage: str
    alias: str
    source: str
    storage: str


@dataclass(frozen=True, slots=True)
class Held:
    """A guarded version: its guarded aliases and stages, and what its tags say."""

    key: Key
    marks: tuple[str, ...]
    envelope: str | None
    decision: str
    reason: str


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One row of the log, as it is shown."""

    seq: int
    time: str
    actor: str
    action: str
    workspace: str
    model: str
    version: str
    alias: str
    certificate: str
    policy: str
    decision: str
    reasons: tuple[str, ...]
    digest: str


def candidates(session: Any, after: Key | None = None) -> Iterator[Candidate]:
    """Every version that carries an alias or a stage, by workspace, name and version.

    A prompt's versions, which have no artifacts, are none.
    """
    prompts = _prompts(session)
    for found in _carriers(session, after):
        placed = (found.source, found.storage)
        if found.key[:2] not in prompts or any(uri not in ("", *_NO_SOURCE) for uri in placed):
            yield found


def _prompts(session: Any) -> frozenset[tuple[str, str]]:
    marked = select(_MODEL_TAG.workspace, _MODEL_TAG.name).where(
        _MODEL_TAG.key == IS_PROMPT_TAG_KEY, func.lower(_MODEL_TAG.value) == "true"
    )
    return frozenset((workspace, name) for workspace, name in session.execute(marked))


def _carriers(session: Any, after: Key | None) -> Iterator[Candidate]:
    stage = func.coalesce(_VERSION.current_stage, STAGE_NONE)
    same = (_ALIAS.workspace == _VERSION.workspace) & (_ALIAS.name == _VERSION.name)
    asked = (
        select(
            _VERSION.workspace, _VERSION.name, _VERSION.version, stage, _ALIAS.alias,
            _VERSION.source, _VERSION.storage_location,
        )
        .outerjoin(_ALIAS, same & (_ALIAS.version == _VERSION.version))
        .where(
            stage != STAGE_DELETED_INTERNAL,
            or_(_ALIAS.alias.is_not(None), stage != STAGE_NONE),
        )
        .order_by(_VERSION.workspace, _VERSION.name, _VERSION.version)
    )  # fmt: skip
    while True:
        page = asked if after is None else asked.where(_behind(after))
        rows = session.execute(page.limit(_CHUNK)).all()
        found = [_candidate(row) for row in rows]
        if len(rows) < _CHUNK:
            yield from found
            return
        # The last version may go on in the next chunk: leave it to that one.
        whole = [c for c in found if c.key != found[-1].key]
        if not whole:
            rows = session.execute(page).all()
            whole = [c for c in map(_candidate, rows) if c.key == found[-1].key]
        yield from whole
        after = whole[-1].key


def _behind(key: Key) -> Any:
    workspace, name, version = key
    return or_(
        _VERSION.workspace > workspace,
        and_(_VERSION.workspace == workspace, _VERSION.name > name),
        and_(
            _VERSION.workspace == workspace, _VERSION.name == name, _VERSION.version > version
        ),
    )  # fmt: skip


def _candidate(row: Any) -> Candidate:
    workspace, name, version, stage, alias, source, storage = row
    return Candidate(
        (workspace, name, int(version)), stage, alias or "", source or "", storage or ""
    )


def marks_of(settings: Settings | None, found: Candidate) -> tuple[str, ...]:
    """The guarded alias and stage of a candidate; all of them where the settings are unreadable."""
    policy = None if settings is None else settings.policy_for(found.key[1])
    alias = found.alias and (policy is None or policy.guards_alias(found.alias))
    staged = found.stage != STAGE_NONE and (policy is None or policy.guards_stage(found.stage))
    return (*((f"@{found.alias}",) if alias else ()), *((found.stage,) if staged else ()))


def guarded(
    session: Any, settings: Settings | None, *, after: Key | None = None, limit: int
) -> list[Held]:
    """At most `limit` guarded versions behind `after`, in order."""
    return list(islice(_guarded(session, settings, after), limit))


def _guarded(session: Any, settings: Settings | None, after: Key | None) -> Iterator[Held]:
    def marked() -> Iterator[tuple[Key, tuple[str, ...]]]:
        for key, rows in groupby(candidates(session, after), key=lambda c: c.key):
            marks = dict.fromkeys(mark for row in rows for mark in marks_of(settings, row))
            if marks:
                yield key, tuple(marks)

    walk = marked()
    while batch := dict(islice(walk, 50)):
        tags = _tags(session, list(batch))
        for key, marks in batch.items():
            own = tags.get(key, {})
            yield Held(key, marks, own.get(CERTIFICATE), own.get(DECISION, ""), own.get(REASON, ""))


def held(session: Any, settings: Settings | None, key: Key) -> Held | None:
    """One version, guarded or not; None where there is none."""
    workspace, name, version = key
    stage = func.coalesce(_VERSION.current_stage, STAGE_NONE)
    there = select(stage, _VERSION.source, _VERSION.storage_location).where(
        _VERSION.workspace == workspace, _VERSION.name == name, _VERSION.version == version,
        stage != STAGE_DELETED_INTERNAL,
    )  # fmt: skip
    row = session.execute(there).one_or_none()
    if row is None:
        return None
    named = select(_ALIAS.alias).where(
        _ALIAS.workspace == workspace, _ALIAS.name == name, _ALIAS.version == version
    )
    aliases = session.execute(named).scalars().all() or [""]
    found = (Candidate(key, row[0], alias, row[1] or "", row[2] or "") for alias in aliases)
    marks = dict.fromkeys(mark for c in found for mark in marks_of(settings, c))
    own = _tags(session, [key]).get(key, {})
    return Held(key, tuple(marks), own.get(CERTIFICATE), own.get(DECISION, ""), own.get(REASON, ""))


def _tags(session: Any, keys: list[Key]) -> dict[Key, dict[str, str]]:
    asked = select(_TAG.workspace, _TAG.name, _TAG.version, _TAG.key, _TAG.value).where(
        _TAG.key.in_((CERTIFICATE, DECISION, REASON)),
        _TAG.name.in_({name for _, name, _ in keys}),
        _TAG.version.in_({version for _, _, version in keys}),
    )
    found: dict[Key, dict[str, str]] = {}
    for workspace, name, version, tag, value in session.execute(asked):
        found.setdefault((workspace, name, int(version)), {})[tag] = value or ""
    return found


REFUSALS = "refusals"
"""The filter of log() for everything that was refused."""


def log(
    session: Any,
    *,
    before: int | None = None,
    limit: int,
    model: str | None = None,
    action: str | None = None,
) -> list[LogEntry]:
    """At most `limit` entries before the one numbered `before`, the newest first."""
    rows = tables.log.c
    asked = select(tables.log).order_by(rows.seq.desc()).limit(limit)
    if before is not None:
        asked = asked.where(rows.seq < before)
    if model:
        asked = asked.where(rows.model == model)
    if action == REFUSALS:
        asked = asked.where(or_(rows.action.like("%refuse%"), rows.decision.like("%refuse%")))
    elif action:
        asked = asked.where(rows.action == action)
    return [_entry(row) for row in session.execute(asked).mappings()]


def _entry(row: Any) -> LogEntry:
    try:
        reasons = tuple(str(reason) for reason in json.loads(row["reasons"] or "[]"))
    except (ValueError, TypeError):
        reasons = (str(row["reasons"]),)  # somebody edited it: show what stands there
    told = {name: str(row[name]) for name in LogEntry.__slots__ if name not in ("seq", "reasons")}
    return LogEntry(seq=int(row["seq"]), reasons=reasons, **told)
