"""Who asks: the name that the log writes beside every action.

A name counts where somebody checked it: MLflow's basic-auth for requests that pass through it, or
whoever says so with `acting`. An Authorization header that nobody checks is no name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

SYSTEM = "system"
_stated: ContextVar[str | None] = ContextVar("kdguard_actor", default=None)


@contextmanager
def acting(name: str) -> Iterator[None]:
    """Let `name`, which the caller has checked, be the actor of everything inside."""
    token = _stated.set(name)
    try:
        yield
    finally:
        _stated.reset(token)


def actor() -> str:
    """Who asks now: a checked name, `anonymous@ADDRESS` in a request, `system` outside of one."""
    if (stated := _stated.get()) is not None:
        return stated
    from flask import has_request_context, request

    if not has_request_context():
        return SYSTEM
    given = request.authorization
    if given is not None and given.username and _checked_by_mlflow():
        return str(given.username)
    return f"anonymous@{request.remote_addr or 'unknown'}"


def _checked_by_mlflow() -> bool:
    """Whether MLflow's basic-auth stands before this app's requests, with its own user table."""
    import sys

    from flask import current_app

    auth = sys.modules.get("mlflow.server.auth")
    if auth is None:
        return False
    hooks = current_app.before_request_funcs.get(None, [])
    own = "mlflow.server.auth:authenticate_request_basic_auth"
    return auth._before_request in hooks and auth.auth_config.authorization_function == own
