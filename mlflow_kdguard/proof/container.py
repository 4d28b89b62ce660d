"""Named arrays and a JSON header in one file, read as what they are: bytes of a stranger.

    magic (8) | length of the header (4, little-endian) | header (canonical JSON) | zlib stream

The header lists every array's name, type and shape in the order in which the stream holds them.
Nothing is decompressed or allocated before its size is known and allowed, and a file that could be
written in another way is refused, so that equal proofs have equal digests on one zlib.
"""

import json
import zlib
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.errors import CertificateError
from mlflow_kdguard.files import canonical_json

MAGIC = b"KDGPROOF"
LARGEST_FILE = 64 << 20
LARGEST_HEADER = 1 << 20
LARGEST_ARRAYS = 512 << 20
_LEVEL = 9
_TYPES = ("|i1", "|u1", "<u2", "<u4", "<f4", "<f8")

Arrays = dict[str, NDArray[Any]]


def pack(header: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The bytes of a header and arrays, the same every time."""
    listed, parts = [], []
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        kind = array.dtype.newbyteorder("<").str
        if kind not in _TYPES:
            raise ValueError(f"array {name!r} of type {array.dtype} has no place in a proof")
        listed.append([name, kind, list(array.shape)])
        parts.append(array.astype(kind).tobytes())
    text = canonical_json({**header, "arrays": listed})
    return MAGIC + len(text).to_bytes(4, "little") + text + zlib.compress(b"".join(parts), _LEVEL)


def unpack(data: bytes) -> tuple[dict[str, Any], Arrays]:
    """Header and arrays; CertificateError where the bytes are not what `pack` writes."""
    if len(data) > LARGEST_FILE:
        raise refused(f"it has {len(data)} bytes, more than {LARGEST_FILE}")
    if data[:8] != MAGIC or len(data) < 12:
        raise refused("it does not begin as one")
    length = int.from_bytes(data[8:12], "little")
    if length > min(LARGEST_HEADER, len(data) - 12):
        raise refused("its header is longer than the file, or than is allowed")
    header = _header(data[12 : 12 + length])
    listed = [_described(item) for item in header.pop("arrays")]
    names = [name for name, _, _ in listed]
    if names != sorted(set(names)):
        raise refused("its arrays are not listed in order")
    sizes = [np.dtype(kind).itemsize * prod(shape) for _, kind, shape in listed]
    body = _inflated(data[12 + length :], sum(sizes))
    arrays, start = {}, 0
    for (name, kind, shape), size in zip(listed, sizes, strict=True):
        array = np.frombuffer(body, kind, size // np.dtype(kind).itemsize, start).reshape(shape)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise refused(f"its array {name!r} holds NaN or infinity")
        arrays[name], start = array, start + size
    return header, arrays


def refused(reason: str) -> CertificateError:
    """The error for bytes that are no proof."""
    return CertificateError(
        f"the proof cannot be read: {reason}.", remedy="Ask its writer for the original file."
    )


def _header(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
        canonical = canonical_json(header)
    except (ValueError, RecursionError, UnicodeError) as error:
        raise refused("its header is no JSON") from error
    if not isinstance(header, dict) or canonical != text:
        raise refused("its header is not in canonical form")
    if not isinstance(header.get("arrays"), list):
        raise refused("its header lists no arrays")
    return header


def _described(item: Any) -> tuple[str, str, tuple[int, ...]]:
    match item:
        case [str(name), str(kind), list(sides)] if kind in _TYPES and len(sides) <= 2:
            if all(type(side) is int and 0 <= side <= LARGEST_ARRAYS for side in sides):
                return name, kind, tuple(sides)
    raise refused("its header lists an array of an unknown type or shape")


def _inflated(stream: bytes, size: int) -> bytes:
    if size > LARGEST_ARRAYS:
        raise refused(f"its arrays have {size} bytes, more than {LARGEST_ARRAYS}")
    inflate = zlib.decompressobj()
    try:
        body = inflate.decompress(stream, size + 1)
    except zlib.error as error:
        raise refused("its arrays are damaged") from error
    if len(body) != size or not inflate.eof or inflate.unused_data:
        raise refused("its arrays are not as long as its header says")
    return body
