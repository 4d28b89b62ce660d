"""Who asks, and what they may read: MLflow's basic-auth where the server has it.

With `KDGUARD_AUTH=none` everybody is nobody in particular and may read everything, as on a plain
MLflow server.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mlflow.exceptions import MlflowException
from mlflow.utils.workspace_context import ServerWorkspaceContext
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

AUTH = "KDGUARD_AUTH"
"""Environment variable: `basic` (default) or `none`."""
UNKNOWN_USER = "You are not authenticated. Use the user name and password of this MLflow server."


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks: a user of basic-auth, or an address where there are no users."""

    name: str
    everything: bool
    """Whether every model may be read: administrators, and everybody without auth."""


class Refused(Exception):  # noqa: N818  (an answer, carried to where responses are made)
    """A request that gets `response` instead of an answer."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status_code)
        self.response = response


class Access(Protocol):
    """Authentication and permissions of a server."""

    def asker(self, request: Request) -> Asker:
        """Who asks; raises Refused where nobody may without saying who."""

    def may_read(self, asker: Asker, workspace: str, model: str) -> bool:
        """Whether the asker has READ on a registered model."""

    def may_edit(self, asker: Asker, workspace: str, model: str) -> bool:
        """Whether the asker has EDIT on a registered model."""


class Open:
    """A server without users."""

    def asker(self, request: Request) -> Asker:
        """Anybody, by address."""
        client = request.client
        return Asker(f"anonymous@{client.host if client else 'unknown'}", everything=True)

    def may_read(self, asker: Asker, workspace: str, model: str) -> bool:
        """Everybody reads everything."""
        del asker, workspace, model
        return True

    def may_edit(self, asker: Asker, workspace: str, model: str) -> bool:
        """Everybody writes everything, as on a plain MLflow server."""
        del asker, workspace, model
        return True


class BasicAuth:
    """MLflow's basic-auth app: its users, its permissions, its `authorization_function`."""

    def __init__(self, auth: Any) -> None:
        self._auth = auth

    def asker(self, request: Request) -> Asker:
        """The user whose credentials the request carries; Refused (401, or what a custom
        authorization function answers) where there are none."""
        auth = self._auth
        custom = auth.auth_config.authorization_function != auth.DEFAULT_AUTHORIZATION_FUNCTION
        ask = (
            auth._authenticate_custom_for_fastapi if custom else auth._authenticate_fastapi_request
        )
        user = ask(request)
        if isinstance(user, Response):
            raise Refused(user)
        if user is None:
            headers: Mapping[str, str] = {"WWW-Authenticate": 'Basic realm="mlflow"'}
            raise Refused(PlainTextResponse(UNKNOWN_USER, 401, headers))
        return Asker(str(user.username), everything=bool(user.is_admin))

    def may_read(self, asker: Asker, workspace: str, model: str) -> bool:
        """READ on the model, or better; no for a model that is not there."""
        return asker.everything or self._may(asker, workspace, model, "can_read")

    def may_edit(self, asker: Asker, workspace: str, model: str) -> bool:
        """EDIT on the model, or better; no for a model that is not there."""
        return asker.everything or self._may(asker, workspace, model, "can_update")

    def _may(self, asker: Asker, workspace: str, model: str, what: str) -> bool:
        with ServerWorkspaceContext(workspace):
            try:
                permission = self._auth._graphql_get_permission_for_model(model, asker.name)
            except MlflowException:
                return False
        return bool(getattr(permission, what))
