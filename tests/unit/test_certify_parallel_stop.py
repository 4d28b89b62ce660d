"""Ctrl-C does not wait for searches that nobody wants any more."""

import threading

import pytest

from mlflow_kdguard.certify import parallel


def test_workers_are_told_that_nobody_waits():
    began, told = threading.Event(), threading.Event()

    def work(part: int) -> int:
        if part == 0:
            return 0
        began.set()
        try:
            while True:
                parallel.go_on()
        except parallel.Stopped:
            told.set()
            raise

    results = parallel.in_order(work, [0, 1], at_once=2)
    assert next(results) == 0
    assert began.wait(10)
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt())
    assert told.wait(10)


def test_outside_a_pool_nothing_stops():
    parallel.go_on()
