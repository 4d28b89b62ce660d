"""What MODEL on the command line stands for: a file, or models:/name/version or @alias."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow_kdguard.data import Dataset


@dataclass(frozen=True, slots=True)
class Opened:
    """A model file on disk; nothing of it is executed."""

    path: Path
    sha256: str
    architecture: Any
    trust_code: bool

    def net(self) -> Any:
        """The torch network."""
        from mlflow_kdguard.nets import load

        return load.load(self.path, architecture=self.architecture, trust_code=self.trust_code)

    def onnx(self) -> bytes:
        """The ONNX bytes; UsageError where the file is something else."""
        from mlflow_kdguard.errors import UsageError
        from mlflow_kdguard.files import read_bytes

        if self.path.suffix != ".onnx":
            raise UsageError(
                f"{self.path} is not an ONNX file.", remedy="Make one with `kdguard export`."
            )
        return read_bytes(self.path, what="the model")


def opened(
    text: str, flags: dict[str, Any], shown: "Dataset | None" = None, *, onnx: bool = False
) -> Opened:
    """Find MODEL; a registered one is downloaded as raw bytes, with `onnx` its ONNX file."""
    from mlflow_kdguard.files import read_bytes, sha256

    path = _fetched(text, flags, onnx) if text.startswith("models:/") else Path(text)
    digest = sha256(read_bytes(path, what="the model"))
    return Opened(path, digest, _architecture(flags, shown), bool(flags.get("trust_code")))


def _fetched(text: str, flags: dict[str, Any], onnx: bool) -> Path:
    import tempfile

    import click

    from mlflow_kdguard.config import RegistrySection
    from mlflow_kdguard.registry import Registry

    section = RegistrySection(
        tracking_uri=flags.get("tracking_uri"), registry_uri=flags.get("registry_uri")
    )
    folder = click.get_current_context().with_resource(
        tempfile.TemporaryDirectory(prefix="kdguard-")
    )
    return Registry(section).fetch(text, Path(folder), onnx=onnx)


def _architecture(flags: dict[str, Any], shown: "Dataset | None") -> Any:
    if shown is None or not flags.get("arch"):
        return None
    from pydantic import ValidationError

    from mlflow_kdguard.config import explain
    from mlflow_kdguard.errors import UsageError
    from mlflow_kdguard.nets.architecture import Architecture

    given = {key: flags[key] for key in ("mean", "std") if flags.get(key)}
    try:
        return Architecture(arch=flags["arch"], shape=shown.shape, classes=shown.classes, **given)
    except ValidationError as error:
        raise UsageError(f"--arch, --mean, --std: {explain(error)}") from error
