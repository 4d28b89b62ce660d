"""System metrics of a run (CPU, memory, disk, network, GPU), where the user has enabled them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING

log = logging.getLogger(__name__)


@contextmanager
def watched(run_id: str, tracking_uri: str) -> Iterator[None]:
    """Within the block MLflow's own monitor logs `system/…` metrics on the run.

    It does so where MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING says it, as for runs that
    `mlflow.start_run` makes; its interval is MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL. Without
    psutil that is a warning: no stage fails over it.
    """
    if not MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get():  # type: ignore[no-untyped-call]
        yield
        return
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        untyped: Any = SystemMetricsMonitor
        monitor = untyped(run_id, resume_logging=True, tracking_uri=tracking_uri)
    except ImportError as error:
        log.warning("system metrics are enabled but cannot be taken: %s", error)
        yield
        return
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()
