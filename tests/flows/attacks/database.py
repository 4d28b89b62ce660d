"""A PostgreSQL of our own that can be killed and started again."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from flows import servers
from requirements import postgres_program, require


class Postgres:
    """A data folder, and the server that runs on it, or does not."""

    def __init__(self, folder: Path) -> None:
        found = {name: postgres_program(name) for name in ("initdb", "postgres")}
        require("postgres", all(found.values()), f"PostgreSQL's programs were not found: {found}")
        folder.mkdir(parents=True, exist_ok=True)
        self._log, self._data = folder / "postgres.log", servers._owned(folder)
        self._programs = {name: str(path) for name, path in found.items()}
        self._process: subprocess.Popen[bytes] | None = None
        self.port = servers.free_port()
        servers._run_as_owner(
            [self._programs["initdb"], "-D", str(self._data), "-U", "kdguard", "-A", "trust",
             "--no-sync", "-E", "UTF8"]
        )  # fmt: skip

    @property
    def uri(self) -> str:
        return f"postgresql+psycopg2://kdguard@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start it; after a kill it recovers from its log first."""
        command = [
            *(self._programs["postgres"], "-D", str(self._data), "-p", str(self.port)),
            *("-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self._data}"),
            *("-c", "max_connections=200"),
        ]
        for _ in range(100):
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [*servers._owner_prefix(), *command],
                    stdout=log, stderr=subprocess.STDOUT, cwd="/", start_new_session=True,
                )  # fmt: skip
            with contextlib.suppress(AssertionError):
                servers._wait_for_postgres(self._process, self.port, self._log)
                return
            time.sleep(0.2)  # what is left of the killed one holds its memory a moment longer
        raise AssertionError(self._log.read_text(errors="replace")[-4000:])

    def kill(self) -> None:
        """SIGKILL to the server and all of its processes, which lead sessions of their own."""
        assert self._process is not None
        family = [self._process.pid, *_children(self._process.pid)]
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def close(self) -> None:
        if self._process is not None:
            self.kill()
        shutil.rmtree(self._data, ignore_errors=True)


def _children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == parent:
                    found.append(int(entry.name))
    return found


@contextlib.contextmanager
def killable(folder: Path) -> Iterator[Postgres]:
    """A running PostgreSQL that a test may kill."""
    made = Postgres(folder)
    try:
        made.start()
        yield made
    finally:
        made.close()
