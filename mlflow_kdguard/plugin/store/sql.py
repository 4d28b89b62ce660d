"""The gated store in a database, with and without workspaces."""

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from mlflow.environment_variables import MLFLOW_ENABLE_WORKSPACES
from mlflow.exceptions import MlflowException
from mlflow.server.constants import READ_REPLICA_BACKEND_STORE_URI_ENV_VAR
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore
from mlflow.store.model_registry.sqlalchemy_workspace_store import WorkspaceAwareSqlAlchemyStore

from mlflow_kdguard.artifacts import CERTIFICATE
from mlflow_kdguard.errors import KDGuardError
from mlflow_kdguard.plugin import log
from mlflow_kdguard.plugin.server import content
from mlflow_kdguard.plugin.server.settings import Settings, named
from mlflow_kdguard.plugin.store import tags as tag_rules
from mlflow_kdguard.plugin.store.asked import Asked
from mlflow_kdguard.plugin.store.gate import Gate, canonical
from mlflow_kdguard.plugin.store.refusal import Refused
from mlflow_kdguard.plugin.store.rows import Held, Rows
from mlflow_kdguard.plugin.store.transaction import Transactions

T = TypeVar("T")

if TYPE_CHECKING:
    _Store = Any
else:
    _Store = object


def opened(db_uri: str, _tracking_uri: str | None = None) -> "GatedStore | GatedWorkspaceStore":
    """A gated store on this database, as MLflow would open a plain one.

    Raises MlflowException where KDGUARD_SERVER does not name settings that hold.
    """
    store = GatedWorkspaceStore if MLFLOW_ENABLE_WORKSPACES.get() else GatedStore  # type: ignore[no-untyped-call]
    replica = os.environ.get(READ_REPLICA_BACKEND_STORE_URI_ENV_VAR)
    try:
        return store(db_uri, read_db_uri=replica)
    except KDGuardError as error:
        raise MlflowException(f"the gated registry does not start: {error}") from error


class GateMixin(_Store):  # type: ignore[misc]
    """Before MLflow's SQLAlchemy store: what touches guarded names is judged first."""

    ManagedSessionMaker: Callable[..., AbstractContextManager[Any]]

    def __init__(self, db_uri: str, read_db_uri: str | None = None) -> None:
        settings = Settings.load(named())
        super().__init__(db_uri, read_db_uri=read_db_uri)
        transactions = Transactions(self.ManagedSessionMaker, threading.local())
        self.ManagedSessionMaker = transactions.shared
        log.prepare(self.engine)
        # Not behind what was published: see resume(). Under the lock, since head and last entry
        # are read one after the other, and other workers may be writing.
        with transactions.locked("to start") as session:
            log.require_end(
                session,
                verifiers=(settings.signer.verifier, *settings.verifiers),
                heads=settings.head,
            )
        content.prepare(settings.stated.content)
        with transactions.logged("to start", settings):
            pass
        self.gate = Gate(self, settings, transactions)

    # ── aliases and stages ──────────────────────────────────────────────────────────────────────

    def set_registered_model_alias(self, name: Any, alias: Any, version: Any) -> Any:
        """Guarded: the version is judged, and its bytes are copied to the content root."""
        act = partial(super().set_registered_model_alias, name, alias, version)
        if not _texts(name, alias):
            return act()
        if self.gate.known().policy_for(name).guards_alias(alias):
            return self.gate.promote(name, version, alias, "promote", act)
        if not alias.isascii():
            why = "alias: a model that holds a guarded alias takes plain ASCII aliases only."
            return self._unless_held(name, f"alias {alias!r}", "alias-refused", act, why=why)
        return act()

    def delete_registered_model_alias(self, name: Any, alias: Any) -> Any:
        """Guarded: logged."""
        act = partial(super().delete_registered_model_alias, name, alias)
        if not _texts(name, alias) or not self.gate.known().policy_for(name).guards_alias(alias):
            return act()
        workspace = self._get_active_workspace()
        asked = Asked(name, "", workspace, alias, "demote")
        settings = self.gate.fresh(str(asked))
        with self.gate.transactions.logged(str(asked), settings) as written:
            rows = Rows(written.session, workspace)
            carried = rows.carries(name, alias)
            if carried is not None and not rows.is_prompt(name, int(carried)):
                asked = Asked(name, carried, workspace, alias, "demote")
                written.append(asked.event("demote", "allowed"))
            return act()

    def transition_model_version_stage(
        self, name: Any, version: Any, stage: Any, archive_existing_versions: Any
    ) -> Any:
        """Guarded stages as guarded aliases; leaving one is logged."""
        act = partial(
            super().transition_model_version_stage,
            name,
            version,
            stage,
            archive_existing_versions,
        )
        if not _texts(name, stage):
            return act()
        policy = self.gate.known().policy_for(name)
        if policy.guards_stage(stage):
            return self.gate.promote(name, version, canonical(stage), "stage", act)
        workspace = self._get_active_workspace()
        with self.gate.transactions.locked(f"stage {stage!r} for {name!r}") as session:
            held = Rows(session, workspace).held(name, policy)
            left = [item for item in held if item.staged and _concerns(item, version)]
            if not left:
                return act()
        asked = Asked(name, left[0].version, workspace, left[0].name, "demote")
        with self.gate.transactions.logged(str(asked), self.gate.fresh(str(asked))) as written:
            written.append(asked.event("demote", "allowed", reasons=(f"to {stage}",)))
            return act()

    # ── what would take the ground from under a guarded name ────────────────────────────────────

    def rename_registered_model(self, name: Any, new_name: Any) -> Any:
        """Refused while a guarded name is held: certificates speak of the old one."""
        act = partial(super().rename_registered_model, name, new_name)
        return self._unless_held(name, f"to rename to {new_name!r}", "rename-refused", act)

    def delete_registered_model(self, name: Any) -> Any:
        """Refused while a guarded name is held."""
        act = partial(super().delete_registered_model, name)
        return self._unless_held(name, "to delete", "delete-refused", act)

    def delete_model_version(self, name: Any, version: Any) -> Any:
        """Refused while this version holds a guarded name."""
        act = partial(super().delete_model_version, name, version)
        return self._unless_held(name, "to delete", "delete-refused", act, version=version)

    # ── tags ────────────────────────────────────────────────────────────────────────────────────

    def create_registered_model(self, name: Any, tags: Any = None, *rest: Any, **more: Any) -> Any:
        """Tags `kdguard.*` are not a model's."""
        for tag in tags or ():
            if tag_rules.ours(tag.key):
                raise Refused(f"model {name!r}", [f"tags: {tag.key!r} is the server's to write."])
        return super().create_registered_model(name, tags, *rest, **more)

    def create_model_version(
        self, name: Any, source: Any, run_id: Any = None, tags: Any = None, *rest: Any, **more: Any
    ) -> Any:
        """The server's tags are nobody else's to write; copies lose those of their original."""
        kept, problems = tag_rules.at_creation(tags, source)
        if problems:
            raise Refused(f"a version of {name!r}", problems)
        return super().create_model_version(name, source, run_id, kept, *rest, **more)

    def set_model_version_tag(self, name: Any, version: Any, tag: Any) -> Any:
        """A certificate under a guarded name must pass; other `kdguard.*` tags are refused."""
        act = partial(super().set_model_version_tag, name, version, tag)
        if tag.key == CERTIFICATE:
            return self.gate.certify(name, version, str(tag.value), act)
        return self._tag(name, version, tag.key, act)

    def delete_model_version_tag(self, name: Any, version: Any, key: Any) -> Any:
        """The certificate stays while a guarded name rests on it."""
        act = partial(super().delete_model_version_tag, name, version, key)
        if key == CERTIFICATE:
            what = f"to delete the tag {key!r}"
            return self._unless_held(name, what, "tag-refused", act, version=version)
        return self._tag(name, version, key, act)

    def set_registered_model_tag(self, name: Any, tag: Any) -> Any:
        """`mlflow.prompt.*` stays while a guarded name is held; `kdguard.*` is refused."""
        act = partial(super().set_registered_model_tag, name, tag)
        return self._tag(name, None, tag.key, act)

    def delete_registered_model_tag(self, name: Any, key: Any) -> Any:
        """As setting one."""
        act = partial(super().delete_registered_model_tag, name, key)
        return self._tag(name, None, key, act)

    # ── shared ──────────────────────────────────────────────────────────────────────────────────

    def _tag(self, name: Any, version: Any, key: Any, act: Callable[[], T]) -> T:
        if (why := tag_rules.objection(key)) is not None:
            raise Refused(f"a tag of {name!r}", [why])
        if version is None and tag_rules.ours(key):
            raise Refused(f"a tag of {name!r}", [f"tags: {key!r} is not a model's."])
        if not tag_rules.prompts(key):
            return act()
        marks = tag_rules.marks_prompts(key)
        return self._unless_held(name, f"the tag {key!r}", "tag-refused", act, prompts=marks)

    def _unless_held(
        self,
        name: Any,
        what: str,
        action: str,
        act: Callable[[], T],
        *,
        version: Any = None,
        prompts: bool = False,
        why: str = "",
    ) -> T:
        """Carry out `act` unless the model, or this version, holds a guarded name.

        What a prompt's versions hold counts only with `prompts`.
        """
        if not _texts(name):
            return act()
        policy = self.gate.known().policy_for(name)
        workspace = self._get_active_workspace()
        with self.gate.transactions.locked(f"{what} for {name!r}") as session:
            held = [
                item
                for item in Rows(session, workspace).held(name, policy)
                if (prompts or not item.prompt) and _concerns(item, version)
            ]
            if not held:
                return act()
        asked = Asked(name, held[0].version, workspace, held[0].name, action)
        named_ = ", ".join(map(str, held))
        reasons = (why or f"{what}: the model holds {named_}; take that away first.",)
        return self.gate.refuse_or_note(asked, reasons, act)


class GatedStore(GateMixin, SqlAlchemyStore):
    """MLflow's store, gated."""


class GatedWorkspaceStore(GateMixin, WorkspaceAwareSqlAlchemyStore):
    """MLflow's store with workspaces, gated."""


def _texts(*values: object) -> bool:
    """Whether these are texts at all; what is not is left to MLflow's own validation."""
    return all(isinstance(value, str) and value for value in values)


def _concerns(held: Held, version: Any) -> bool:
    """Whether a change of `version` concerns what is held. MLflow takes `+1`, ` 1` and `1_0` for
    numbers: so must this, or another spelling would pass by the guard."""
    if version is None:
        return True
    try:
        return int(held.version) == int(version)
    except (TypeError, ValueError):  # then MLflow's own validation refuses it
        return False
