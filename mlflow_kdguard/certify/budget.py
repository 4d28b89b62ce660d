"""How long to search: nodes, and limits that end a search wherever it is."""

import mmap
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mlflow_kdguard.certify.parallel import go_on
from mlflow_kdguard.errors import ConfigError

Limit = Literal["nodes", "seconds", "memory", "interrupted"]
"""What a search was ended by while parts of the question were still open."""

GIB = 2**30
_STATM = Path("/proc/self/statm")


class Reached(Exception):  # noqa: N818 - nothing went wrong
    """A limit was reached where nothing is lost by stopping."""

    def __init__(self, limit: Limit) -> None:
        super().__init__(limit)
        self.limit: Limit = limit


def nothing_ends() -> Limit | None:
    """No limit at all."""
    return None


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Limits:
    """What may end a search before its nodes do, and makes it one that cannot be repeated exactly.

    `until`: seconds of time.monotonic; `memory`: bytes that the process may hold; `interrupted`:
    whether somebody has asked to stop. They are looked at between two descents, so that each is
    exceeded by what one of them takes, and by bounding what is open anew.
    """

    until: float = inf
    memory: float = inf
    interrupted: Callable[[], bool] = _never

    def reached(self) -> Limit | None:
        """The limit that ends the search here."""
        if self.interrupted():
            return "interrupted"
        if time.monotonic() >= self.until:
            return "seconds"
        if self.memory < inf and resident() > self.memory:
            return "memory"
        return None

    def late(self) -> Limit | None:
        """Whether nothing is to be begun any more. Roots need little memory; they are."""
        limit = self.reached()
        return None if limit == "memory" else limit


class Ration:
    """What a run of several `parts`, `at_once` of them at a time, may take in all.

    A part that begins may take the same share of the seconds that are left as every part after it:
    what one does not need is the next one's. `gib` of memory are the process's.
    """

    def __init__(
        self,
        parts: int,
        at_once: int,
        *,
        seconds: float | None,
        gib: float | None,
        interrupted: Callable[[], bool],
    ) -> None:
        if gib is not None:
            resident()
        self.end = inf if seconds is None else time.monotonic() + seconds
        self.memory = inf if gib is None else gib * GIB
        self.interrupted = interrupted
        self._parts, self._at_once, self._lock = parts, at_once, threading.Lock()

    def limits(self) -> Limits:
        """Those of the part that begins now."""
        with self._lock:
            left, self._parts = self._parts, self._parts - 1
        now = time.monotonic()
        until = now + (self.end - now) * min(self._at_once, left) / left
        return Limits(until, self.memory, self.interrupted)


@dataclass(frozen=True, slots=True)
class Aim:
    """How close a bound need not be beaten: by how much it may exceed the largest gap found, as a
    share of that (`relative`) or in confidence (`absolute`), whichever is more."""

    relative: float = 0.005
    absolute: float = 2e-4

    def enough(self, floor: Tensor) -> Tensor:
        """What a bound need not be below where gaps of `floor` are attained."""
        return torch.maximum(floor * (1.0 + self.relative), floor + self.absolute)


AIM = Aim()
"""What the configuration asks for where it says nothing."""


@dataclass(frozen=True, slots=True)
class Budget:
    """`nodes` an image: a search that ends with them repeats itself to the digit. `limits` end it
    before, and so does a bound that meets the `aim`."""

    nodes: int
    limits: Limits = Limits()
    aim: Aim = AIM

    def go_on(self) -> None:
        """Raise Reached at a limit, and Stopped where nobody waits for the result."""
        go_on()
        limit = self.limits.reached()
        if limit is not None:
            raise Reached(limit)


def resident() -> int:
    """Bytes of main memory that this process holds; ConfigError where the system does not say."""
    try:
        return int(_STATM.read_text().split()[1]) * mmap.PAGESIZE
    except OSError as error:
        raise ConfigError(
            f"a limit of memory needs {_STATM}, which this system does not have.",
            remedy="Leave the limit away, and limit nodes or seconds.",
        ) from error
