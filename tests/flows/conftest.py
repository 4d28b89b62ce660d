"""Fixtures of the flows: servers that are started once for the whole session."""

from flows.servers import mlflow_server, postgres_server, postgres_uri

__all__ = ["mlflow_server", "postgres_server", "postgres_uri"]
