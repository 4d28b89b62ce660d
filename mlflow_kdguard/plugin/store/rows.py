"""What the registry's tables say about a model: its guarded names, its versions, its prompts."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any

from mlflow.entities.model_registry.model_version_stages import ALL_STAGES
from mlflow.prompt.constants import _PROMPT_SOURCE_PLACEHOLDERS, IS_PROMPT_TAG_KEY
from mlflow.store.model_registry.dbmodels.models import (
    SqlModelVersion,
    SqlModelVersionTag,
    SqlRegisteredModelAlias,
    SqlRegisteredModelTag,
)
from sqlalchemy import Connection, Dialect, bindparam, literal_column, or_, select, union_all
from sqlalchemy.sql.compiler import SQLCompiler

from mlflow_kdguard.plugin.log import tables
from mlflow_kdguard.plugin.server.judge import VersionFacts
from mlflow_kdguard.policy import Policy

PROMOTIONS = ("promote", "stage")
"""Actions of the log's entries about a version that was given an alias or a stage."""


_STAGES: tuple[str, ...] = tuple(map(str, ALL_STAGES))


@cache
def _all_held(dialect: Dialect) -> SQLCompiler:
    """Every alias, and versions in any of as many stages as there are, as one statement.

    It runs before many a call, so that it is compiled once, and executed as it is.
    """
    parts = []
    for table, column in ((SqlRegisteredModelAlias, "alias"), (SqlModelVersion, "current_stage")):
        c: Any = table.__table__.c
        of = (c.workspace == bindparam("workspace"), c.name == bindparam("name"))
        parts.append(select(c[column], c.version, literal_column(f"'{column}'")).where(*of))
    stage: Any = SqlModelVersion.current_stage
    stages = [stage == bindparam(f"stage{number}") for number in range(len(_STAGES))]
    compiled = union_all(parts[0], parts[1].where(or_(*stages))).compile(dialect=dialect)
    assert isinstance(compiled, SQLCompiler)
    return compiled


def _execute_held(connection: Connection, workspace: str, name: str, stages: list[str]) -> Any:
    statement = _all_held(connection.dialect)
    # No stage is called "": what is not asked for matches nothing.
    asked = {
        f"stage{n}": stage for n, stage in zip_longest(range(len(_STAGES)), stages, fillvalue="")
    }
    values = statement.construct_params({"workspace": workspace, "name": name, **asked})
    order = statement.positiontup if statement.positional else None
    given: Any = values if order is None else tuple(values[key] for key in order)
    return connection.exec_driver_sql(statement.string, given).all()


@dataclass(frozen=True, slots=True)
class Held:
    """A guarded alias or stage, and the version that carries it."""

    name: str
    version: str
    prompt: bool
    staged: bool

    def __str__(self) -> str:
        return f"{self.name} (version {self.version})"


@dataclass(frozen=True, slots=True)
class Rows:
    """One workspace's rows, read in one session."""

    session: Any
    workspace: str

    def facts(self, row: Any, *, history: bool = False) -> VersionFacts:
        """The facts about one version; `history` asks the log for its promotions, too."""
        name, version = str(row.name), int(row.version)
        tags = self._tags(SqlModelVersionTag, name, SqlModelVersionTag.version == version)
        return VersionFacts(
            name=name,
            version=str(version),
            workspace=self.workspace,
            source=str(row.source),
            storage_location=row.storage_location,
            tags=tags,
            previously_promoted=self._promoted(name, version) if history else frozenset(),
        )

    def held(self, name: str, policy: Policy) -> Iterator[Held]:
        """The guarded names that versions of a model carry."""
        stages = [stage for stage in _STAGES if policy.guards_stage(stage)]
        rows = _execute_held(self.session.connection(), self.workspace, name, stages)
        for stated, version, column in rows:
            held, staged = str(stated), column != "alias"
            if staged or policy.guards_alias(held):
                yield Held(held, str(int(version)), self.is_prompt(name, int(version)), staged)

    def is_prompt(self, name: str, version: int) -> bool:
        """Whether a version is a prompt's: marked as such, and without any artifact."""
        marks = self._tags(SqlRegisteredModelTag, name)
        if marks.get(IS_PROMPT_TAG_KEY, "false").lower() != "true":
            return False
        asked: Any = select(SqlModelVersion.source, SqlModelVersion.storage_location)
        where = (*self._of(SqlModelVersion, name), SqlModelVersion.version == version)
        found = self.session.execute(asked.where(*where)).one_or_none()
        return found is not None and all(
            uri is None or uri in _PROMPT_SOURCE_PLACEHOLDERS for uri in found
        )

    def carries(self, name: str, alias: str) -> str | None:
        """The version that an alias stands for."""
        table = SqlRegisteredModelAlias
        asked: Any = select(table.version).where(*self._of(table, name), table.alias == alias)
        found = self.session.execute(asked).scalar()
        return None if found is None else str(found)

    def set_tags(self, name: str, version: int, tags: dict[str, str]) -> None:
        """Write tags of a version, whatever they were."""
        for key, value in tags.items():
            self.session.merge(
                SqlModelVersionTag(
                    workspace=self.workspace, name=name, version=version, key=key, value=value
                )
            )

    def _tags(self, table: Any, name: str, *more: Any) -> dict[str, str]:
        rows = self.session.execute(
            select(table.key, table.value).where(*self._of(table, name), *more)
        )
        return {str(key): "" if value is None else str(value) for key, value in rows}

    def _promoted(self, name: str, version: int) -> frozenset[str]:
        entry = tables.log.c
        asked: Any = select(entry.certificate).where(
            entry.action.in_(PROMOTIONS),
            entry.workspace == self.workspace,
            entry.model == name,
            entry.version == str(version),
        )
        return frozenset(self.session.execute(asked.distinct()).scalars())

    def _of(self, table: Any, name: str) -> tuple[Any, Any]:
        return table.workspace == self.workspace, table.name == name
