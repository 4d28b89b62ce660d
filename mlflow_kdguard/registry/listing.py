"""All that a registry holds, page by page, read through the plain registry API; nothing is changed.

MLflow leaves models out of its listings that are marked as prompts, and a mark is a tag that
anybody may set. Both kinds are listed here, so that nothing hides behind one.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.prompt.constants import _PROMPT_SOURCE_PLACEHOLDERS, IS_PROMPT_TAG_KEY
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from mlflow.utils.workspace_context import WorkspaceContext, get_request_workspace

from mlflow_kdguard.errors import RegistryError
from mlflow_kdguard.registry.client import Connection
from mlflow_kdguard.registry.versions import store_at

DEFAULT_WORKSPACE = "default"
LOG = "/api/2.0/kdguard/log"
"""Where kdguard's app shows the log of a gated server."""

_PROMPTS = f"tags.`{IS_PROMPT_TAG_KEY}` = 'true'"
_PAGE, _LOG_PAGE = 1000, 100
_NO_STAGE = "None"
_CHAINED = ("models:", "runs:")
_FOLDERS = 10
"""Folders of one version that are looked into; more tell nothing new about its format."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A registered model: its aliases with their versions, and the version that each stage names.

    `prompt` is whether somebody marked it as one.
    """

    name: str
    aliases: Mapping[str, str]
    stages: Mapping[str, str]
    prompt: bool


@dataclass(frozen=True, slots=True)
class Version:
    """A version, as far as a listing tells; `stage` is empty where it has none."""

    name: str
    version: str
    source: str
    stage: str
    tags: Mapping[str, str]


def workspaces(connection: Connection) -> tuple[str, ...]:
    """The workspaces to look at: the active one (MLFLOW_WORKSPACE), else all that there are.

    A registry without workspaces is the workspace `default` and nothing else.
    """
    with connection.answering("say whether it has workspaces"):
        if not getattr(_registry(connection).store, "supports_workspaces", False):
            return (DEFAULT_WORKSPACE,)
        active = get_request_workspace()
        return (active,) if active else tuple(w.name for w in connection.client.list_workspaces())


def active_workspace() -> str:
    """The workspace that MLflow's clients speak of here; `default` where nobody chose one."""
    return get_request_workspace() or DEFAULT_WORKSPACE


@contextmanager
def inside(workspace: str) -> Iterator[None]:
    """Within the block, MLflow's clients speak of one workspace."""
    if workspace == DEFAULT_WORKSPACE and not get_request_workspace():
        yield  # servers without workspaces refuse one that is named
        return
    with WorkspaceContext(workspace):
        yield


def models(connection: Connection) -> Iterator[Listed]:
    """Every registered model of the workspace, by name; prompts that hold artifacts, too."""
    for condition, prompt in ((None, False), (_PROMPTS, True)):
        for model in _paged(connection.client.search_registered_models, connection, condition):
            yield _listed(model, prompt)


def versions(connection: Connection) -> Iterator[Version]:
    """Every version of the workspace, those of prompts left out, by name."""
    for found in _paged(connection.client.search_model_versions, connection, None):
        if not is_prompt(found):
            stage = str(found.current_stage or "")
            yield Version(
                name=str(found.name),
                version=str(found.version),
                source=str(found.source),
                stage="" if stage == _NO_STAGE else stage,
                tags=dict(found.tags),
            )


def location(connection: Connection, version: Version) -> str:
    """The URI that a version's bytes finally lie under; the registry is asked where need be."""
    if not version.source.startswith(_CHAINED):
        return version.source
    with connection.answering(f"locate version {version.version} of {version.name}"):
        client = connection.client
        return str(client.get_model_version_download_uri(version.name, version.version))


def file_names(connection: Connection, location: str) -> tuple[str, ...]:
    """Names of the files at a location, down to the folders directly below it; nothing is read.

    Raises RegistryError where they cannot be listed, also where they are not on this machine.
    """
    with connection.answering(f"list {location}"):
        local = urlsplit(location).scheme in ("", "file")
        store = LocalArtifactRepository(location) if local else store_at(connection, location)
        found = store.list_artifacts()
        if local and not found:
            raise RegistryError(f"there is nothing at {location} on this machine.")
        folders = [item.path for item in found if item.is_dir][:_FOLDERS]
        below = [item for folder in folders for item in store.list_artifacts(folder)]
        return tuple(sorted(item.path for item in [*found, *below] if not item.is_dir))


def alias(connection: Connection, name: str, alias: str) -> str | None:
    """The version that an alias stands for now; None where the model or the alias is not there."""
    with connection.answering(f"read the aliases of {name}"):
        try:
            found = _registry(connection).get_registered_model(name).aliases.get(alias)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
    return None if found is None else str(found)


def is_prompt(version: ModelVersion) -> bool:
    """Whether a version is a prompt's text, which has no artifacts."""
    return str(version.source) in _PROMPT_SOURCE_PLACEHOLDERS


def is_text(connection: Connection, name: str, version: str) -> bool:
    """Whether this version of a model that is marked as a prompt is one indeed."""
    with connection.answering(f"find version {version} of {name}"):
        return is_prompt(_registry(connection).get_model_version(name, version))


def _registry(connection: Connection) -> Any:
    """MLflow's client below its public one, which denies that a model marked as a prompt exists."""
    return connection.client._get_registry_client()  # type: ignore[no-untyped-call]


def log_entries(connection: Connection) -> list[dict[str, Any]] | None:
    """The whole log of a gated server with kdguard's app, the oldest entry first.

    None where the registry is no server or shows no log. Raises RegistryError where it refuses.
    """
    uri = connection.registry_uri.removeprefix("kdguard+")
    if not uri.startswith(("http://", "https://")):
        return None
    found: list[dict[str, Any]] = []
    before: int | None = None
    with connection.answering("show its log"):
        while True:
            page = _log_page(uri, before)
            if page is None:
                return None
            found += page["entries"]
            before = page["next"]
            if before is None or before <= 1:
                return found[::-1]


def _log_page(uri: str, before: int | None) -> dict[str, Any] | None:
    asked = {"limit": _LOG_PAGE} | ({} if before is None else {"before": before})
    creds = get_default_host_creds(uri)  # type: ignore[no-untyped-call]
    answer = http_request(creds, LOG, "GET", params=asked, raise_on_status=False)  # type: ignore[no-untyped-call]
    if answer.status_code in (404, 405):
        return None
    if not answer.ok:
        raise RegistryError(f"the server does not show its log: {answer.text[:500]}")
    page: dict[str, Any] = answer.json()
    return page


def _paged(search: Any, connection: Connection, condition: str | None) -> Iterator[Any]:
    token: str | None = None
    while True:
        with connection.answering("list what is registered"):
            page = search(
                filter_string=condition,
                max_results=_PAGE,
                order_by=["name ASC"],
                page_token=token,
            )
        yield from page
        token = page.token
        if not token:
            return


def _listed(model: RegisteredModel, prompt: bool) -> Listed:
    named = [v for v in model.latest_versions if v.current_stage not in (None, _NO_STAGE)]
    return Listed(
        name=str(model.name),
        aliases={str(alias): str(version) for alias, version in sorted(model.aliases.items())},
        stages={str(v.current_stage): str(v.version) for v in named},
        prompt=prompt,
    )
