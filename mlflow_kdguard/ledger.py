"""What is finished, on disk: one folder a stage, and a `done.json` written last.

A stage is skipped when its `done.json` names the same inputs and every file that it lists still
has the bytes that it had. Whatever kills the process, a stage is therefore either finished or
absent; what a killed stage left behind (checkpoints) stays for it to go on from, and is cleared
when its inputs have changed.
"""

import fcntl
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlflow_kdguard.errors import KDGuardError, UsageError
from mlflow_kdguard.files import digest_json, sha256_file, write_bytes, write_json

log = logging.getLogger(__name__)

_DONE = "done.json"
_INPUTS = "inputs.sha256"
_CLEARING = "clearing"


@dataclass(frozen=True, slots=True)
class Entry:
    """One stage's place: its folder, the digest of its inputs, and its record once finished."""

    name: str
    folder: Path
    inputs: str
    record: dict[str, Any] | None

    def path(self, file: str) -> Path:
        """Where the stage keeps `file`."""
        return self.folder / file

    @property
    def recorded(self) -> dict[str, Any]:
        """The record of a stage that is finished."""
        if self.record is None:
            raise KDGuardError(f"the stage {self.name} was read before it was finished.")
        return self.record


class Ledger:
    """The finished stages of one pipeline under one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, name: str, inputs: Mapping[str, Any]) -> Entry:
        """The stage's entry; its `record` is None where the stage has to be run (again).

        Raises UsageError where its folder holds files that no stage has left there.
        """
        folder = self.folder / name
        digest = digest_json(dict(inputs))
        record = _finished(folder, digest)
        if record is None:
            _clear_if_other_inputs(folder, digest)
        return Entry(name, folder, digest, record)

    def reopen(self, entry: Entry) -> Entry:
        """The entry of a finished stage whose outcome no longer stands: it has to be run again."""
        entry.path(_DONE).unlink(missing_ok=True)
        return Entry(entry.name, entry.folder, entry.inputs, None)

    def finish(self, entry: Entry, files: Iterable[str], record: Mapping[str, Any]) -> Entry:
        """Declare a stage finished: its files are hashed, then `done.json` appears at once."""
        kept = {file: sha256_file(entry.path(file)) for file in sorted(files)}
        done = {"inputs": entry.inputs, "files": kept, "record": dict(record)}
        write_json(entry.path(_DONE), done)
        return Entry(entry.name, entry.folder, entry.inputs, dict(record))

    def files(self, entry: Entry) -> dict[str, str]:
        """The finished stage's files with their SHA-256."""
        done = json.loads(entry.path(_DONE).read_text())
        return dict(done["files"])


def _finished(folder: Path, inputs: str) -> dict[str, Any] | None:
    """The record of a finished stage, if inputs and files are those that it was finished with."""
    done = _read_done(folder / _DONE)
    if done is None:
        return None
    if done["inputs"] != inputs:
        log.info("the inputs of %s changed: it is run again", folder.name)
        return None
    for file, digest in done["files"].items():
        path = folder / file
        if not path.is_file() or sha256_file(path) != digest:
            log.warning("%s is missing or was altered: the stage is run again", path)
            return None
    return dict(done["record"])


def _read_done(path: Path) -> dict[str, Any] | None:
    try:
        done = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        done = None
    kinds = {"inputs": str, "files": dict, "record": dict}
    if not isinstance(done, dict) or not all(isinstance(done.get(k), t) for k, t in kinds.items()):
        log.warning("%s is unreadable: the stage is run again", path)
        return None
    return done


def _clear_if_other_inputs(folder: Path, inputs: str) -> None:
    """Keep checkpoints of the same inputs; drop everything else."""
    mark = folder / _INPUTS
    if mark.is_file() and mark.read_text().strip() == inputs:
        (folder / _DONE).unlink(missing_ok=True)
        for torn in folder.rglob(".*.tmp"):
            torn.unlink(missing_ok=True)  # what a kill left of an unfinished write
        return
    _refuse_foreign(folder, mark)
    # The mark stands all the while, so that a kill in here leaves a folder that is known as ours,
    # and names no inputs, so that nobody goes on from what is half cleared.
    write_bytes(mark, f"{_CLEARING}\n".encode())
    for left in folder.iterdir():
        if left != mark:
            _remove(left)
    write_bytes(mark, f"{inputs}\n".encode())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _refuse_foreign(folder: Path, mark: Path) -> None:
    """A folder without our mark is somebody's own (`teacher/` beside the images, say)."""
    if mark.is_file() or not folder.exists():
        return
    torn = f".{mark.name}."  # the mark itself, when a kill came while it was written
    if not folder.is_dir() or any(not path.name.startswith(torn) for path in folder.iterdir()):
        raise UsageError(
            f"{folder} is in the way: a stage would keep its files there, and it holds others.",
            remedy="Name another folder for results (run.work_dir, --out).",
        )


@contextmanager
def alone_in(folder: Path, *, lock: str, who: str, setting: str) -> Iterator[None]:
    """Hold the file `lock` of a folder, which is made where it is missing.

    UsageError where `who` (what else may hold it) does, or where nothing can be written there; its
    remedy names the `setting` that says which folder to work in.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file: IO[str] = (folder / lock).open("w")
    except OSError as error:
        raise UsageError(
            f"cannot work in {folder}: {error.strerror}.", remedy=f"Name another {setting}."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{who} works in {folder}.", remedy=f"Wait for it, or name another {setting}."
            ) from error
        yield
