"""CIFAR's pickled batches, read as untrusted input: nothing from the file is ever called.

A pickle is a program. This reader runs it with six names resolved to inert records that only keep
what they are given, and refuses every other name; NumPy itself is never handed the file's
arguments (`docs/decisions/0020-reading-cifar-pickles.md`).
"""

import io
import pickle
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray


class _Inert:
    """Keeps the arguments and the state that a pickle would have handed to a real object."""

    __slots__ = ("arguments", "state")

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Rebuilt(_Inert):
    """numpy.core.multiarray._reconstruct: its state is (version, shape, dtype, order, bytes)."""


class _FromBuffer(_Inert):
    """numpy.core.numeric._frombuffer: (bytes, dtype, shape, order), pickle protocol 5."""


class _Type(_Inert):
    """numpy.dtype: (code, …)."""


class _Encoded(_Inert):
    """_codecs.encode: (text, "latin1"), which is how protocol 2 spells bytes."""


_STAND_INS: dict[tuple[str, str], type[_Inert]] = {
    ("numpy", "ndarray"): _Inert,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _Encoded,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Rebuilt for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _FromBuffer for core in ("core", "_core")},
}


# The C unpickler sizes its memo by an index that the file chooses (64 GB for ten bytes); the
# Python one keeps a dictionary.
class _Reader(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> type[_Inert]:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks to call {module}.{name}")
        return _STAND_INS[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for the outside object {pid!r}")


def read(data: bytes, *, labels: str) -> tuple[NDArray[np.uint8], list[int]]:
    """Bytes (n×3072 uint8) and integer labels of a pickled batch, `labels` being their key.

    Raises pickle.UnpicklingError, with the reason, for anything that is not such a batch.
    """
    try:
        batch = _Reader(io.BytesIO(data), encoding="latin1").load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:
        # A malformed pickle makes the interpreter of its opcodes fail in any way it likes.
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error
    if not isinstance(batch, dict) or "data" not in batch or labels not in batch:
        raise pickle.UnpicklingError(f"it holds no dictionary with 'data' and {labels!r}")
    classes = batch[labels]
    if not isinstance(classes, list) or any(type(label) is not int for label in classes):
        raise pickle.UnpicklingError(f"{labels!r} is not a list of integers")
    try:
        return _array(batch["data"]), classes
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise pickle.UnpicklingError(f"'data' is not an array of bytes: {error}") from error


def _array(value: Any) -> NDArray[np.uint8]:
    if isinstance(value, _Rebuilt):
        _, shape, kind, fortran, raw = value.state
    elif isinstance(value, _FromBuffer):
        raw, kind, shape, order = value.arguments
        fortran = order == "F"
    else:
        raise TypeError(f"found {type(value).__name__}")
    if not isinstance(kind, _Type) or kind.arguments[0] != "u1":
        raise TypeError("its type is not uint8")
    pixels = np.frombuffer(_raw(raw), np.uint8)
    return pixels.reshape(tuple(shape), order="F" if fortran else "C")


def _raw(value: Any) -> bytes:
    if isinstance(value, _Encoded):
        value = value.arguments[0]
    if isinstance(value, str):  # bytes that Python 2 wrote
        return value.encode("latin1")
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    raise TypeError(f"its bytes are {type(value).__name__}")
