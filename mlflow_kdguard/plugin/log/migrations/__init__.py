"""Alembic migrations of the log's tables; `log.migrate` runs them."""
