"""What a client is told: a 403 with every reason, which no client tries again."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from sqlalchemy.exc import DBAPIError, ProgrammingError, SQLAlchemyError

from mlflow_kdguard.errors import KDGuardError

log = logging.getLogger(__name__)

_LONGEST = 8_000


class Refused(MlflowException):
    """The gate's no."""

    def __init__(self, what: str, reasons: Sequence[str]) -> None:
        text = f"kdguard refuses {what}: " + " | ".join(reasons)
        super().__init__(text[:_LONGEST], error_code=PERMISSION_DENIED)
        self.reasons = tuple(reasons)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn every failure of ours into a refusal; MLflow's and the database's stay what they are.

    A client repeats whatever is not its own fault, for minutes: an error here must be a 403.
    """
    try:
        yield
    except MlflowException:
        raise
    except SQLAlchemyError as error:
        if not _our_tables(error):
            raise
        log.exception("the log's tables are missing or damaged")
        reason = "the log's tables are missing or damaged in the registry's database."
        raise Refused(what, [f"log: {reason} See docs/how-to/operate-the-log.md."]) from error
    except KDGuardError as error:
        raise Refused(what, [str(error)]) from error
    except Exception as error:
        log.exception("the gate failed on %s", what)
        raise Refused(what, [f"the gate failed ({type(error).__name__}: {error})."]) from error


def _our_tables(error: SQLAlchemyError) -> bool:
    if not isinstance(error, DBAPIError) or error.connection_invalidated:
        return False
    if "kdguard_" not in (error.statement or ""):
        return False
    return isinstance(error, ProgrammingError) or "no such" in str(error.orig)
