"""Batches of images side by side, each on one thread.

The passes are thousands of small products. Splitting each of them over threads gains little, and
on a machine with other work every one of them waits for the slowest thread (measured: 9.6 s an
image instead of 0.4). Whole batches share nothing, and one thread each also makes the figures
independent of how many there are.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")


_OWN = threading.local()


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """The batch is not wanted any more."""


def go_on() -> None:
    """Raise Stopped in a worker whose result nobody waits for: after Ctrl-C, or another's error."""
    if getattr(_OWN, "stop", None) is not None and _OWN.stop.is_set():
        raise Stopped


def _begin(stop: threading.Event) -> None:
    _OWN.stop = stop
    torch.set_num_threads(1)


def workers(device: torch.device) -> int:
    """Batches at a time: torch's threads on a CPU, one on a GPU."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def in_order(
    work: Callable[[Part], Result], parts: Sequence[Part], *, at_once: int
) -> Iterator[Result]:
    """work(part) of every part, in the order given; an exception ends what has not begun."""
    threads, stop = torch.get_num_threads(), threading.Event()
    pool = ThreadPoolExecutor(
        max(1, min(at_once, len(parts))), initializer=_begin, initargs=(stop,)
    )
    try:
        yield from pool.map(work, parts)
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)
