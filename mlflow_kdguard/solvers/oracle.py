"""A solver that may crash, hang or lie: asked in a process of its own, and killed when it is late.

An answer of status "fault" is an answer; nothing here raises because of a solver. What an answer
proves is for `dual` to say.
"""

import contextlib
import logging
import subprocess
import sys
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic
from types import TracebackType
from typing import Self

import numpy as np

from mlflow_kdguard import extensions
from mlflow_kdguard.errors import SolverError
from mlflow_kdguard.solvers import messages
from mlflow_kdguard.solvers.adapter import NOTHING, Adapter, Answer, Limits
from mlflow_kdguard.solvers.model import Builder, Floats, Model

log = logging.getLogger(__name__)

GRACE = 5.0
"""Seconds that a solver may be late with its own time limit before it is killed."""
START = 60.0
"""And seconds for a fresh process to import the solver, on a busy machine."""
_POLL = 0.1


class Oracle:
    """One solver's process, started when it is asked and again after it died.

    `name`: a row of table "solver". `alive` is called while an answer is awaited; what it raises
    ends the wait and the process.
    """

    def __init__(self, name: str, alive: Callable[[], None] = lambda: None) -> None:
        extensions.load("solver", name)
        self.name, self.place = name, extensions.table("solver")[name]
        self.alive, self.faults = alive, 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def ask(self, model: Model, limits: Limits, start: Floats = NOTHING) -> Answer:
        """What the solver says; a fault where that is nothing. `start`: an earlier basis."""
        fresh = self._process is None or self._process.poll() is not None
        late = monotonic() + limits.seconds + GRACE + (START if fresh else 0.0)
        answers: SimpleQueue[Answer] = SimpleQueue()
        program = messages.of_model(model, limits, start)
        Thread(target=self._exchange, args=(program, answers), daemon=True).start()
        try:
            answer = self._awaited(answers, late)
        except BaseException:
            self.close()
            raise
        if answer.status == "fault":
            self.faults += 1
            log.warning("solver %s failed: %s", self.name, answer.message)
        return answer

    def close(self) -> None:
        """End the process, whatever it is doing."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _awaited(self, answers: "SimpleQueue[Answer]", late: float) -> Answer:
        while monotonic() < late:
            with contextlib.suppress(Empty):
                return answers.get(timeout=_POLL)
            self.alive()
        self.close()
        return Answer("fault", message="no answer in time; its process was ended")

    def _exchange(self, program: dict[str, object], answers: "SimpleQueue[Answer]") -> None:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            messages.send(process.stdin, program)
            answers.put(messages.to_answer(messages.receive(process.stdout)))
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            code = _end(process)
            what = f"its process ended with {code}" if isinstance(error, EOFError) else repr(error)
            answers.put(Answer("fault", message=what))

    def _started(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mlflow_kdguard.solvers.worker", self.place]
        return subprocess.Popen(  # noqa: S603 - our own module
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )


def _end(process: subprocess.Popen[bytes]) -> int:
    """Kill a process and close its streams: its exit status, which is its own if it died first."""
    process.kill()
    code = process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.close()
    return code


def chosen(name: str) -> str:
    """The row of table "solver" that a configuration means, after it solved a tiny program.

    "auto" is HiGHS, for which no licence is needed. Raises SolverError where the solver is not
    installed or does not work (no licence), ConfigError where there is no such row.
    """
    name = "highs" if name == "auto" else name
    adapter: Adapter = extensions.load("solver", name)
    if not adapter.installed:
        raise SolverError(
            f"the solver {name!r} is not installed ({adapter.package} cannot be imported).",
            remedy=adapter.remedy,
        )
    builder = Builder()
    column = builder.variables(0.0, 1.0)
    builder.rows(column, np.ones(1), hi=0.5)
    with Oracle(name) as oracle:
        answer = oracle.ask(builder.model({0: 1.0}), Limits())
    if answer.status != "optimal":
        raise SolverError(
            f"the solver {name!r} does not solve a program of one variable: {answer.message}.",
            remedy=f"{adapter.remedy} `--solver highs` needs no licence.",
        )
    return name
