"""Figures for Prometheus, from the log and the registry: every worker gives the same answer.

No model is named: whoever scrapes is not asked who they are. What was counted of the log is kept,
since entries never change, and certificates are checked once for each state of the settings.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import datetime
from threading import Lock
from typing import Any

from sqlalchemy import func, select

from mlflow_kdguard import __version__
from mlflow_kdguard.plugin import log
from mlflow_kdguard.plugin.app import facts
from mlflow_kdguard.plugin.app.gated import GatedServer
from mlflow_kdguard.plugin.app.shown import shown
from mlflow_kdguard.plugin.log import tables
from mlflow_kdguard.plugin.server.settings import Settings
from mlflow_kdguard.records import parse_time

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MOST = 100_000
"""Guarded versions that one scrape looks at."""

Labels = tuple[tuple[str, str], ...]
Series = Mapping[Labels, float]


class Metrics:
    """The figures of one server."""

    def __init__(self, server: GatedServer) -> None:
        self._server = server
        self._lock = Lock()
        self._counted: tuple[str, int, Counter[Labels]] = ("", 0, Counter())
        self._ends: dict[tuple[str, str, facts.Key], float | None] = {}

    def text(self, now: datetime) -> str:
        """Everything, in Prometheus' text format."""
        settings = self._server.readable()
        running = {_labels(version=__version__): 1.0}
        with self._lock, self._server.session() as session:
            lines = [
                *_written("info", "gauge", "The running version.", running),
                *self._of_settings(settings),
                *self._of_log(session),
                *_written("nonces_total", "counter", "Attempts handed out.", _nonces(session)),
                *self._of_versions(session, settings, now),
            ]
        return "\n".join(lines) + "\n"

    def _of_settings(self, settings: Settings | None) -> Iterator[str]:
        readable: Series = {(): float(settings is not None)}
        yield from _written(
            "settings_readable", "gauge", "Whether the settings can be read (1) or not.", readable
        )
        if settings is not None:
            version: Series = {(): float(settings.version)}
            yield from _written("settings_version", "gauge", "Version of the settings.", version)
            enforcing: Series = {(): float(settings.enforcing)}
            told = "Whether refusals block (1) or are only logged."
            yield from _written("enforcing", "gauge", told, enforcing)

    def _of_log(self, session: Any) -> Iterator[str]:
        head = log.read_head(session)
        known, upto, counts = self._counted
        if head is None or head.log != known or head.seq < upto:
            known, upto, counts = "" if head is None else head.log, 0, Counter()
        if head is not None and head.seq > upto:
            rows = tables.log.c
            new = (
                select(rows.action, rows.decision, func.count())
                .where(rows.seq > upto, rows.seq <= head.seq)
                .group_by(rows.action, rows.decision)
            )
            for action, decision, count in session.execute(new):
                counts[_labels(action=action, decision=decision)] += count
            upto = head.seq
        self._counted = (known, upto, counts)
        yield from _written("log_head", "gauge", "Number of the log's last entry.", {(): upto})
        told = "Entries of the log, by action and decision."
        yield from _written("log_entries_total", "counter", told, counts)

    def _of_versions(self, session: Any, settings: Settings | None, now: datetime) -> Iterator[str]:
        states: Counter[Labels] = Counter()
        ends: list[float] = []
        kept: dict[tuple[str, str, facts.Key], float | None] = {}
        # A key's own validity may end: what was believed is looked at anew every hour.
        digest = f"{now:%Y%m%d%H}" + ("" if settings is None else settings.digest)
        for one in facts.guarded(session, settings, limit=_MOST):
            key = (digest, one.envelope or "", one.key)
            end = self._ends[key] if key in self._ends else _end(one, settings, now)
            kept[key] = end
            states[_labels(certificate=_state(end, now))] += 1
            ends += [end] if end is not None else []
        self._ends = kept
        told = "Versions with a guarded alias or stage, by their certificate."
        every = {_labels(certificate=state): 0.0 for state in ("valid", "expired", "none")}
        yield from _written("guarded_versions", "gauge", told, every | dict(states))
        if ends:
            told = "When the first certificate of a guarded version expires or has expired."
            first: Series = {(): min(ends)}
            yield from _written("certificate_expiry_timestamp_seconds", "gauge", told, first)


def _end(one: facts.Held, settings: Settings | None, now: datetime) -> float | None:
    """When a version's certificate ends; None where none is believed."""
    workspace, model, _ = one.key
    found = shown(one.envelope, settings, workspace, model, now).certificate
    return None if found is None else parse_time(found.expires).timestamp()


def _state(end: float | None, now: datetime) -> str:
    if end is None:
        return "none"
    return "valid" if now.timestamp() < end else "expired"


def _nonces(session: Any) -> Series:
    used = tables.nonces.c.used_by
    asked = select(func.count(), func.count(used)).select_from(tables.nonces)
    given, spent = session.execute(asked).one()
    return {_labels(state="issued"): given, _labels(state="used"): spent}


def _labels(**labels: str) -> Labels:
    return tuple(labels.items())


def _written(name: str, kind: str, told: str, series: Series) -> Iterator[str]:
    yield f"# HELP kdguard_{name} {told}"
    yield f"# TYPE kdguard_{name} {kind}"
    for labels, value in sorted(series.items()):
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
        yield (
            f"kdguard_{name}{{{inside}}} {value:.17g}" if inside else f"kdguard_{name} {value:.17g}"
        )


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
