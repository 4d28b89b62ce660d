"""sweep(): every guarded name of a registry, and everything that is wrong with one.

Prevention ends where somebody writes to the database or to the bucket directly. What they did
shows here: the bytes are fetched and hashed again, certificates are checked against today's keys
and revocations, and the alias table is held against the log (`docs/threat-model.md`, 16).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from mlflow_kdguard.bundle import MODEL
from mlflow_kdguard.errors import KDGuardError, RegistryError
from mlflow_kdguard.files import sha256
from mlflow_kdguard.gate import decide
from mlflow_kdguard.policy import Policy, guarded_name
from mlflow_kdguard.promoted import evidence
from mlflow_kdguard.promoted.evidence import Evidence
from mlflow_kdguard.promoted.history import History, Key
from mlflow_kdguard.promoted.moved import moved
from mlflow_kdguard.promoted.report import Finding, Holding, Kind, LogState, SweepReport
from mlflow_kdguard.promoted.trust import Trust, identities
from mlflow_kdguard.records import Progress, format_time, parse_time, silent
from mlflow_kdguard.registry import listing
from mlflow_kdguard.registry.bundle import Bundle
from mlflow_kdguard.registry.client import Connection
from mlflow_kdguard.registry.listing import Listed
from mlflow_kdguard.registry.versions import Versions

_LOG = "Run `kdguard server log verify`; docs/how-to/operate-the-log.md says what to do."
_SPELL = "Take that alias away: a reader would take it for the guarded one."


@dataclass(frozen=True, slots=True)
class Watch:
    """What a sweep goes by.

    `policy_for` says per model what is guarded; with `judged`, the certificate must also satisfy
    it. `registries` are the identities that a certificate may name.
    """

    trust: Trust
    registries: Sequence[str]
    policy_for: Callable[[str], Policy]
    judged: bool = False
    within: timedelta = timedelta(days=14)


def sweep(
    connection: Connection,
    watch: Watch,
    *,
    now: datetime,
    log: LogState | None = None,
    history: Callable[[], History] | None = None,
    progress: Progress = silent,
) -> SweepReport:
    """Look at every guarded alias and stage of every registered model; nothing is changed.

    `log` is how the log fared, and `history` reads what it tells; without it nothing is said about
    names that were moved past the gate. Raises RegistryError where MLflow does not answer; what is
    wrong with one version is a finding.
    """
    found = _Found(watch, now, Versions(connection))
    places = listing.workspaces(connection)
    for workspace in places:
        with listing.inside(workspace):
            models = list(listing.models(connection))
            found.models += sum(not model.prompt for model in models)
            for done, model in enumerate(models, 1):
                found.look(workspace, model)
                progress(f"sweep {workspace}", done, len(models), {"found": len(found.findings)})
    told = None if history is None else found.explained(history, places)
    for problem in () if log is None else log.problems:
        found.findings.append(Finding(kind="log", why=problem, remedy=_LOG))
    return SweepReport(
        registry=connection.identity,
        taken=format_time(now),
        within_days=watch.within / timedelta(days=1),
        workspaces=places,
        models=found.models,
        holdings=tuple(_beside(holding, told) for holding in found.holdings),
        findings=tuple(found.findings),
        log=log,
        would_refuse=() if told is None else tuple(told.would_refuse),
        clean=not found.findings,
    )


@dataclass(slots=True)
class _Found:
    watch: Watch
    now: datetime
    versions: Versions
    models: int = 0
    holdings: list[Holding] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def look(self, workspace: str, model: Listed) -> None:
        """All guarded names of one model; each version is fetched once."""
        policy = self.watch.policy_for(model.name)
        held = list(_held(workspace, model, policy))
        for version in dict.fromkeys(holding.version for holding in held):
            named = [holding for holding in held if holding.version == version]
            self._version(named, policy, model.prompt)
        if held:
            self.findings += _look_alikes(workspace, model, policy)

    def explained(self, read: Callable[[], History], places: Sequence[str]) -> History:
        """Hold the names against the log; what it does not explain is a finding."""
        client = self.versions.connection

        def look(key: Key) -> str | None:
            workspace, model, alias = key
            with listing.inside(workspace):
                return listing.alias(client, model, alias)

        history, findings = moved(self.holdings, places, read, look)
        self.findings += findings
        return history

    def _version(self, named: list[Holding], policy: Policy, prompt: bool) -> None:
        first = named[0]
        try:
            if prompt:
                self._hidden(named)
                return
            stored = self.versions.download(_uri(first))
        except KDGuardError as error:
            kind: Kind = "missing" if _is_missing(error) else "unreadable"
            self._add(named, kind, error.message, error.remedy)
            self.holdings += named
            return
        seen = evidence.examine(
            stored,
            self.watch.trust,
            now=self.now,
            registries=identities(self.watch.registries, first.workspace),
            within=self.watch.within,
        )
        for fault in seen.faults:
            self._add(named, fault.kind, fault.why, fault.remedy)
        if self.watch.judged:
            for why in _refusals(seen, policy, self.now):
                self._add(named, "policy", why, "Measure again under today's policy, or demote it.")
        self.holdings += [self._told(holding, stored, seen) for holding in named]

    def _hidden(self, named: list[Holding]) -> None:
        """A model that is marked as a prompt, and so left out of MLflow's pages and answers."""
        first = named[0]
        if not listing.is_text(self.versions.connection, first.model, first.version):
            why = "It is marked as a prompt, which hides it, and its version holds artifacts."
            self._add(named, "hidden", why, "Take the tag away, and sweep again.")
            self.holdings += named

    def _told(self, holding: Holding, stored: Bundle, seen: Evidence) -> Holding:
        model = stored.files.get(MODEL)
        known: dict[str, object] = {
            "certificate": seen.envelope_sha256,
            "model_sha256": None if model is None else sha256(model),
        }
        if seen.checked is not None:
            known["expires"] = seen.checked.certificate.expires
            known["signers"] = tuple(f"{s.owner} ({s.role})" for s in seen.checked.signers)
        return holding.model_copy(update=known)

    def _add(self, named: list[Holding], kind: Kind, why: str, remedy: str) -> None:
        for holding in named:
            key = (holding.workspace, holding.model, holding.name)
            self.findings.append(_about(key, kind, why, remedy, holding.version))


def _held(workspace: str, model: Listed, policy: Policy) -> Iterator[Holding]:
    for alias, version in model.aliases.items():
        if policy.guards_alias(alias):
            yield Holding(
                workspace=workspace, model=model.name, kind="alias", name=alias, version=version
            )
    for stage, version in model.stages.items():
        if policy.guards_stage(stage):
            yield Holding(
                workspace=workspace, model=model.name, kind="stage", name=stage, version=version
            )


def _beside(holding: Holding, told: History | None) -> Holding:
    """The holding with the log's entry by which the version came to it, where there is one."""
    key = (holding.workspace, holding.model, holding.name)
    version = holding.version if holding.kind == "stage" else None
    given = None if told is None else told.given(key, version)
    if given is None or given.version != holding.version:
        return holding
    return holding.model_copy(update={"given": given})


def _look_alikes(workspace: str, model: Listed, policy: Policy) -> Iterator[Finding]:
    for alias, version in model.aliases.items():
        key = (workspace, model.name, alias)
        if policy.guards_alias(alias) and alias not in policy.guarded.aliases:
            why = f"It is another spelling of the guarded alias {guarded_name(alias)!r}."
            yield _about(key, "look-alike", why, _SPELL, version)
        elif not alias.isascii():
            why = "It is not plain ASCII, on a model that holds a guarded name."
            yield _about(key, "look-alike", why, _SPELL, version)


def _refusals(seen: Evidence, policy: Policy, now: datetime) -> list[str]:
    """Why today's policy would refuse the certificate; its age is a finding of its own."""
    if seen.checked is None:
        return []
    certificate = seen.checked.certificate
    nonces = {figure.nonce for figure in certificate.figures.faithful}
    last = parse_time(certificate.expires) - timedelta(seconds=1)
    decision = decide(
        certificate,
        policy,
        signers=seen.checked.signers,
        now=min(now, last),
        nonce=next(iter(nonces)) if len(nonces) == 1 else "",
    )
    return [f"{rule.rule}: {rule.why}" for rule in decision.rules if not rule.ok]


def _about(
    key: tuple[str, str, str], kind: Kind, why: str, remedy: str, version: str = ""
) -> Finding:
    workspace, model, name = key
    return Finding(
        kind=kind, workspace=workspace, model=model, name=name, version=version, why=why,
        remedy=remedy,
    )  # fmt: skip


def _uri(holding: Holding) -> str:
    return f"models:/{holding.model}/{holding.version}"


def _is_missing(error: KDGuardError) -> bool:
    cause = getattr(error.__cause__, "error_code", None)
    return isinstance(error, RegistryError) and cause == "RESOURCE_DOES_NOT_EXIST"
