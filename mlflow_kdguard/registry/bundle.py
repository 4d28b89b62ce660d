"""What a model version holds: files as bytes. Nothing in this file executes any of them.

A guarded student's bundle is what `mlflow_kdguard.bundle` allows, and follows from the ONNX bytes
and the installed versions alone: no time, no run and no random number is in it, so that anybody
can make it again and compare (`docs/threat-model.md`, 11).
"""

import importlib.metadata
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnx
from mlflow.models import Model as MLmodel
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from mlflow_kdguard.artifacts import (
    ADDED_BY_CLIENT,
    CERTIFICATE,
    LARGEST,
    MOST_FILES,
    bundle_digest,
    digests,
    read_folder,
    too_large,
    without_mark,
)
from mlflow_kdguard.bundle import ALLOWED, MODEL
from mlflow_kdguard.errors import ModelError, RegistryError, UsageError
from mlflow_kdguard.files import sha256, write_bytes

__all__ = [
    "ADDED_BY_CLIENT",
    "ARCHITECTURE",
    "CERTIFICATE",
    "LARGEST",
    "MOST_FILES",
    "WEIGHTS",
    "Bundle",
    "bundle_digest",
    "digests",
    "from_path",
    "read_folder",
    "student_files",
    "too_large",
    "without_mark",
    "write",
]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MLflow warns about type hints of its own when imported
    import mlflow.onnx
    import mlflow.pyfunc

WEIGHTS, ARCHITECTURE = "weights.safetensors", "architecture.json"

_LOADABLE = (".safetensors", ".onnx", ".pt")  # in the order in which a teacher is read
_NO_TIME = "1970-01-01 00:00:00"


@dataclass(frozen=True, slots=True)
class Bundle:
    """The files of one model version or folder, in memory.

    `uri` is `models:/name/version` with the version that an alias stood for, or the path;
    `name`, `version` and `run_id` are None for a path.
    """

    uri: str
    files: Mapping[str, bytes]
    name: str | None = None
    version: str | None = None
    run_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every file, by path."""
        return digests(self.files)

    @property
    def onnx(self) -> bytes:
        """The one ONNX file, whatever MLmodel says; ModelError where there is none or several."""
        return self.files[self._only(".onnx")]

    @property
    def main(self) -> str:
        """Path of the file to read a teacher from: safetensors, else ONNX, else weights-only .pt.

        Raises ModelError with what the bundle holds where there is no such file.
        """
        for suffix in _LOADABLE:
            if any(path.endswith(suffix) for path in self.files):
                return self._only(suffix)
        return self._only(".onnx")

    def certificate(self) -> bytes | None:
        """The signed certificate that the version carries; None where there is none."""
        text = self.tags.get(CERTIFICATE)
        return None if text is None else text.encode()

    def _only(self, suffix: str) -> str:
        found = [path for path in self.files if path.endswith(suffix)]
        if len(found) == 1:
            return found[0]
        raise ModelError(
            f"{self.uri} holds {len(found)} files *{suffix} among {', '.join(sorted(self.files))}.",
            remedy="See `kdguard teacher import` for how to store a model safely.",
        )


def student_files(data: bytes) -> dict[str, bytes]:
    """The bundle of an exported network, with `model.onnx` byte for byte as given.

    No input example is stored: it would add files that nothing checks, and show somebody's data.
    Raises ModelError where `data` is not an ONNX classifier of N×C×H×W images.
    """
    model = _parsed(data)
    digest = sha256(data)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model"
        mlflow.onnx.save_model(
            model,
            str(place),
            mlflow_model=MLmodel(utc_time_created=_NO_TIME, model_uuid=digest[:32]),
            signature=_signature(model),
            pip_requirements=_requirements(),
            onnx_execution_providers=["CPUExecutionProvider"],
            save_as_external_data=False,
            metadata={"kdguard": {"sha256": digest, "range": [0.0, 1.0]}},
        )
        (place / MODEL).write_bytes(data)  # MLflow serialises it anew, which may change its bytes
        files = read_folder(place)
    if set(files) != ALLOWED:
        raise RegistryError(f"MLflow {mlflow.__version__} made another bundle: {sorted(files)}.")
    return files


def write(files: Mapping[str, bytes], folder: Path) -> None:
    """Write a bundle's files under `folder`."""
    for path, data in files.items():
        write_bytes(folder / path, data)


def from_path(path: Path, *, limit: int) -> Bundle:
    """The bundle of a folder, or of one file; UsageError where it cannot be read."""
    try:
        if path.is_dir():
            files = read_folder(path, limit=limit)
            files.pop(ADDED_BY_CLIENT, None)
            return Bundle(uri=str(path), files=files)
        if not path.is_file():
            raise UsageError(f"there is no model at {path}.", remedy="Check the path.")
        if path.stat().st_size > limit:
            raise too_large(str(path), limit)
        return Bundle(uri=str(path), files={path.name: path.read_bytes()})
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}.") from error


def _parsed(data: bytes) -> onnx.ModelProto:
    try:
        model = onnx.load_model_from_string(data)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's and onnx's errors share no base
        reason = (str(error).strip().splitlines() or ["it is malformed"])[0]
        raise ModelError(f"the ONNX file cannot be registered: {reason}") from error
    return model


def _signature(model: onnx.ModelProto) -> ModelSignature:
    return ModelSignature(
        inputs=Schema([_spec(model.graph.input, 4)]), outputs=Schema([_spec(model.graph.output, 2)])
    )


def _spec(values: Any, rank: int) -> TensorSpec:
    shapes = [[d.dim_value or -1 for d in v.type.tensor_type.shape.dim] for v in values]
    if len(shapes) != 1 or len(shapes[0]) != rank or -1 in shapes[0][1:]:
        raise ModelError(
            f"the ONNX file has the shapes {shapes} where one tensor of rank {rank} is needed.",
            remedy="Export a classifier of N×C×H×W images with fixed C, H, W and classes.",
        )
    return TensorSpec(np.dtype(np.float32), (-1, *shapes[0][1:]), name=values[0].name)


def _requirements() -> list[str]:
    """What serving needs, pinned to what the figures are taken with."""
    names = ["mlflow", "numpy", "onnx", _runtime()]
    return [f"{name}=={importlib.metadata.version(name)}" for name in names]


def _runtime() -> str:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name
    raise RegistryError("onnxruntime is not installed.", remedy="Install mlflow-kdguard[all].")
