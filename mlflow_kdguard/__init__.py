"""Guarded knowledge distillation for MLflow.

The front door is lazy: importing the package imports nothing heavy, so that a certificate can be
checked where neither torch nor mlflow is installed.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "GuardConfig": "mlflow_kdguard.config",
    "KDGuardError": "mlflow_kdguard.errors",
    "guard": "mlflow_kdguard.pipeline",
    "load_verified": "mlflow_kdguard.promoted.verified",
}

__all__ = ["GuardConfig", "KDGuardError", "__version__", "guard", "load_verified"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
