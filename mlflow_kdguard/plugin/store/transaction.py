"""One transaction for a change and its entry in the log: both are committed, or neither.

MLflow's own methods run inside of it unchanged, because the store hands them the session that is
open already.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from mlflow_kdguard.errors import RegistryError
from mlflow_kdguard.plugin import log
from mlflow_kdguard.plugin.log import Entry, Event
from mlflow_kdguard.plugin.server.settings import Settings
from mlflow_kdguard.plugin.store.refusal import refusing

logger = logging.getLogger(__name__)

Maker = Callable[..., AbstractContextManager[Any]]


@dataclass(slots=True)
class Written:
    """An open transaction that holds the log's lock, and what it has written so far."""

    session: Any
    settings: Settings
    now: datetime
    last: Entry | None = None

    def append(self, event: Event) -> None:
        """Write one entry."""
        self.wrote(
            log.append(
                self.session,
                event,
                now=self.now,
                signer=self.settings.signer,
                verifiers=self.settings.verifiers,
            )
        )

    def accept_settings(self) -> None:
        """Remember the settings that are in force; ConfigError where newer ones were."""
        self.wrote(
            log.seen(
                self.session,
                self.settings.version,
                self.settings.digest,
                now=self.now,
                signer=self.settings.signer,
                verifiers=self.settings.verifiers,
            )
        )

    def wrote(self, entry: Entry | None) -> None:
        """Take note of an entry that was written otherwise."""
        self.last = entry or self.last


@dataclass(frozen=True, slots=True)
class Transactions:
    """A store's sessions; inside of `locked`, MLflow's methods share the one that is open."""

    plain: Maker
    _local: threading.local = field(default_factory=threading.local)

    @contextmanager
    def shared(self, read_only: bool = True) -> Iterator[Any]:
        """What the store's methods open: the session of the transaction around, else a new one."""
        around = getattr(self._local, "session", None)
        if around is not None:
            yield around
            return
        with self.plain(read_only=read_only) as session:
            yield session

    @contextmanager
    def locked(self, what: str) -> Iterator[Any]:
        """A transaction that begins with the log's lock: guarded changes happen one by one."""
        with self.plain(read_only=False) as session:
            self._local.session = session
            try:
                with refusing(what):
                    log.hold(session)
                    yield session
            finally:
                self._local.session = None

    @contextmanager
    def logged(self, what: str, settings: Settings, *, strict: bool = True) -> Iterator[Written]:
        """The same, to write entries in; the new head is published after the commit.

        `strict` demands settings that are in force and a file that takes heads; a refusal is
        logged all the same.
        """
        with self.locked(what) as session:
            written = Written(session, settings, datetime.now(UTC))
            if strict:
                written.accept_settings()
                log.require_publishable(settings.head)
            yield written
        if written.last is not None:
            try:
                log.publish(written.last.head, settings.head)
            except RegistryError:
                # The entry stands, and the next head that is published covers it.
                logger.exception("the log's head was not published")
