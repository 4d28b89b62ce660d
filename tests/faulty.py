"""Adapters that fail on purpose, for `solvers.oracle`: what they answer is wrong or nothing."""

import os
import signal
import time
from dataclasses import replace

from mlflow_kdguard.solvers.adapter import NOTHING, Adapter, Answer, Limits
from mlflow_kdguard.solvers.highs import solve as honest
from mlflow_kdguard.solvers.model import Floats, Model


def _crash(model: Model, limits: Limits, start: Floats = NOTHING) -> Answer:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def _hang(model: Model, limits: Limits, start: Floats = NOTHING) -> Answer:
    time.sleep(600.0)
    raise AssertionError


def _raise(model: Model, limits: Limits, start: Floats = NOTHING) -> Answer:
    raise RuntimeError("the token server is gone")


def _unlicensed(model: Model, limits: Limits, start: Floats = NOTHING) -> Answer:
    return Answer("fault", message="no valid licence")


def _noisy(model: Model, limits: Limits, start: Floats = NOTHING) -> Answer:
    os.write(1, b"a banner of the solver\n" * 1000)
    return honest(model, limits, start)


def _second(model: Model, limits: Limits, start: Floats = NOTHING) -> Answer:
    """Works once a process, then dies: a leak that ends in the machine's arms."""
    if _COUNT:
        os._exit(9)
    _COUNT.append(1)
    return replace(honest(model, limits, start), message="first")


_COUNT: list[int] = []

CRASH = Adapter("crash", "highspy", "", _crash)
HANG = Adapter("hang", "highspy", "", _hang)
RAISE = Adapter("raise", "highspy", "", _raise)
UNLICENSED = Adapter("unlicensed", "highspy", "Get a licence.", _unlicensed)
ABSENT = Adapter("absent", "no_such_package", "Install it: pip install no-such-package.", honest)
NOISY = Adapter("noisy", "highspy", "", _noisy)
SECOND = Adapter("second", "highspy", "", _second)
