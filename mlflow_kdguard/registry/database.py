"""A new SQLite store appears whole: MLflow's own first migrations do not survive a kill."""

import logging
import os
from pathlib import Path
from urllib.parse import urlsplit

from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)


def make_whole(uri: str) -> None:
    """Create the database of a `sqlite:///FILE` URI beside its place, then link it there.

    MLflow creates its tables in some fifty steps; a process that is killed among them leaves a
    file that no later start can open. Other URIs, and files that exist, are left alone; where two
    processes are equally fast, the first one's file stays.
    """
    file = sqlite_file(uri)
    if file is None or file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    for old in file.parent.glob(f".{file.name}.*.tmp"):
        if not _alive(old.name.split(".")[-2]):
            old.unlink(missing_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        MlflowClient(f"sqlite:///{draft}", f"sqlite:///{draft}").search_experiments(max_results=1)
        os.link(draft, file)
    except FileExistsError:
        log.info("%s was created by another process meanwhile", file)
    finally:
        draft.unlink(missing_ok=True)


def sqlite_file(uri: str) -> Path | None:
    """The file behind a SQLite URI; None for other stores and databases in memory."""
    parts = urlsplit(uri)
    if parts.scheme.partition("+")[0] != "sqlite" or parts.netloc:
        return None
    name = parts.path[1:]
    return None if not name or name == ":memory:" else Path(name)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True
