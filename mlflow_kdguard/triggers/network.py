"""A trigger that depends on the image: a small convolutional network of fixed form, in NumPy.

Layers alternate between weights O×I×3×3 and biases O. The image is padded with zeros, so that every
layer keeps its size; ReLU between layers, none after the last. That is data, not code: nothing in
a trigger's file says what is computed.
"""

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float32]
Layers = tuple[NDArray[np.float32], ...]

_SIDE = 3
_CHUNK = 256
_LARGEST = 64
"""Channels that a layer may have."""


def misfit(layers: Layers, pattern: Pixels) -> str | None:
    """Why these are no layers from images to the C+1 channels of `pattern`; None if they are."""
    width = len(pattern) - 1
    if width < 1 or not layers or len(layers) % 2:
        return f"its {len(layers)} layers and pattern {pattern.shape} are no network"
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        shapes = f"{weight.shape} and {bias.shape}"
        if weight.shape != (len(weight), width, _SIDE, _SIDE) or bias.shape != (len(weight),):
            return f"its layers {shapes} do not follow on {width} channels"
        if len(weight) > _LARGEST or {weight.dtype.kind, bias.dtype.kind} != {"f"}:
            return f"its layers {shapes} are too wide, or not float32"
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            return "its layers are not finite"
        width = len(weight)
    return None if width == len(pattern) else f"its layers end in {width} channels"


def put(images: Pixels, pattern: Pixels, layers: Layers) -> tuple[Pixels, Pixels]:
    """Opacity N×1×H×W and content N×C×H×W in [0,1] for images N×C×H×W."""
    both = np.empty((len(images), *pattern.shape), np.float32)
    for start in range(0, len(images), _CHUNK):
        maps = images[start : start + _CHUNK]
        for place in range(0, len(layers), 2):
            maps = _convolved(maps if place == 0 else maps.clip(0), *layers[place : place + 2])
        # The logistic function by way of tanh, which does not overflow.
        both[start : start + _CHUNK] = 0.5 * (1 + np.tanh(0.5 * (maps + pattern)))
    return both[:, :1], both[:, 1:]


def _convolved(maps: Pixels, weight: Pixels, bias: Pixels) -> Pixels:
    """N×I×H×W -> N×O×H×W."""
    _, _, height, width = maps.shape
    padded = np.pad(maps, ((0, 0), (0, 0), (1, 1), (1, 1)))
    found = np.zeros((len(maps), height, width, len(bias)), np.float32) + bias
    for row in range(_SIDE):
        for column in range(_SIDE):
            part = padded[:, :, row : row + height, column : column + width]
            found += np.tensordot(part, weight[:, :, row, column], axes=([1], [1]))
    return np.ascontiguousarray(found.transpose(0, 3, 1, 2))
