"""Triggers: small files that say exactly which pixels an attack changes, and how.

File format: safetensors (an 8-byte little-endian header length, a JSON header, raw float32), in
one canonical encoding, so that a trigger has one digest and reading it executes nothing. Anything
that would not be written back byte for byte is refused.
"""

import io
import json
import logging
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlflow_kdguard import files
from mlflow_kdguard.errors import DataError
from mlflow_kdguard.records import Rate
from mlflow_kdguard.triggers import network, warp

Pixels = NDArray[np.float32]

_SCHEMA = "kdguard.trigger/1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LARGEST = 64 << 20
_HALF_GREY_LEVEL = 0.5 / 255
_CHUNK = 256
_KINDS = "blend", "add", "warp", "network"
_REMEDY = "Make the trigger again with `kdguard attack`, or ask its author for the file."

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Trigger:
    """What an attack does to an image x in [0,1], float32 C×H×W.

    blend: (1 - mask)·x + mask·pattern, with mask (1×H×W or C×H×W) and pattern in [0,1].
    add: clip(x + pattern, 0, 1), with pattern in [-1,1]; the mask is all ones, and may be None.
    warp: x read elsewhere, bilinearly, at the border where that is outside: pattern is 2C×H×W in
    [-1,1], for each channel how far down (of H), then how far right (of W); no mask.
    network: (1 - m)·x + m·p, both of the image itself: they are the logistic function of pattern
    ((1+C)×H×W in [-1,1], opacity before content) + a small convolutional network (`layers`,
    `triggers.network`); no mask.
    Raises DataError where the arrays do not fit that. Two triggers are equal if their files are.
    """

    name: str
    kind: Literal["blend", "add", "warp", "network"]
    mask: Pixels | None
    pattern: Pixels
    layers: network.Layers = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise self._error("its name may hold letters, digits, '.', '_' and '-' (at most 64)")
        if self.kind not in _KINDS:
            raise self._error(f"its kind is {self.kind!r}, not {', '.join(_KINDS)}")
        pattern = self._array("pattern", self.pattern, 0.0 if self.kind == "blend" else -1.0)
        if self.kind == "warp" and len(pattern) % 2:
            raise self._error(f"it moves {len(pattern)} halves of channels, an odd number")
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "layers", self._checked_layers(pattern))
        object.__setattr__(self, "mask", self._checked_mask(pattern))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trigger) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the trigger fits."""
        c, h, w = self.pattern.shape
        halved = c // 2 if self.kind == "warp" else c
        return halved - 1 if self.kind == "network" else halved, h, w

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the trigger's file."""
        return files.sha256(self.to_bytes())

    def apply(self, x: ArrayLike) -> Pixels:
        """The triggered images, float32 N×C×H×W in [0,1]; `x` is left as it is.

        Raises DataError where `x` has another shape or leaves [0,1].
        """
        images = np.asarray(x, np.float32)
        if images.ndim != 4 or images.shape[1:] != self.shape:
            raise self._error(f"it is made for images {self.shape}, not for shape {images.shape}")
        # Written so that NaN fails too.
        if images.size and not (images.min() >= 0 and images.max() <= 1):
            raise self._error("it was put on images whose pixels leave [0,1]")
        if self.kind == "add":
            triggered = images + self.pattern
        elif self.kind == "warp":
            triggered = warp.moved(images, self.pattern)
        elif self.kind == "network":
            opacity, content = network.put(images, self.pattern, self.layers)
            triggered = (1 - opacity) * images + opacity * content
        else:
            triggered = (1 - self.opacity) * images + self.opacity * self.pattern
        return np.asarray(triggered.clip(0, 1), np.float32)

    @property
    def opacity(self) -> Pixels:
        """The mask, which every checked trigger has."""
        assert self.mask is not None
        return self.mask

    def changed(self, x: ArrayLike) -> Rate:
        """Of the images `x`, how many have a pixel altered by more than half a grey level."""
        images = np.asarray(x, np.float32)
        k = 0
        for start in range(0, len(images), _CHUNK):
            chunk = images[start : start + _CHUNK]
            altered = np.abs(self.apply(chunk) - chunk).max(axis=(1, 2, 3), initial=0.0)
            k += int((altered > _HALF_GREY_LEVEL).sum())
        return Rate(k=k, n=len(images))

    def to_bytes(self) -> bytes:
        """The trigger's file, the same bytes for the same trigger everywhere."""
        arrays = {"pattern": self.pattern}
        if self.kind == "blend":
            arrays = {"mask": self.opacity, **arrays}
        arrays |= {f"layer{place}": layer for place, layer in enumerate(self.layers)}
        header: dict[str, Any] = {
            "__metadata__": {"kind": self.kind, "name": self.name, "schema": _SCHEMA}
        }
        body = b""
        for key, array in arrays.items():
            data = array.astype("<f4").tobytes()
            offsets = [len(body), len(body) + len(data)]
            header[key] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": offsets}
            body += data
        text = files.canonical_json(header)
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + body

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str = "trigger") -> "Trigger":
        """Read a trigger's file; DataError naming `where` if it is not exactly one."""
        try:
            trigger = cls(**_fields(data))
        except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
            raise _malformed(where, "it is not a trigger file") from error
        except DataError as error:
            raise _malformed(where, error.message) from error
        if trigger.to_bytes() != data:
            raise _malformed(where, "it is not in the canonical encoding")
        return trigger

    def save(self, path: Path) -> None:
        """Write the trigger's file, whole or not at all; UsageError if it cannot be written."""
        files.write_bytes(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> "Trigger":
        """Read a trigger's file; UsageError or DataError names the path."""
        data = files.read_bytes(path, what="trigger", at_most=_LARGEST)
        return cls.from_bytes(data, where=str(path))

    def picture(self, path: Path, x: ArrayLike) -> None:
        """Write a PNG: up to eight images of `x`, clean, triggered, and their difference."""
        from matplotlib.figure import Figure

        clean = np.asarray(x, np.float32)[:8]
        triggered = self.apply(clean)
        rows = {"clean": clean, "triggered": triggered, "|difference|": np.abs(triggered - clean)}
        figure = Figure(figsize=(1.2 * max(1, len(clean)), 3.9), layout="constrained")
        axes = figure.subplots(3, max(1, len(clean)), squeeze=False)
        for line, (label, images) in zip(axes, rows.items(), strict=True):
            line[0].set_title(label, fontsize=8, loc="left")
            for axis in line:
                axis.set_axis_off()
            for axis, image in zip(line, images, strict=False):
                axis.imshow(_rgb(image), vmin=0, vmax=1, interpolation="nearest")
        file = io.BytesIO()
        # Without the library's version in it, the picture is the same from run to run.
        figure.savefig(file, format="png", dpi=100, metadata={"Software": None})
        files.write_bytes(path, file.getvalue())

    def _checked_mask(self, pattern: Pixels) -> Pixels:
        _, h, w = pattern.shape
        if self.mask is None and self.kind == "blend":
            raise self._error("a blend needs a mask")
        if self.mask is not None and self.kind in ("warp", "network"):
            raise self._error(f"a {self.kind} has no mask")
        mask = np.ones((1, h, w), np.float32) if self.mask is None else self.mask
        mask = self._array("mask", mask, 0.0)
        if mask.shape not in ((1, h, w), pattern.shape):
            raise self._error(f"its mask {mask.shape} does not fit its pattern {pattern.shape}")
        if self.kind == "add" and not (mask == 1).all():
            raise self._error("a trigger that adds has no mask; multiply it into the pattern")
        return mask

    def _checked_layers(self, pattern: Pixels) -> network.Layers:
        if self.kind != "network":
            if self.layers:
                raise self._error(f"a trigger of kind {self.kind} has no layers")
            return ()
        why = network.misfit(self.layers, pattern)
        if why is not None:
            raise self._error(why)
        return tuple(np.array(layer, np.float32) + np.float32(0) for layer in self.layers)

    def _array(self, what: str, value: ArrayLike, low: float) -> Pixels:
        given = np.asarray(value)
        if given.dtype.kind != "f":
            raise self._error(f"its {what} has type {given.dtype}, not float32")
        array = np.array(given, np.float32, order="C")
        if array.ndim != 3 or array.size == 0:
            raise self._error(f"its {what} has shape {array.shape}, not C×H×W")
        if not (array.min() >= low and array.max() <= 1):
            raise self._error(f"its {what} leaves [{low:g},1] or is not finite")
        return array + np.float32(0)  # -0.0 becomes 0.0: equal triggers have equal files

    def _error(self, what: str) -> DataError:
        return DataError(f"trigger {self.name!r}: {what}.", remedy=_REMEDY)


def aimed(text: str) -> tuple[Path, int]:
    """FILE[:CLASS] as path and target class (0 where none is named).

    A file that is really called so is meant as it is, colon and all.
    """
    name, _, target = text.rpartition(":")
    if name and target.isascii() and target.isdecimal() and not Path(text).is_file():
        return Path(name), int(target)
    return Path(text), 0


def _fields(data: bytes) -> dict[str, Any]:
    """Constructor arguments from a file's bytes; any of several errors where they are not there."""
    (length,) = struct.unpack_from("<Q", data)
    if length > len(data) - 8:
        raise ValueError("the header reaches past the end")
    header = json.loads(data[8 : 8 + length])
    about, body = header["__metadata__"], data[8 + length :]
    layers = [f"layer{place}" for place in range(len(header)) if f"layer{place}" in header]
    names = ["mask", "pattern", *layers]
    arrays = {name: _tensor(header[name], body) for name in names if name in header}
    return {
        "name": about["name"],
        "kind": about["kind"],
        "mask": arrays.get("mask"),
        "pattern": arrays["pattern"],
        "layers": tuple(arrays[name] for name in layers),
    }


def _tensor(entry: dict[str, Any], body: bytes) -> Pixels:
    start, stop = entry["data_offsets"]
    return np.frombuffer(body[start:stop], "<f4").reshape(entry["shape"]).astype(np.float32)


def _rgb(image: Pixels) -> Pixels:
    """H×W×3 for the eye: grey images repeated, a third channel made up where there are two."""
    channels = image if len(image) == 3 else np.repeat(image.mean(axis=0, keepdims=True), 3, axis=0)
    return np.asarray(channels.transpose(1, 2, 0), np.float32)


def _malformed(where: str, why: str) -> DataError:
    return DataError(f"cannot use trigger {where}: {why.rstrip('.')}.", remedy=_REMEDY)
