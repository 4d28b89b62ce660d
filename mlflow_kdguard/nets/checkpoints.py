"""Untrusted bytes -> named tensors, executing nothing.

safetensors, and what torch.load reads with `weights_only=True`. Everything else is refused: a
pickle is a program, and so is a TorchScript archive.
"""

import io
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from mlflow_kdguard.errors import ModelError, NonFiniteError, UnsafeModelError
from mlflow_kdguard.nets import advice

Tensors = dict[str, Tensor]

_NESTS = ("state_dict", "model_state_dict", "model", "net", "weights")
"""Keys under which training scripts keep the weights."""
_PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every key."""
_DAMAGED = "Copy the file again: it is truncated or damaged."


def from_safetensors(data: bytes, *, where: str) -> Tensors:
    """The tensors of a safetensors file; ModelError for a header that lies or is cut off."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    unsafe = UnsafeModelError(
        f"{where} is called safetensors and is a pickle or an archive.",
        remedy=advice.remedy(where),
    )
    if zipfile.is_zipfile(io.BytesIO(data)):
        raise unsafe
    try:
        return checked(load(data), where=where)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        # Not before: a header of 128 bytes more than a multiple of 256 begins as pickles do.
        if data[:1] == b"\x80":
            raise unsafe from error
        raise ModelError(
            f"{where} is not a valid safetensors file: {_line(error)}.", remedy=_DAMAGED
        ) from error


def from_torch(data: bytes, *, where: str) -> Tensors:
    """The tensors of a weights-only checkpoint, out of the nests that training scripts use.

    Raises UnsafeModelError where loading would run code, ModelError for anything else amiss.
    """
    if data.startswith(b"PK"):
        _check_archive(data, where)
    try:
        with warnings.catch_warnings():
            # torch remarks on the pickle protocol of a file that it then refuses.
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")
            document = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(data, where) from error
    except Exception as error:  # torch.load raises whatever its parsers meet in broken bytes
        raise ModelError(
            f"{where} is not a readable torch checkpoint ({_line(error)}).", remedy=_DAMAGED
        ) from error
    return checked(_weights(document, where), where=where)


def _refused(data: bytes, where: str) -> ModelError:
    """What to say of a pickle that is more than tensors, or of bytes that are no pickle at all."""
    calls = ", ".join(globals_of(data)[:3])
    if not calls and not data.startswith((b"PK", b"\x80")):
        return ModelError(f"{where} is not a readable torch checkpoint.", remedy=_DAMAGED)
    return UnsafeModelError(
        f"{where} holds more than weights; loading it would run code"
        f"{f' ({calls})' if calls else ''}.",
        remedy=advice.remedy(where),
    )


def _check_archive(data: bytes, where: str) -> None:
    """A zip archive of plain tensors: no code, nothing compressed (no bomb)."""
    try:
        members = zipfile.ZipFile(io.BytesIO(data)).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise ModelError(
            f"{where} is not a readable torch checkpoint ({_line(error)}).", remedy=_DAMAGED
        ) from error
    names = [member.filename.partition("/")[2] for member in members]
    if any(name.startswith("code/") or name == "constants.pkl" for name in names):
        raise UnsafeModelError(
            f"{where} is a TorchScript archive, which is a program.", remedy=advice.remedy(where)
        )
    if "data.pkl" not in names or any(member.compress_type for member in members):
        raise ModelError(f"{where} is an archive, but not a torch checkpoint.", remedy=_DAMAGED)


def globals_of(data: bytes) -> list[str]:
    """What a pickle would import, found by reading its opcodes; for messages only."""
    found: list[str] = []
    strings: list[str] = []
    with suppress(Exception):  # a refusal is on its way: what could be read until here explains it
        for opcode, argument, _ in pickletools.genops(_pickle_of(data)):
            if opcode.name == "GLOBAL":
                found.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                found.append(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    return _foreign(found)


def _pickle_of(data: bytes) -> bytes:
    if not data.startswith(b"PK"):
        return data
    archive = zipfile.ZipFile(io.BytesIO(data))
    name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
    return archive.read(name)


def _foreign(names: list[str]) -> list[str]:
    usual = ("collections.OrderedDict", "torch._utils._rebuild", "torch.FloatStorage")
    short = (name[:60] for name in names if not name.startswith(usual) and name.isprintable())
    return list(dict.fromkeys(short))


def _weights(document: Any, where: str) -> Tensors:
    for candidate in (document, *_nested(document)):
        if isinstance(candidate, Mapping) and candidate and _all_tensors(candidate):
            return dict(candidate)
    raise ModelError(
        f"{where} holds no state dict (a mapping of names to tensors).",
        remedy=f"Save net.state_dict(), alone or under one of: {', '.join(_NESTS)}.",
    )


def _nested(document: Any) -> list[Any]:
    if not isinstance(document, Mapping):
        return []
    return [document[name] for name in _NESTS if name in document]


def _all_tensors(document: Mapping[Any, Any]) -> bool:
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in document.items())


def checked(tensors: Mapping[str, Tensor], *, where: str) -> Tensors:
    """Dense, finite tensors under the names that the network itself gives them."""
    if not tensors:
        raise ModelError(f"{where} holds no tensors.", remedy="Name the file of weights.")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            raise ModelError(
                f"{where}: {name!r} is not a dense real tensor ({tensor.dtype}, {tensor.layout}).",
                remedy="Save plain float32 weights.",
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise NonFiniteError(
                f"{where}: {name!r} holds NaN or infinity.",
                remedy="Use a checkpoint taken before training diverged.",
            )
    return _unprefixed(dict(tensors))


def _unprefixed(tensors: Tensors) -> Tensors:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            return _unprefixed({name.removeprefix(prefix): tensors[name] for name in tensors})
    return tensors


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(".")
