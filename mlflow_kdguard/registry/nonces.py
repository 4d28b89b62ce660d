"""Nonces: a server that has kdguard's app counts how often a model is measured.

The images that are drawn for the bounds follow from the nonce, and the gate's error level from the
count, so that nobody measures until it fits. A server without the app hands out none.
"""

from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from mlflow_kdguard.errors import RegistryError
from mlflow_kdguard.records import Record
from mlflow_kdguard.registry.client import Connection

ROUTE = "/api/2.0/kdguard/nonces"
_ABSENT = frozenset({404, 405})


class Nonce(Record):
    """A nonce, and the how-manieth measurement of this model it stands for."""

    nonce: str
    attempt: int


def handed_out(connection: Connection, name: str, subject: str) -> Nonce | None:
    """Ask the server for a nonce to measure the file with SHA-256 `subject` as model `name`.

    None where the registry is no server or has no app. Raises RegistryError where the server
    refuses or its answer is none.
    """
    uri = connection.registry_uri.removeprefix("kdguard+")
    if not uri.startswith(("http://", "https://")):
        return None
    with connection.answering("hand out a nonce"):
        creds = get_default_host_creds(uri)  # type: ignore[no-untyped-call]
        body = {"name": name, "subject": subject}
        answer = http_request(  # type: ignore[no-untyped-call]
            creds, ROUTE, "POST", json=body, raise_on_status=False
        )
        if answer.status_code in _ABSENT and "error_code" not in answer.text:
            return None  # no such route: a plain server; the app names an error code
        if not answer.ok:
            raise RegistryError(f"the server hands out no nonce: {answer.text[:500]}")
        found = answer.json()
        return Nonce(nonce=found["nonce"], attempt=found["attempt"])
