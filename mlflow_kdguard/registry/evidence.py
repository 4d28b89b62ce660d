"""What a student is held against, stored so that a verifier in another place finds it.

The files lie below the student's own run, beside the version and not in it; the version names
their place in a tag. A tag is anybody's word: a place outside that run is not even asked, and
whoever reads the files holds them against digests.
"""

import re
from collections.abc import Mapping

from mlflow_kdguard.errors import UnsafeModelError
from mlflow_kdguard.registry import bundle
from mlflow_kdguard.registry.runs import Run
from mlflow_kdguard.registry.versions import Versions

EVIDENCE = "kdguard.evidence"
"""Tag of a version: the artifact URI of its evidence."""

_FOLDER = "evidence"
_PLACE = re.compile(rf"/{_FOLDER}/[0-9a-f]{{16}}")


def store(versions: Versions, files: Mapping[str, bytes], *, run: Run) -> str:
    """Store the files below `run`; their artifact URI, which follows from their digest."""
    place = f"{_FOLDER}/{bundle.bundle_digest(files)[:16]}"
    versions.upload(files, run, place)
    return f"{run.artifact_uri}/{place}"


def fetch(versions: Versions, uri: str, *, limit: int) -> dict[str, bytes] | None:
    """The files that the version at `uri` names as its evidence; None where it names none.

    Raises UnsafeModelError where the named place is not below the version's own run, before it is
    asked, RegistryError where MLflow does not answer.
    """
    version = versions.find(uri)
    source = version.tags.get(EVIDENCE)
    if source is None:
        return None
    root = versions.run_of(version).artifact_uri.rstrip("/") if version.run_id else ""
    if not (root and source.startswith(root) and _PLACE.fullmatch(source[len(root) :])):
        raise UnsafeModelError(
            f"{uri} names evidence at {source!r}, outside the version's own run.",
            remedy="Name the files yourself (--teacher, --reference).",
        )
    return versions.fetch(source, limit)
