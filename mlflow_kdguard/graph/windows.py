"""ONNX operators that look through a window or act by channel: convolution, pooling, batch norm."""

from typing import Any

import numpy as np
import onnx

from mlflow_kdguard.graph import layers
from mlflow_kdguard.graph.layers import Array, Shape
from mlflow_kdguard.graph.walk import Activation, Walk

_LONGEST = 4096
"""Largest kernel, stride, padding or dilation."""


def conv(walk: Walk, node: onnx.NodeProto) -> None:
    """Conv in two dimensions."""
    x = _image(walk, node)
    options = walk.attributes(
        node, auto_pad=b"NOTSET", dilations=[1, 1], group=1, kernel_shape=None, pads=[0] * 4,
        strides=[1, 1],
    )  # fmt: skip
    weight = walk.floats(node, 1)
    groups = options["group"]
    if weight.ndim != 4 or not 1 <= groups <= x.shape[0] or weight.shape[0] % groups:
        raise walk.refuse(node, f"weight {weight.shape} with {groups} groups is no 2-d convolution")
    if weight.shape[1] * groups != x.shape[0]:
        raise walk.refuse(node, f"weight {weight.shape} does not fit {x.shape[0]} channels")
    kernel = (weight.shape[2], weight.shape[3])
    if options["kernel_shape"] not in (None, list(kernel)):
        raise walk.refuse(node, f"kernel_shape {options['kernel_shape']} contradicts its weight")
    strides, pads, dilations = _window(walk, node, options, kernel)
    bias = walk.floats(node, 2) if walk.has(node, 2) else np.zeros(weight.shape[0])
    if bias.shape != weight.shape[:1]:
        raise walk.refuse(node, f"bias {bias.shape} does not fit {weight.shape[0]} channels")
    reach = tuple((side - 1) * step + 1 for side, step in zip(kernel, dilations, strict=True))
    shape = (weight.shape[0], *_slid(walk, node, x.shape, reach=reach, strides=strides, pads=pads))
    name = walk.fresh(node.output[0])
    walk.add(
        node,
        layers.Conv(name, (x.layer,), shape, weight, bias, strides, pads, dilations, groups),
    )


def max_pool(walk: Walk, node: onnx.NodeProto) -> None:
    """MaxPool."""
    x, kernel, strides, pads, _ = _pool(walk, node, storage_order=0)
    shape = (x.shape[0], *_slid(walk, node, x.shape, reach=kernel, strides=strides, pads=pads))
    name = walk.fresh(node.output[0])
    walk.add(node, layers.MaxPool(name, (x.layer,), shape, kernel, strides, pads))


def average_pool(walk: Walk, node: onnx.NodeProto) -> None:
    """AveragePool."""
    x, kernel, strides, pads, options = _pool(walk, node, count_include_pad=0)
    shape = (x.shape[0], *_slid(walk, node, x.shape, reach=kernel, strides=strides, pads=pads))
    counted = bool(options["count_include_pad"])
    name = walk.fresh(node.output[0])
    walk.add(node, layers.AveragePool(name, (x.layer,), shape, kernel, strides, pads, counted))


def global_average_pool(walk: Walk, node: onnx.NodeProto) -> None:
    """GlobalAveragePool."""
    x = _image(walk, node)
    walk.attributes(node)
    _mean(walk, node, x, {2, 3}, node.output[0])


def reduce_mean(walk: Walk, node: onnx.NodeProto) -> None:
    """ReduceMean over height, width, or both."""
    x = _image(walk, node)
    options = walk.attributes(node, axes=None, keepdims=1, noop_with_empty_axes=0)
    if walk.opset >= 18:
        options["axes"] = walk.integers(node, 1) if walk.has(node, 1) else None
    axes = {axis + 4 if axis < 0 else axis for axis in options["axes"] or ()}
    if not axes or not axes <= {2, 3}:
        raise walk.refuse(node, f"a mean over axes {options['axes']} is not one over pixels")
    kept = bool(options["keepdims"])
    pooled = _mean(walk, node, x, axes, node.output[0] if kept else f"{node.output[0]}#mean")
    if not kept:
        shape = tuple(side for axis, side in enumerate(pooled.shape, 1) if axis not in axes)
        walk.add(node, layers.Reshape(walk.fresh(node.output[0]), (pooled.layer,), shape))


def _mean(walk: Walk, node: onnx.NodeProto, x: Activation, axes: set[int], wish: str) -> Activation:
    channels, height, width = x.shape
    kernel = (height if 2 in axes else 1, width if 3 in axes else 1)
    shape = (channels, height // kernel[0], width // kernel[1])
    pooled = layers.AveragePool(
        walk.fresh(wish), (x.layer,), shape, kernel, kernel, (0, 0, 0, 0), count_padding=False
    )
    return walk.add(node, pooled)


def batch_normalization(walk: Walk, node: onnx.NodeProto) -> None:
    """BatchNormalization in evaluation: the mean is taken away, then one factor and one offset."""
    x = walk.activation(node, 0)
    options = walk.attributes(node, epsilon=1e-5, momentum=0.9, training_mode=0)
    if options["training_mode"]:
        raise walk.refuse(node, "in training mode it mixes the batch", "Export in eval mode.")
    gamma, beta, mean, variance = (walk.floats(node, place) for place in (1, 2, 3, 4))
    if {values.shape for values in (gamma, beta, mean, variance)} != {x.shape[:1]}:
        raise walk.refuse(node, f"its statistics do not fit {x.shape[0]} channels")
    spread = variance + options["epsilon"]
    if not (variance >= 0.0).all() or not (spread > 0.0).all():
        raise walk.refuse(node, "a variance is not positive", "Train or export again.")
    factor = walk.bounded(node, gamma / np.sqrt(spread))
    walk.bounded(node, beta - mean * factor)
    # In one step, the offset beta - mean · factor would lose to cancellation what no sum of
    # products shows; in two, nothing but the factor is rounded.
    if mean.any():
        x = _channelwise(walk, node, x, (np.ones_like(mean), -mean))
    _channelwise(walk, node, x, (factor, beta))


def _channelwise(
    walk: Walk, node: onnx.NodeProto, x: Activation, parts: tuple[Array, Array]
) -> Activation:
    """factor · x + offset (`parts`), one of each a channel."""
    shape = (-1,) + (1,) * (len(x.shape) - 1)
    wide = (np.broadcast_to(values.reshape(shape), x.shape) for values in parts)
    name = walk.fresh(node.output[0])
    return walk.add(node, layers.Scale(name, (x.layer,), x.shape, *wide))


def _image(walk: Walk, node: onnx.NodeProto) -> Activation:
    x = walk.activation(node, 0)
    if len(x.shape) != 3:
        raise walk.refuse(node, f"needs feature maps N×C×H×W, is given N×{x.shape}")
    return x


def _pool(
    walk: Walk, node: onnx.NodeProto, **more: int
) -> tuple[Activation, tuple[int, int], tuple[int, int], tuple[int, int, int, int], dict[str, Any]]:
    x = _image(walk, node)
    options = walk.attributes(
        node, auto_pad=b"NOTSET", ceil_mode=0, dilations=[1, 1], kernel_shape=None, pads=[0] * 4,
        strides=[1, 1], **more,
    )  # fmt: skip
    if options["ceil_mode"] or options.get("storage_order"):
        raise walk.refuse(node, "ceil_mode and storage_order are not supported")
    sides = options["kernel_shape"]
    if sides is None or len(sides) != 2 or not all(1 <= side <= _LONGEST for side in sides):
        raise walk.refuse(node, f"kernel_shape {sides} is not a window in two dimensions")
    kernel = (int(sides[0]), int(sides[1]))
    strides, pads, dilations = _window(walk, node, options, kernel)
    if dilations != (1, 1):
        raise walk.refuse(node, "dilated pooling is not supported")
    if any(pad >= side for pad, side in zip(pads, kernel + kernel, strict=True)):
        raise walk.refuse(node, f"a window could see padding only (kernel {kernel}, pads {pads})")
    return x, kernel, strides, pads, options


def _window(
    walk: Walk, node: onnx.NodeProto, options: dict[str, Any], kernel: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int]]:
    if options["auto_pad"] != b"NOTSET":
        raise walk.refuse(node, f"auto_pad {options['auto_pad'].decode(errors='replace')!r}")
    strides, pads, dilations = options["strides"], options["pads"], options["dilations"]
    if (len(strides), len(pads), len(dilations)) != (2, 4, 2):
        raise walk.refuse(node, "strides, pads and dilations must be those of two dimensions")
    if min(*strides, *dilations) < 1 or min(pads) < 0:
        raise walk.refuse(node, "a stride or dilation below 1, or a negative padding")
    if max(*strides, *pads, *dilations, *kernel) > _LONGEST:
        raise walk.refuse(node, f"a stride, padding, dilation or kernel above {_LONGEST}")
    top, left, bottom, right = (int(pad) for pad in pads)
    return (
        (int(strides[0]), int(strides[1])),
        (top, left, bottom, right),
        (int(dilations[0]), int(dilations[1])),
    )


def _slid(
    walk: Walk,
    node: onnx.NodeProto,
    shape: Shape,
    *,
    reach: tuple[int, ...],
    strides: tuple[int, int],
    pads: tuple[int, int, int, int],
) -> tuple[int, int]:
    """Height and width after sliding a window of size `reach`."""
    height = (shape[1] + pads[0] + pads[2] - reach[0]) // strides[0] + 1
    width = (shape[2] + pads[1] + pads[3] - reach[1]) // strides[1] + 1
    if min(height, width) < 1:
        raise walk.refuse(node, f"its window {reach} is larger than the padded image {shape}")
    return height, width
