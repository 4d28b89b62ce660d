"""The files that a guarded model may consist of, and nothing that could serve another model.

With `model.onnx` untouched, an MLmodel whose flavours name another file, another loader or a code
folder serves whatever it likes (`docs/threat-model.md`). A guarded bundle is therefore the ONNX
file, an MLmodel that can load only that, and files that list known requirements. MLflow is not
needed to say so.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow_kdguard import plain_yaml
from mlflow_kdguard.errors import ModelError, UnsafeModelError, UsageError
from mlflow_kdguard.files import read_bytes, sha256

MODEL, MLMODEL = "model.onnx", "MLmodel"
REQUIREMENTS, CONDA, PYTHON_ENV = "requirements.txt", "conda.yaml", "python_env.yaml"
NEEDED = frozenset({MODEL, MLMODEL})
ALLOWED = NEEDED | {REQUIREMENTS, CONDA, PYTHON_ENV}

PACKAGES = frozenset({"mlflow", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu"})
"""What serving a guarded model may install."""

_BUILD = frozenset({"python", "pip", "setuptools", "wheel"})
_PROVIDERS = frozenset({"CPUExecutionProvider", "CUDAExecutionProvider"})
_LARGEST_TEXT = 1 << 16
_LARGEST_FILE = 2 << 30
_REQUIREMENT = re.compile(
    r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:(?:==|<=|>=|~=|<|>|=)[A-Za-z0-9.+!*-]+)?"
)
_REMEDY = "Register the student again; `kdguard` writes the bundle itself."

_FLAVOURS: dict[str, dict[str, Any]] = {
    "onnx": {"data": MODEL},
    "python_function": {"data": MODEL, "loader_module": "mlflow.onnx"},
}
_FREE = {"onnx": {"onnx_version", "providers"}, "python_function": {"python_version", "env"}}
_TOP = {
    "flavors", "signature", "metadata", "mlflow_version", "model_size_bytes", "model_uuid",
    "utc_time_created",
}  # fmt: skip


def read(folder: Path) -> dict[str, bytes]:
    """All files below `folder`, by relative path with slashes.

    Raises UsageError where it cannot be read, UnsafeModelError at a link or a special file.
    """
    if not folder.is_dir() or folder.is_symlink():
        raise UsageError(f"{folder} is not a folder.", remedy="Name the folder of a model.")
    return {
        path.relative_to(folder).as_posix(): read_bytes(path, what="the model's file")
        for path in _plain_files(folder)
    }


def check(files: Mapping[str, bytes], *, digest: str | None = None) -> None:
    """Refuse a bundle that could serve anything but its `model.onnx`.

    `digest` is that file's SHA-256, where the caller has taken it already.
    Raises ModelError for a file that is missing, UnsafeModelError naming the file and the key for
    everything else: an additional file, a redirected flavour, code, an unknown requirement.
    """
    if missing := sorted(NEEDED - files.keys()):
        raise ModelError(f"the bundle lacks {', '.join(missing)}.", remedy=_REMEDY)
    if extra := sorted(files.keys() - ALLOWED):
        raise _unsafe(f"the bundle holds {extra[0]!r}, which no check covers")
    for name in sorted(files.keys() - {MODEL}):
        if len(files[name]) > _LARGEST_TEXT:
            raise _unsafe(f"{name} has {len(files[name])} bytes, more than {_LARGEST_TEXT}")
    _check_mlmodel(_mapping(files[MLMODEL], MLMODEL), files, digest or sha256(files[MODEL]))
    _check_requirements(files)


def _plain_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise _unsafe(f"{path} is a link or a special file")
        if path.is_dir():
            yield from _plain_files(path)
        elif path.stat().st_size > _LARGEST_FILE:
            raise _unsafe(f"{path} has more than {_LARGEST_FILE} bytes")
        else:
            yield path


def _check_mlmodel(body: dict[str, Any], files: Mapping[str, bytes], digest: str) -> None:
    _refuse_unknown(body, _TOP, MLMODEL)
    flavours = body.get("flavors")
    if not isinstance(flavours, dict) or flavours.keys() != _FLAVOURS.keys():
        raise _unsafe(f"{MLMODEL} must have exactly the flavours {', '.join(_FLAVOURS)}")
    for flavour, expected in _FLAVOURS.items():
        _check_flavour(flavours[flavour], flavour, expected)
    _check_providers(flavours["onnx"].get("providers"))
    _check_env(flavours["python_function"].get("env"), files)
    metadata = body.get("metadata")
    if metadata is not None:
        _check_metadata(metadata, digest)


def _check_flavour(entries: Any, flavour: str, expected: dict[str, Any]) -> None:
    where = f"{MLMODEL}: flavors.{flavour}"
    if not isinstance(entries, dict):
        raise _unsafe(f"{where} is not a mapping")
    _refuse_unknown(entries, expected.keys() | _FREE[flavour], where)
    for key, value in expected.items():
        if entries.get(key) != value:
            raise _unsafe(f"{where}.{key} is {entries.get(key)!r}, not {value!r}")


def _check_providers(providers: Any) -> None:
    names = providers if isinstance(providers, list) else [providers]
    if providers is not None and not all(isinstance(n, str) and n in _PROVIDERS for n in names):
        raise _unsafe(f"{MLMODEL}: flavors.onnx.providers is {providers!r}")


def _check_env(env: Any, files: Mapping[str, bytes]) -> None:
    """The environment may only be described by the bundle's own, checked files."""
    if env is None:
        return
    wanted = {"conda": CONDA, "virtualenv": PYTHON_ENV}
    if not isinstance(env, dict) or any(wanted.get(key) != value for key, value in env.items()):
        raise _unsafe(f"{MLMODEL}: flavors.python_function.env is {env!r}")
    for name in env.values():
        if name not in files:
            raise _unsafe(f"{MLMODEL} names {name}, which is not in the bundle")


def _check_metadata(metadata: Any, digest: str) -> None:
    ours = metadata.get("kdguard") if isinstance(metadata, dict) else None
    if not isinstance(ours, dict) or metadata.keys() != {"kdguard"}:
        raise _unsafe(f"{MLMODEL}: metadata may hold `kdguard` only")
    if ours.get("sha256") != digest:
        raise _unsafe(f"{MLMODEL} was made for the model {ours.get('sha256')!r}, not {digest}")


def _check_requirements(files: Mapping[str, bytes]) -> None:
    if REQUIREMENTS in files:
        lines = _text(files[REQUIREMENTS], REQUIREMENTS).splitlines()
        _known((line for line in lines if line.strip()), PACKAGES, REQUIREMENTS)
    if CONDA in files:
        _check_conda(_mapping(files[CONDA], CONDA))
    if PYTHON_ENV in files:
        body = _mapping(files[PYTHON_ENV], PYTHON_ENV)
        _refuse_unknown(body, {"python", "build_dependencies", "dependencies"}, PYTHON_ENV)
        _known(_list(body.get("build_dependencies"), PYTHON_ENV), _BUILD, PYTHON_ENV)
        if body.get("dependencies") not in (None, [], [f"-r {REQUIREMENTS}"]):
            raise _unsafe(f"{PYTHON_ENV}: dependencies may only name {REQUIREMENTS}")


def _check_conda(body: dict[str, Any]) -> None:
    _refuse_unknown(body, {"name", "channels", "dependencies"}, CONDA)
    if body.get("channels") not in (None, ["conda-forge"]):
        raise _unsafe(f"{CONDA}: channels are {body.get('channels')!r}, not conda-forge")
    for item in _list(body.get("dependencies"), CONDA):
        if isinstance(item, dict):
            _refuse_unknown(item, {"pip"}, CONDA)
            _known(_list(item.get("pip"), CONDA), PACKAGES, CONDA)
        else:
            _known([item], _BUILD, CONDA)


def _known(items: Iterable[Any], names: frozenset[str], where: str) -> None:
    """Every item is a plain requirement of a known package: no URL, no option, no index."""
    for item in items:
        found = _REQUIREMENT.fullmatch(item.strip()) if isinstance(item, str) else None
        if found is None or found[1].lower().replace("_", "-") not in names:
            raise _unsafe(f"{where} requires {item!r}, which serving does not need")


def _refuse_unknown(body: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """A key that is not known must say nothing (null, false): MLflow writes several of those."""
    for key in body.keys() - set(known):
        if body[key] is not None and body[key] is not False:
            raise _unsafe(f"{where} holds the key {key!r}")


def _list(value: Any, where: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise _unsafe(f"{where} is not one that MLflow writes")
    return value


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _unsafe(f"{where} is not text") from error


def _mapping(data: bytes, where: str) -> dict[str, Any]:
    try:
        body = plain_yaml.parse(_text(data, where))
    except ValueError as error:
        raise _unsafe(f"{where} is not plain YAML: {error}") from error
    if not isinstance(body, dict):
        raise _unsafe(f"{where} is not a mapping")
    return body


def _unsafe(why: str) -> UnsafeModelError:
    return UnsafeModelError(f"{why}.", remedy=_REMEDY)
