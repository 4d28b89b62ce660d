"""Where the files of a configuration are, once the folder that it was started in is left."""

from pathlib import Path
from typing import Any

from mlflow_kdguard.config import GuardConfig
from mlflow_kdguard.data.uri import parse, quote
from mlflow_kdguard.triggers import aimed


def anchored(config: GuardConfig) -> GuardConfig:
    """The same configuration with absolute paths, to be continued from any folder."""
    data, redteam, registry = config.data, config.redteam, config.registry
    changes: dict[str, Any] = {
        "run": {"work_dir": _path(config.run.work_dir)},
        "data": {key: _uri(getattr(data, key)) for key in ("transfer", "clean", "test")}
        | {"root": _path(data.root)},
        "teacher": {"model": _path(config.teacher.model)},
        "audit": {"calibration": _path(config.audit.calibration)},
        "measure": {"triggers": tuple(map(_trigger, config.measure.triggers))},
        "registry": {
            "tracking_uri": _store(registry.tracking_uri),
            "registry_uri": _store(registry.registry_uri),
        },
    }
    if redteam is not None:
        changes["redteam"] = {"train": _uri(redteam.train)}
    return config.model_copy(
        update={key: getattr(config, key).model_copy(update=new) for key, new in changes.items()}
    )


def _path(text: str | None) -> str | None:
    if text is None or text.startswith("models:/"):
        return text
    return str(Path(text).absolute())


def _uri(uri: str) -> str:
    request = parse(uri)
    if request.path is None or request.path.is_absolute():
        return uri
    rest = uri.removeprefix(f"{request.name}:")
    return f"{request.name}:{quote(Path.cwd())}/{rest}"


def _trigger(text: str) -> str:
    path, target = aimed(text)
    return f"{path.absolute()}:{target}"


def _store(uri: str | None) -> str | None:
    prefix, file = "sqlite:///", (uri or "").removeprefix("sqlite:///")
    if uri is None or not uri.startswith(prefix) or file[:1] in ("", "/", ":"):
        return uri
    return f"{prefix}{Path.cwd()}/{file}"
