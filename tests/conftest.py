"""What every test may rely on: one thread, no leftovers in MLflow's globals, no silent skips."""

import os

# One BLAS thread a process: results repeat, and two test workers do not fight over two cores.
# It must happen before NumPy or torch is imported for the first time.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from requirements import require

settings.register_profile(
    "kdguard", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("kdguard")

_MLFLOW = "MLFLOW_"

# What a shell starts in the background ignores Ctrl-C, and so does everything started from there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run; with KDGUARD_REQUIRE=all that is a failure instead."""
    if item.get_closest_marker("cuda"):
        require("cuda", _has_cuda(), "no CUDA device is visible to torch")
    if item.get_closest_marker("postgres"):
        require("postgres", _has_postgres(), "initdb was not found")


@pytest.fixture(autouse=True)
def _clean_mlflow() -> Iterator[None]:
    """Every test starts and ends without MLflow state (only where mlflow is imported at all)."""
    before = {key: value for key, value in os.environ.items() if key.startswith(_MLFLOW)}
    yield
    if "mlflow" in sys.modules:
        _reset_mlflow()
    for key in [key for key in os.environ if key.startswith(_MLFLOW)]:
        del os.environ[key]
    os.environ.update(before)


def _reset_mlflow() -> None:
    """Forget runs, experiment and addresses, without asking a server that may be gone."""
    import mlflow
    from mlflow.tracking import fluent

    fluent._active_run_stack.get().clear()
    fluent._active_experiment_id = None
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    mlflow.set_registry_uri(None)  # type: ignore[arg-type]


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _has_postgres() -> bool:
    from requirements import postgres_program

    return postgres_program("initdb") is not None


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--update-goldens` writes tests/golden/ anew; read the difference before you commit it."""
    parser.addoption("--update-goldens", action="store_true", help="write tests/golden/ anew")
