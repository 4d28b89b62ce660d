"""Ctrl-C and SIGTERM as a flag, so that a run stops between two steps and not within one."""

import signal
import threading
from types import FrameType
from typing import Any


class Signals:
    """While active, the first SIGINT or SIGTERM sets `struck`; a second one acts as it always did.

    Outside the main thread Python delivers no signals, and nothing is installed. A signal that
    the process ignores (`nohup`) stays ignored.
    """

    def __init__(self) -> None:
        self.struck = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = before
                    signal.signal(number, self._strike)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _strike(self, _number: int, _frame: FrameType | None) -> None:
        self.struck = True
        self._restore()

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}
