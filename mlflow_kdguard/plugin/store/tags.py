"""Which tags a client may write: most of `kdguard.*` is the server's word, or the builder's."""

from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from mlflow.prompt.constants import IS_PROMPT_TAG_KEY

from mlflow_kdguard.artifacts import CERTIFICATE, DECISION, OVERRIDE, REASON
from mlflow_kdguard.policy import guarded_name

OURS, PROMPT = "kdguard.", "mlflow.prompt."
_CLIENTS = frozenset({CERTIFICATE, OVERRIDE})
_SERVER = (DECISION, REASON, "kdguard.server")


def ours(key: object) -> bool:
    """Whether a reader takes this key for one of kdguard's, however it is spelled."""
    return isinstance(key, str) and guarded_name(key).startswith(OURS)


def prompts(key: object) -> bool:
    """Whether the key says that something is a prompt, or what it says."""
    return isinstance(key, str) and guarded_name(key).startswith(PROMPT)


def marks_prompts(key: object) -> bool:
    """Whether the key decides if something is a prompt."""
    return isinstance(key, str) and guarded_name(key) == guarded_name(IS_PROMPT_TAG_KEY)


def objection(key: object) -> str | None:
    """Why a client may not change this tag of a version that exists; None where it may."""
    if not ours(key) or key in _CLIENTS:
        return None
    return f"tags: {key!r} is not a client's to write; only {CERTIFICATE} and {OVERRIDE} are."


def at_creation(tags: Iterable[Any] | None, source: object) -> tuple[list[Any], list[str]]:
    """The tags that a new version may have, and why others may not be given to it.

    What the server said about another version travels with MLflow's copy_model_version, and says
    nothing about the copy: there it is left out.
    """
    copied = isinstance(source, str) and urlsplit(source).scheme == "models"
    kept, problems = [], []
    for tag in tags or ():
        if not ours(tag.key) or _is_builders(tag.key):
            kept.append(tag)
        elif not (copied and tag.key.startswith(_SERVER)):
            problems.append(f"tags: {tag.key!r} is the server's to write.")
    return kept, problems


def _is_builders(key: str) -> bool:
    return key.startswith(OURS) and not guarded_name(key).startswith(_SERVER)
