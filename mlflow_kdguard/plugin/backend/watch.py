"""One child process at a time: its output streamed, its time and memory watched, no orphan left."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil

from mlflow_kdguard.plugin.backend.settings import Limits

_LOOK = 0.1
"""Seconds between two looks at a process."""
_DRAIN = 5.0
"""Seconds that the last lines of a process may take, once it is gone."""
_MIB = 1 << 20
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_heard: list[dict[signal.Signals, Any]] = []
"""What heard the signals before each `undisturbed` block that we are in."""


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP: handled as Ctrl-C is, but answered with an exit code of our own."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: its exit code (negative: the signal), or why it was stopped."""

    code: int
    stopped: str = ""
    tail: tuple[str, ...] = ()

    @property
    def why(self) -> str:
        """One line about a process that did not end with 0."""
        if self.stopped:
            return self.stopped
        if self.code < 0:
            with suppress(ValueError):
                return f"it was ended by {signal.Signals(-self.code).name}"
        return f"it ended with exit code {self.code}"


@dataclass(slots=True)
class _Stream:
    """Copies a process's output to ours and into its log, line by line, as it comes."""

    pipe: IO[bytes]
    log: IO[bytes]
    tail: list[str] = field(default_factory=list)

    def copy(self) -> None:
        for line in self.pipe:
            self.log.write(line)
            self.log.flush()
            text = line.decode("utf-8", "replace")
            self.tail = [*self.tail[-19:], text.rstrip()]
            with suppress(OSError, ValueError):  # a reader that went away stops no work
                sys.stdout.write(text)
                sys.stdout.flush()


def run(
    words: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    log: Path,
    limits: Limits,
    grace: float,
    tethered: bool = False,
) -> Ended:
    """Run a command in `folder` until it ends or breaks a limit; it never outlives this call.

    The process leads its own session, so that everything that it starts can be ended with it. It
    gets SIGINT, half of `grace` later SIGTERM, and SIGKILL after the other half. The stdin of a
    `tethered` one is a pipe that closes when we die. KeyboardInterrupt passes through once nothing
    is left of the process; OSError where the program cannot be started.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as kept, undisturbed():
        process = subprocess.Popen(  # noqa: S603  (words, not a shell's line)
            list(words),
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.PIPE if tethered else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdout is not None
        stream = _Stream(process.stdout, kept)
        reader = threading.Thread(target=stream.copy, daemon=True)
        reader.start()
        try:
            with disturbed():
                stopped = _watched(process, limits, grace)
        finally:
            end(process, grace)
            reader.join(_DRAIN)
            _close(process, reader)
    return Ended(process.returncode, stopped, tuple(stream.tail))


def end(process: "subprocess.Popen[bytes]", grace: float) -> None:
    """Ask the process to stop, insist, and kill what is left of its session and descendants."""
    ours = _descendants(process.pid)
    for number in (signal.SIGINT, signal.SIGTERM):
        if process.poll() is not None:
            break
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace / 2)
    _kill(process, ours)


def _kill(process: "subprocess.Popen[bytes]", descendants: Sequence[psutil.Process]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in descendants:
        with suppress(psutil.Error):
            child.kill()
    process.wait()


def _close(process: "subprocess.Popen[bytes]", reader: threading.Thread) -> None:
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()
    if process.stdout is not None and not reader.is_alive():
        process.stdout.close()


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise Stopped, in the main thread.

    One that was ignored before, as by `nohup`, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    deaf = (signal.SIG_IGN, None)  # nohup, or a handler that is not Python's
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) not in deaf]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within the block Ctrl-C, SIGTERM and SIGHUP wait; afterwards they are heard.

    It is for work that is bounded in time, such as cleaning up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def wait(number: int, _frame: FrameType | None) -> None:
        waiting.append(number)

    _heard.append({number: signal.signal(number, wait) for number in _SIGNALS})
    try:
        yield
    finally:
        for heard, handler in _heard.pop().items():
            signal.signal(heard, handler)
        for number in dict.fromkeys(waiting):
            os.kill(os.getpid(), number)


@contextmanager
def disturbed() -> Iterator[None]:
    """Within `undisturbed`: a block in which signals are heard at once again."""
    if not _heard or threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting = {number: signal.signal(number, heard) for number, heard in _heard[-1].items()}
    try:
        yield
    finally:
        for number, handler in waiting.items():
            signal.signal(number, handler)


def _watched(process: "subprocess.Popen[bytes]", limits: Limits, grace: float) -> str:
    """Wait for the end; why the process was stopped, empty where it was not."""
    began = time.monotonic()
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LOOK)
            return ""
        if limits.seconds is not None and time.monotonic() - began > limits.seconds:
            end(process, min(grace, 2.0))  # what never ends seldom listens
            return f"it was stopped after {limits.seconds:g} s, its limit of wall time"
        if limits.memory_mib is not None and _resident(process.pid) > limits.memory_mib * _MIB:
            _kill(process, _descendants(process.pid))  # there is no time to ask
            return f"it was stopped at {limits.memory_mib} MiB, its limit of memory"


def _resident(pid: int) -> int:
    """Bytes resident in the process and its descendants; shared pages count for each."""
    total = 0
    for process in [*_alive(pid), *_descendants(pid)]:
        with suppress(psutil.Error):
            total += int(process.memory_info().rss)
    return total


def _alive(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return [psutil.Process(pid)]
    return []


def _descendants(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return list(psutil.Process(pid).children(recursive=True))
    return []
