"""Networks from untrusted files, and back to files. Nothing in a file is ever executed.

`.onnx` needs nothing else; `.safetensors` and a weights-only `.pt` need an architecture, given or
found beside the file as `architecture.json`.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mlflow_kdguard import graph
from mlflow_kdguard.errors import ModelError, UnsafeModelError, UsageError
from mlflow_kdguard.files import canonical_json, read_bytes, write_bytes
from mlflow_kdguard.nets import advice, architecture, checkpoints, convert, zoo
from mlflow_kdguard.nets.advice import conversion_advice
from mlflow_kdguard.nets.architecture import Architecture

__all__ = ["ARCHITECTURE", "WEIGHTS", "conversion_advice", "load", "loads", "save"]

WEIGHTS = "weights.safetensors"
ARCHITECTURE = "architecture.json"

_TORCH = (".pt", ".pth", ".ckpt", ".bin")
_PICKLES = (".pkl", ".pickle", ".joblib", ".dill", ".cloudpickle")


def load(
    path: Path, *, architecture: Architecture | None = None, trust_code: bool = False
) -> nn.Module:
    """The network in a file, in eval mode.

    Raises UsageError where the path or the architecture is missing; UnsafeModelError where loading
    would run code; NonFiniteError for NaN or infinity; ModelError for damaged, foreign or
    ill-fitting files.
    """
    if path.is_file() and not path.stat().st_size:
        raise ModelError(f"the model {path} is empty.", remedy="Name the file that was meant.")
    if path.is_dir():
        raise ModelError(f"{path} is a folder.", remedy=f"Name the file in it, such as {WEIGHTS}.")
    data = read_bytes(path, what="the model")
    beside = path.parent / ARCHITECTURE
    if architecture is None and path.suffix.lower() != ".onnx" and beside.is_file():
        architecture = _record(beside)
    return loads(data, name=str(path), architecture=architecture, trust_code=trust_code)


def loads(
    data: bytes, *, name: str, architecture: Architecture | None = None, trust_code: bool = False
) -> nn.Module:
    """The network in a file's bytes; `name` is its path, whose suffix says what it is."""
    suffix = Path(name).suffix.lower()
    if suffix == ".onnx":
        return _from_onnx(data, name, architecture)
    if suffix in _PICKLES:
        raise UnsafeModelError(
            f"{name} is a pickle; loading it would run code.", remedy=advice.remedy(name)
        )
    if suffix != ".safetensors" and suffix not in _TORCH:
        known = ", ".join((".onnx", ".safetensors", *_TORCH))
        raise ModelError(f"{name}: unknown kind of model file.", remedy=f"Known: {known}.")
    read = checkpoints.from_safetensors if suffix == ".safetensors" else checkpoints.from_torch
    tensors = read(data, where=name)
    if architecture is None:
        raise UsageError(
            f"{name} holds weights only, and nothing says of which architecture.",
            remedy=f"Give --arch, or put {ARCHITECTURE} beside it.",
        )
    net = zoo.build(architecture, seed=0, trust_code=trust_code)
    _fill(net, tensors, name)
    return net.eval()


def save(net: nn.Module, folder: Path) -> None:
    """Write `weights.safetensors` and `architecture.json`; the same weights give the same bytes.

    Raises UsageError for a network that these two files cannot bring back: export that to ONNX.
    """
    from safetensors.torch import save as to_bytes

    if not isinstance(net, zoo.Classifier) or _altered(net):
        raise UsageError(
            f"{type(net).__name__} was not built by the zoo, or layers were added to it since.",
            remedy="Export it as ONNX, which carries its structure.",
        )
    tensors = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    write_bytes(folder / WEIGHTS, to_bytes(tensors))
    write_bytes(folder / ARCHITECTURE, canonical_json(net.architecture.document()) + b"\n")


def _altered(net: zoo.Classifier) -> bool:
    if ":" in net.architecture.arch and not net.architecture.arch.startswith(zoo.FAMILIES):
        return False
    fresh = zoo.build(net.architecture, seed=0).state_dict()
    return {name: value.shape for name, value in fresh.items()} != {
        name: value.shape for name, value in net.state_dict().items()
    }


def _record(path: Path) -> Architecture:
    return architecture.parse(read_bytes(path, what="the architecture"), where=str(path))


def _from_onnx(data: bytes, name: str, expected: Architecture | None) -> nn.Module:
    read = graph.read(data, where=name, require_clip=False)
    if expected is not None and (read.input_shape, read.classes) != (
        expected.shape,
        expected.classes,
    ):
        raise ModelError(
            f"{name} takes images {read.input_shape} to {read.classes} classes, not "
            f"{expected.shape} to {expected.classes}.",
            remedy="Name the data that the model was trained for.",
        )
    return convert.to_torch(read)


def _fill(net: zoo.Classifier, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy weights into place; those of a bare body, without the classifier around it, also fit."""
    whole = any(name.startswith("body.") for name in tensors)
    target = net.state_dict() if whole else net.body.state_dict()
    optional = {name for name in target if name.endswith("num_batches_tracked")}
    missing = sorted(set(target) - set(tensors) - optional)
    unexpected = sorted(set(tensors) - set(target))
    shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(target[name].shape)}"
        for name in sorted(set(target) & set(tensors))
        if tensors[name].shape != target[name].shape
    ]
    problems = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    wrong = "; ".join(f"{what}: {_first(names)}" for what, names in problems if names)
    if wrong:
        raise ModelError(
            f"{where} does not fit architecture {net.architecture.arch}: {wrong}.",
            remedy="Name the architecture that these weights were trained in (--arch).",
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            target[name].copy_(tensor)
    _check_normalisation(net, where)


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_normalisation(net: zoo.Classifier, where: str) -> None:
    for name in ("mean", "std"):
        stated = torch.tensor(getattr(net.architecture, name)).reshape(-1, 1, 1)
        if not torch.allclose(getattr(net, name), stated, atol=1e-6):
            raise ModelError(
                f"{where} normalises by another {name} than the architecture states.",
                remedy="Use the architecture record that was saved with these weights.",
            )
