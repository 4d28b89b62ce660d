"""prepare(): create the log's tables or bring them up to date, also when two workers start at once.

The migrations are Alembic's, with a version table of their own, so that neither `mlflow db upgrade`
nor we ever see the other's revisions.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, text

from mlflow_kdguard.errors import RegistryError
from mlflow_kdguard.plugin.log.tables import VERSION_TABLE

if TYPE_CHECKING:
    from alembic.script import ScriptDirectory

logger = logging.getLogger(__name__)

_LOCK = 0x6B646775617264
"""Number of PostgreSQL's advisory lock ("kdguard" in ASCII); its name on MySQL is `kdguard`."""
_PATIENCE = 60
"""Seconds that a start waits for another one that is creating the tables."""


def prepare(engine: Engine) -> None:
    """Create the tables of the log in a database, or upgrade them; nothing where they are current.

    Call it once MLflow's own tables exist: `mlflow db upgrade` takes a database that holds ours
    only for one that it has to migrate. Raises RegistryError where the database is newer than this
    package, and SQLAlchemy's own errors where it cannot be reached or may not be changed.
    """
    with engine.connect() as connection:
        if revision(connection) == newest():
            return
    with engine.connect() as connection, _alone(connection):
        _upgrade(connection)


def revision(connection: Connection) -> str | None:
    """The revision that the log's tables have; None where there are none."""
    from alembic.migration import MigrationContext

    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    return context.get_current_revision()


def newest() -> str:
    """The revision that this package writes."""
    head = _scripts().get_current_head()
    assert head is not None
    return head


def require_current(connection: Connection) -> None:
    """RegistryError unless the database has the tables that this package writes."""
    found = revision(connection)
    if found is None:
        raise RegistryError(
            "this database has no kdguard log.",
            remedy="Name the registry's database; the gated server creates the log at its start.",
        )
    if found != newest():
        _refuse_newer(found)
        raise RegistryError(
            f"the log's tables are at {found}, and this package writes {newest()}.",
            remedy="Start the gated server once: it upgrades them.",
        )


def _upgrade(connection: Connection) -> None:
    from alembic.migration import MigrationContext
    from alembic.operations import Operations

    found = revision(connection)  # another start may have been faster
    if found == newest():
        return
    if found is not None:
        _refuse_newer(found)

    def steps(current: Any, _context: Any) -> Any:
        return _scripts()._upgrade_revs("head", current)

    context = MigrationContext.configure(
        connection, opts={"version_table": VERSION_TABLE, "fn": steps}
    )
    with Operations.context(context):
        context.run_migrations()
    logger.info("the log's tables are at %s", newest())


def _refuse_newer(found: str) -> None:
    if found not in {script.revision for script in _scripts().walk_revisions()}:
        raise RegistryError(
            f"the log's tables are at {found!r}, which this package does not know.",
            remedy="Install the mlflow-kdguard that last used this database, or a newer one.",
        )


@cache
def _scripts() -> "ScriptDirectory":
    from alembic.script import ScriptDirectory

    folder = Path(__file__).parent / "migrations"
    return ScriptDirectory(str(folder), version_locations=[str(folder / "versions")])


@contextmanager
def _alone(connection: Connection) -> Iterator[None]:
    """One transaction that no other prepare() runs beside; committed at the end."""
    dialect = connection.dialect.name
    if dialect == "sqlite":
        # Outside a transaction: pysqlite opens none before DDL, and then each table would stand
        # alone after a kill.
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {_PATIENCE * 1000}")
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    elif dialect == "postgresql":
        connection.execute(text(f"SET LOCAL lock_timeout = '{_PATIENCE}s'"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    elif dialect in ("mysql", "mariadb"):
        got = connection.execute(text(f"SELECT GET_LOCK('kdguard', {_PATIENCE})")).scalar()
        if got != 1:
            raise RegistryError("another process has been creating the log's tables for too long.")
    else:
        raise RegistryError(
            f"the log cannot be kept in a {dialect} database.",
            remedy="Use SQLite, PostgreSQL or MySQL.",
        )
    try:
        yield
        connection.commit()
    finally:
        connection.rollback()
        if dialect in ("mysql", "mariadb"):
            connection.execute(text("SELECT RELEASE_LOCK('kdguard')"))
