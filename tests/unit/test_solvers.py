"""Solvers that crash, hang, shout or have no licence: an answer comes back, and nothing else."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import faulty
import toygraphs
from mlflow_kdguard import extensions
from mlflow_kdguard.certify import Ball, certify, join
from mlflow_kdguard.certify.milp import Solved
from mlflow_kdguard.config import CertifySection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.errors import ConfigError, SolverError
from mlflow_kdguard.solvers import dual, oracle
from mlflow_kdguard.solvers.adapter import Limits
from mlflow_kdguard.solvers.model import Builder, Model
from mlflow_kdguard.solvers.oracle import Oracle
from toys import images, onnx_tiny

NAMES = ("CRASH", "HANG", "RAISE", "UNLICENSED", "ABSENT", "NOISY", "SECOND")


@pytest.fixture(autouse=True)
def _table(monkeypatch):
    """The faulty adapters are rows of the table, and their processes find them."""
    rows = extensions.BUILT_IN["solver"] | {name.lower(): f"faulty:{name}" for name in NAMES}
    monkeypatch.setitem(extensions.BUILT_IN, "solver", rows)
    here = str(Path(faulty.__file__).parent)
    known = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*filter(None, [known]), here]))
    monkeypatch.setattr(oracle, "GRACE", 0.5)
    extensions.table.cache_clear()
    yield
    extensions.table.cache_clear()


def small() -> Model:
    """Maximise v in [0, 1] below 1/2."""
    builder = Builder()
    builder.rows(builder.variables(0.0, 1.0), np.ones(1), hi=0.5)
    return builder.model({0: 1.0})


@pytest.mark.parametrize("name", ["crash", "raise", "unlicensed"])
def test_a_failure_is_an_answer(name):
    with Oracle(name) as asked:
        for _ in range(2):
            answer = asked.ask(small(), Limits())
            assert answer.status == "fault"
            assert answer.message
        assert asked.faults == 2


def test_a_solver_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(oracle, "START", 3.0)
    with Oracle("hang") as asked:
        began = time.monotonic()
        answer = asked.ask(small(), Limits(seconds=0.1))
        assert answer.status == "fault"
        assert "in time" in answer.message
        assert time.monotonic() - began < 10.0


def test_what_a_solver_prints_is_no_answer():
    with Oracle("noisy") as asked:
        answer = asked.ask(small(), Limits())
    assert answer.status == "optimal"
    assert dual.upper(small(), answer.y) == pytest.approx(0.5, abs=1e-12)


def test_a_process_that_died_is_started_again():
    with Oracle("second") as asked:
        said = [asked.ask(small(), Limits()).status for _ in range(4)]
    assert said == ["optimal", "fault", "optimal", "fault"]


def test_who_waits_may_be_told_to_stop():
    def stop() -> None:
        raise KeyboardInterrupt

    asked = Oracle("hang", stop)
    with pytest.raises(KeyboardInterrupt):
        asked.ask(small(), Limits())
    assert asked._process is None


def test_auto_is_the_solver_without_a_licence():
    assert oracle.chosen("auto") == "highs"


@pytest.mark.parametrize(
    ("name", "said"),
    [("absent", "pip install no-such-package"), ("unlicensed", "no valid licence")],
)
def test_a_solver_that_is_not_there_is_an_error_with_its_remedy(name, said):
    with pytest.raises(SolverError, match=said) as caught:
        oracle.chosen(name)
    assert caught.value.exit_code == 6


def test_a_configuration_names_a_solver_only_where_one_is_asked():
    data = Dataset.of(images(2, (1, 2, 2)), np.zeros(2, dtype=int), uri="npz:toy", classes=3)
    config = CertifySection(solver="highs", samples=1)
    with pytest.raises(ConfigError, match="asks no solver"):
        certify(onnx_tiny(), onnx_tiny(seed=1), data, config=config)


@pytest.mark.parametrize(
    ("name", "branching"), [("crash", False), ("hang", True), ("second", True), ("highs", True)]
)
def test_a_bound_survives_its_solver(name, branching, monkeypatch):
    monkeypatch.setattr(oracle, "START", 1.0)
    models = toygraphs.cnn(1), toygraphs.cnn(77_778)
    x = np.random.default_rng(1).uniform(0.0, 1.0, models[0].input_shape).astype(np.float32)
    ball = Ball.around(torch.from_numpy(x)[None], eps=0.15)
    until = time.monotonic() + (2.0 if name == "hang" else 60.0)
    bound = Solved(branching, name, until)
    found = bound(join(*models, device=torch.device("cpu")), ball, torch.tensor([0]), 8)
    exact = toygraphs.brute(*models, x.astype(float), 0.15, seed=1, klass=0)
    assert exact <= float(found.upper[0]) <= 1.0
