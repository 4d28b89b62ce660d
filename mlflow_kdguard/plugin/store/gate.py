"""The gate: what a store refuses, and how a passing version is promoted.

`GateMixin` stands before MLflow's SQLAlchemy store. Its methods decide whether a change touches
guarded names; everything else goes to MLflow's own method unchanged.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from mlflow.entities.model_registry.model_version_stages import get_canonical_stage

from mlflow_kdguard.artifacts import CERTIFICATE, DECISION, OVERRIDE, REASON
from mlflow_kdguard.attest.overrides import Granted
from mlflow_kdguard.errors import CertificateError, KDGuardError
from mlflow_kdguard.files import sha256
from mlflow_kdguard.plugin import log
from mlflow_kdguard.plugin.server.judge import Judgement, VersionFacts, judge
from mlflow_kdguard.plugin.server.reading import Reading
from mlflow_kdguard.plugin.server.settings import Settings
from mlflow_kdguard.plugin.store.asked import Asked
from mlflow_kdguard.plugin.store.granting import enter, kept, override, refuse_spelling
from mlflow_kdguard.plugin.store.refusal import Refused, refusing
from mlflow_kdguard.plugin.store.rows import Rows
from mlflow_kdguard.plugin.store.transaction import Transactions, Written

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Gate:
    """Judges and promotes, for one store."""

    def __init__(self, store: Any, settings: Settings, transactions: Transactions) -> None:
        self._store, self._settings, self.transactions = store, settings, transactions

    # ── settings ────────────────────────────────────────────────────────────────────────────────

    def known(self) -> Settings:
        """The settings as they are, or as they were when they could last be read."""
        try:
            return self.fresh("")
        except Refused:
            return self._settings

    def fresh(self, what: str) -> Settings:
        """The settings as they are now; a refusal where they cannot be read."""
        try:
            settings = self._settings.current()
        except KDGuardError as error:
            logger.error("the server's settings cannot be read: %s", error)  # noqa: TRY400
            raise Refused(what, [f"settings: {error}"]) from error
        self._settings = settings
        return settings

    # ── judgement ───────────────────────────────────────────────────────────────────────────────

    def facts(self, name: str, version: str, *, history: bool = False) -> tuple[VersionFacts, bool]:
        """What the database says about a version, and whether it is a prompt's.

        Raises what MLflow raises where there is no such version.
        """
        with self.transactions.plain(read_only=False) as session:
            row = self._store._get_sql_model_version(session, name, version)
            rows = Rows(session, str(row.workspace))
            return rows.facts(row, history=history), rows.is_prompt(name, int(row.version))

    def judged(self, facts: VersionFacts, alias: str, settings: Settings) -> Judgement:
        """The judgement on a version's bytes as they are now; it writes nothing."""

        def nonce_of(nonce: str) -> log.Nonce | None:
            with self.transactions.plain(read_only=False) as session:
                return log.nonces.find(session, nonce)

        return judge(
            facts,
            alias,
            settings,
            now=datetime.now(UTC),
            fetch=Reading(self._store, settings),
            nonce_of=nonce_of,
        )

    # ── promotion ───────────────────────────────────────────────────────────────────────────────

    def promote(self, name: str, version: str, alias: str, action: str, act: Callable[[], T]) -> T:
        """Carry out `act`, which gives a guarded alias or stage, where the version may have it.

        Raises Refused with every reason, once it is in the log.
        """
        history = self._settings.stated.rollback_days > 0
        facts, prompt = self.facts(name, version, history=history)
        if prompt:
            return act()
        asked = Asked(facts.name, facts.version, facts.workspace, alias, action)
        try:
            return self._passed(asked, facts, act)
        except Refused as refused:
            if self._settings.enforcing:
                self.note(asked, "refuse", refused.reasons)
                raise
            return self.noted(asked, "would-refuse", refused.reasons, act)

    def _passed(self, asked: Asked, facts: VersionFacts, act: Callable[[], T]) -> T:
        settings = self.fresh(str(asked))
        with refusing(str(asked)):
            refuse_spelling(asked, settings)
            judged = self.judged(facts, asked.alias, settings)
            granted = None if judged.passed else override(asked, facts, judged, settings)
            location = kept(judged, settings)
        with self.transactions.logged(str(asked), settings) as written:
            self._unchanged(written, facts, location)
            enter(written, asked, judged, granted)
            result = act()
            self._mark(written, facts, location, granted)
        return result

    def _unchanged(
        self, written: Written, facts: VersionFacts, location: str | None = None
    ) -> None:
        """What was judged is what is promoted: nothing about the version has changed since.

        Another promotion of the same bytes may have moved it to `location` meanwhile.
        """
        row = self._store._get_sql_model_version(written.session, facts.name, facts.version)
        now = Rows(written.session, facts.workspace).facts(row)
        moved = now.storage_location not in (facts.storage_location, location)
        if moved or _decisive(facts) != _decisive(now):
            raise CertificateError("the version was changed while it was judged. Ask again.")

    def _mark(
        self, written: Written, facts: VersionFacts, location: str | None, granted: Granted | None
    ) -> None:
        row = self._store._get_sql_model_version(written.session, facts.name, facts.version)
        if location is not None:
            row.storage_location = location
        why = "every rule holds" if granted is None else f"override {granted.sha256}"
        tags = {DECISION: "pass" if granted is None else "override", REASON: why}
        Rows(written.session, facts.workspace).set_tags(facts.name, int(facts.version), tags)

    # ── a certificate under a guarded name ──────────────────────────────────────────────────────

    def certify(self, name: str, version: str, text: str, act: Callable[[], T]) -> T:
        """Carry out `act`, which stores a certificate; where the version holds a guarded name, the
        certificate must pass."""
        facts, _ = self.facts(name, version)
        held = self._held(facts)
        asked = Asked(facts.name, facts.version, facts.workspace, held or "", "certificate-refused")
        if held is not None:
            renewed = replace(facts, tags={**facts.tags, CERTIFICATE: text})
            judged = self.judged(renewed, held, self.fresh(str(asked)))
            if not judged.passed:
                return self.refuse_or_note(asked, judged.reasons, act)
        with self.transactions.logged(str(asked), self._settings, strict=False) as written:
            if self._held(facts, written) != held:
                raise CertificateError("the version was promoted meanwhile. Ask again.")
            if held is not None:
                self._unchanged(written, facts)
                written.append(
                    asked.event(
                        "certificate",
                        "pass",
                        certificate=sha256(text.encode("utf-8", "surrogatepass")),
                    )
                )
            return act()

    def _held(self, facts: VersionFacts, written: Written | None = None) -> str | None:
        """A guarded name that this version holds."""
        policy = self._settings.policy_for(facts.name)
        if written is None:
            with self.transactions.plain(read_only=False) as session:
                found = list(Rows(session, facts.workspace).held(facts.name, policy))
        else:
            found = list(Rows(written.session, facts.workspace).held(facts.name, policy))
        names = [h.name for h in found if h.version == facts.version and not h.prompt]
        return names[0] if names else None

    # ── refusals ────────────────────────────────────────────────────────────────────────────────

    def note(self, asked: Asked, action: str, reasons: tuple[str, ...]) -> None:
        """Write a refusal to the log, and on the version."""
        with self.transactions.logged(str(asked), self._settings, strict=False) as written:
            policy = self._settings.policy_for(asked.name).digest
            written.append(asked.event(action, "refuse", reasons=reasons, policy=policy))
            if action == "refuse":
                tags = {DECISION: "refuse", REASON: "; ".join(reasons)[:5000]}
                rows = Rows(written.session, asked.workspace)
                rows.set_tags(asked.name, int(asked.version), tags)

    def refuse_or_note(self, asked: Asked, reasons: tuple[str, ...], act: Callable[[], T]) -> T:
        """Refuse what somebody asked for, and log it; in audit mode log it, and carry it out."""
        if not self._settings.enforcing:
            return self.noted(asked, f"would-{asked.action}", reasons, act)
        self.note(asked, asked.action, reasons)
        raise Refused(str(asked), reasons)

    def noted(self, asked: Asked, action: str, reasons: tuple[str, ...], act: Callable[[], T]) -> T:
        """Carry out `act` together with an entry; in audit mode without one, where there is no
        log to write."""
        try:
            with self.transactions.logged(str(asked), self._settings, strict=False) as written:
                policy = self._settings.policy_for(asked.name).digest
                written.append(asked.event(action, "allowed", reasons=reasons, policy=policy))
                return act()
        except Refused:
            if self._settings.enforcing:
                raise
            logger.exception("%s is not in the log", asked)
            return act()


def _decisive(facts: VersionFacts) -> tuple[Any, ...]:
    """What a judgement rests on, besides the bytes; who writes other tags stops no promotion."""
    return facts.source, facts.tags.get(CERTIFICATE), facts.tags.get(OVERRIDE)


def canonical(stage: str) -> str:
    """The stage that MLflow takes this spelling for; MLflow's own error where it is none."""
    return str(get_canonical_stage(stage))  # type: ignore[no-untyped-call]
