"""Opening the registry's database from outside of the server, for whoever operates it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine, create_engine
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.pool import NullPool

from mlflow_kdguard.errors import RegistryError, UsageError
from mlflow_kdguard.plugin.log.migrate import require_current

PREFIX = "kdguard+"


@contextmanager
def opened(uri: str) -> Iterator[Engine]:
    """An engine of the database that a server names, with or without `kdguard+`.

    Nothing is created. Raises UsageError for what is no database URI and for an SQLite file that
    does not exist, RegistryError where the database cannot be reached, fails meanwhile, or has no
    log of this package.
    """
    engine = _engine(uri)
    try:
        with engine.connect() as connection:
            require_current(connection)
        yield engine
    except DBAPIError as error:
        raise RegistryError(
            f"the database {engine.url.render_as_string()} did not do what was asked: "
            f"{str(error.orig).strip()}."
        ) from error
    finally:
        engine.dispose()


def _engine(uri: str) -> Engine:
    try:
        url = make_url(uri.removeprefix(PREFIX))
        _refuse_absent(url)
        engine = create_engine(url, poolclass=NullPool)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise UsageError(
            f"the database's URI cannot be used: {error}.",
            remedy="Name it as the server does: sqlite:///FILE, postgresql://…, mysql://….",
        ) from error
    return engine


def _refuse_absent(url: URL) -> None:
    if url.get_backend_name() != "sqlite":
        return
    if not url.database or url.database == ":memory:" or not Path(url.database).is_file():
        raise UsageError(f"there is no database {url.database or ':memory:'}.")
