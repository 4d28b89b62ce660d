"""Cells made by several processes; whoever prints the tables finds them done."""

import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.guard.cells import FLOORS, Cells
from benchmarks.guard.kept import CONTROL
from benchmarks.guard.rows import Guard, Row

Asked = TypeVar("Asked")
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Work:
    """Everything of one row under one seed."""

    cells: Cells
    row: Row
    seed: int
    guards: tuple[Guard, ...]


def make(rows: Sequence[tuple[Row, Sequence[int]]], guards: Sequence[Guard], cells: Cells,
         *, jobs: int) -> None:  # fmt: skip
    """Make every cell of the rows, `jobs` at a time.

    What all cells of a pair share (the calibration of audits) is made first, here. A cell counts
    from when it is finished, so that little is lost where a run ends early.
    """
    _calibrate(rows, guards, cells)
    asked = [Work(cells, row, seed, tuple(guards)) for row, seeds in rows for seed in seeds]
    each(_one, asked, jobs=jobs, what="rows × seeds")


def each(make: Callable[[Asked], Made], asked: Sequence[Asked], *, jobs: int,
         what: str) -> list[Made]:  # fmt: skip
    """What `make` says of each, in order, `jobs` processes at a time, with progress on stderr.

    Ctrl-C and errors end the processes at once.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_quiet)
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task(what, total=len(asked))
        begun = [pool.submit(make, one) for one in asked]
        try:
            for done in as_completed(begun):
                done.result()
                shown.advance(task)
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    pool.shutdown()
    return [done.result() for done in begun]


def _calibrate(
    rows: Sequence[tuple[Row, Sequence[int]]], guards: Sequence[Guard], cells: Cells
) -> None:
    audits = [guard.audit for guard in guards if guard.audit.shadows]
    first = {row.pair: (row, seeds[0]) for row, seeds in reversed(rows)}
    for pair, (row, seed) in first.items() if audits else ():
        print(f"clean networks for the audits of {pair}: minutes, once", file=sys.stderr)
        net = cells.taught(row, seed).net(CONTROL)
        for audit in audits:
            cells.calibrated(net, audit)


def _quiet() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _one(work: Work) -> None:
    work.cells.raw(work.row, work.seed)
    for each in (*FLOORS, *work.guards):
        work.cells.judged(work.row, each, work.seed)
