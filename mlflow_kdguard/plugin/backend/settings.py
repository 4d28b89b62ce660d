"""The backend's configuration: what the caller of `mlflow run` grants, and the limits.

No project can set any of this; `mlflow run` takes it as `--backend-config FILE.json`.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError

from mlflow_kdguard.config import Section, explain
from mlflow_kdguard.errors import ConfigError

_MLFLOW = frozenset(
    {"ENV_MANAGER", "SYNCHRONOUS", "DOCKER_ARGS", "STORAGE_DIR", "build_image", "docker_auth"}
)
"""What MLflow itself puts among the backend's configuration."""

_NOT_OURS = {"DOCKER_ARGS": "--docker-args", "build_image": "--build-image"}

Seconds = Annotated[float, Field(gt=0)]
MiB = Annotated[int, Field(ge=64)]


class Limits(Section):
    """How long a process may run and how much memory it may hold; null is without a limit."""

    seconds: Seconds | None = Field(None, description="wall time of the process, start included")
    memory_mib: MiB | None = Field(None, description="resident memory with its children, in MiB")


class BackendConfig(Section):
    """The file behind `--backend-config`; docs/how-to/mlflow-run.md describes every key."""

    work_dir: str = Field("kdguard-work", min_length=1, description="folder that a run goes on in")
    teacher: Limits = Field(
        Limits(seconds=600.0, memory_mib=8192), description="the process that loads the teacher"
    )
    stages: Limits = Field(Limits(), description="every other process")
    grace_seconds: Seconds = Field(20.0, description="time to stop before a process is killed")
    policy: str | None = Field(None, description="the operator's policy; default: the packaged one")
    key: str | None = Field(None, description="signing key; default: one made in work_dir")
    verifier_key: str | None = Field(
        None, description="verifier's key: the student is measured again as `kdguard verify` does"
    )
    pins: tuple[str, ...] = Field((), description="evaluation data accepted: SHA-256 or data URI")
    require_triggers: tuple[str, ...] = Field(
        (), description="triggers that must have been measured: FILE[:CLASS] or SHA256[:CLASS]"
    )
    allow_unpinned: bool = Field(False, description="accept figures on data that nobody pinned")
    trust_code: bool = Field(False, description="allow architectures `package.module:factory`")
    download: bool = Field(False, description="allow torchvision to download data")


def read(values: Mapping[str, Any]) -> BackendConfig:
    """The configuration that MLflow hands on, its own keys left out.

    Raises ConfigError naming every wrong key.
    """
    asked = [flag for key, flag in _NOT_OURS.items() if values.get(key)]
    manager = values.get("ENV_MANAGER")
    if manager not in (None, "local"):
        asked.append(f"--env-manager {manager}")
    if asked:
        raise ConfigError(
            f"the kdguard backend runs stages in this environment, so {', '.join(asked)} cannot "
            "be honoured.",
            remedy="Start `mlflow run` inside the environment or image that the stages need.",
        )
    try:
        return BackendConfig.model_validate({k: v for k, v in values.items() if k not in _MLFLOW})
    except ValidationError as error:
        raise ConfigError(
            f"--backend-config: {explain(error)}", remedy="See docs/how-to/mlflow-run.md."
        ) from error
