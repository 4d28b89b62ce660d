"""The gated registry stores: `mlflow server --registry-store-uri kdguard+sqlite:///mlflow.db`.

MLflow imports this module wherever it looks for stores, so that it is light, and the stores behind
it are imported when one is opened. Where they cannot be imported, opening fails and the server does
not start: MLflow itself would only warn, and serve an ungated registry to whoever drops the prefix.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow_kdguard.plugin.store.sql import GateMixin

__all__ = ["PREFIX", "GateMixin", "build", "build_rest"]

PREFIX = "kdguard+"


def build(store_uri: str, tracking_uri: str | None = None) -> Any:
    """A gated store in a database; MlflowException says why there is none."""
    from mlflow.exceptions import MlflowException

    try:
        from mlflow_kdguard.plugin.store import sql
    except ImportError as error:
        raise MlflowException(f"mlflow-kdguard cannot be loaded: {error}") from error
    return sql.opened(store_uri.removeprefix(PREFIX), tracking_uri)


def build_rest(store_uri: str, tracking_uri: str | None = None) -> Any:
    """A store that judges before it asks a server; MlflowException says why there is none."""
    from mlflow.exceptions import MlflowException

    try:
        from mlflow_kdguard.plugin.store import rest
    except ImportError as error:
        raise MlflowException(f"mlflow-kdguard cannot be loaded: {error}") from error
    return rest.opened(store_uri.removeprefix(PREFIX), tracking_uri)


def __getattr__(name: str) -> Any:
    """`GateMixin`, which every gated database store is an instance of."""
    if name != "GateMixin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mlflow_kdguard.plugin.store.sql import GateMixin

    return GateMixin
