"""How operations that look through a window, or act by channel, are written as ONNX."""

import math
from typing import Any

import torch
from torch import fx

from mlflow_kdguard.nets.writer import Arguments, Padded, Writer, pair, refuse, sides

TAKE_PADDING = ("conv2d", "max_pool2d", "avg_pool2d")
"""Operations that take over padding that was put before them."""


def conv(writer: Writer, node: fx.Node, given: Arguments) -> str:
    """Conv, its padding included."""
    if isinstance(given["weight"], str) or isinstance(given["bias"], str):
        raise refuse(node, "has a kernel that depends on the images")
    kernel, dilation = list(given["weight"].shape[2:]), pair(given["dilation"])
    source, pads = _unpadded(
        node, given["input"], given["padding"], value=0.0, kernel=kernel, dilation=dilation
    )
    inputs = [source, writer.constant(given["weight"])]
    if given["bias"] is not None:
        inputs.append(writer.constant(given["bias"]))
    return writer.add(
        "Conv", inputs, kernel_shape=kernel, strides=pair(given["stride"]), pads=pads,
        dilations=dilation, group=given["groups"],
    )  # fmt: skip


def _unpadded(
    node: fx.Node,
    source: Any,
    padding: Any,
    *,
    value: float,
    kernel: list[int],
    dilation: list[int],
) -> tuple[str, list[int]]:
    """The map under a window and all its padding: the window's own and what was put before it."""
    own = [0, 0, 0, 0]
    if padding == "same":
        reach = [step * (side - 1) for side, step in zip(kernel, dilation, strict=True)]
        own = [side // 2 for side in reach] + [side - side // 2 for side in reach]
    elif padding != "valid":
        own = pair(padding) * 2
    if not isinstance(source, Padded):
        return source, own
    if source.value != value:
        raise refuse(node, f"cannot take pixels padded with {source.value}")
    return source.source, [mine + theirs for mine, theirs in zip(own, source.pads, strict=True)]


def pad(_writer: Writer, node: fx.Node, given: Arguments) -> Padded:
    """Padding with one value, left to the window that follows."""
    sides, value = list(given["pad"]), given.get("value")
    if given.get("mode", "constant") != "constant" or not isinstance(given["self"], str):
        raise refuse(node, "pads in a way that windows cannot take over")
    sides += [0] * (4 - len(sides))
    if len(sides) > 4 or min(sides) < 0:
        raise refuse(node, "pads other axes than height and width")
    left, right, top, bottom = sides
    return Padded(given["self"], (top, left, bottom, right), float(value or 0.0))


def batch_norm(writer: Writer, node: fx.Node, given: Arguments) -> str:
    """BatchNormalization with its running statistics."""
    statistics = [given[name] for name in ("weight", "bias", "running_mean", "running_var")]
    if given["training"] or statistics[2] is None or statistics[3] is None:
        raise refuse(node, "normalises by the batch")
    ones = torch.ones_like(statistics[2])
    filled = [
        default if value is None else value
        for value, default in zip(statistics, (ones, 0 * ones, ones, ones), strict=True)
    ]
    inputs = [given["input"], *(writer.constant(value) for value in filled)]
    return writer.add("BatchNormalization", inputs, epsilon=given["eps"])


def max_pool(writer: Writer, node: fx.Node, given: Arguments) -> str:
    """MaxPool."""
    kernel = pair(given["kernel_size"])
    if given["ceil_mode"] or pair(given["dilation"]) != [1, 1]:
        raise refuse(node, "uses ceil_mode or dilation")
    source, pads = _unpadded(
        node, given["self"], given["padding"], value=-math.inf, kernel=kernel, dilation=[1, 1]
    )
    strides = pair(given["stride"] or kernel)
    return writer.add("MaxPool", (source,), kernel_shape=kernel, strides=strides, pads=pads)


def average_pool(writer: Writer, node: fx.Node, given: Arguments) -> str:
    """AveragePool."""
    kernel = pair(given["kernel_size"])
    if given["ceil_mode"] or given["divisor_override"] is not None:
        raise refuse(node, "uses ceil_mode or divisor_override")
    counted = bool(given["count_include_pad"])
    if isinstance(given["self"], Padded) and not counted and any(pair(given["padding"])):
        raise refuse(node, "counts one padding and not the other")
    counted = counted or isinstance(given["self"], Padded)
    source, pads = _unpadded(
        node, given["self"], given["padding"], value=0.0, kernel=kernel, dilation=[1, 1]
    )
    strides = pair(given["stride"] or kernel)
    return writer.add(
        "AveragePool", (source,), kernel_shape=kernel, strides=strides, pads=pads,
        count_include_pad=int(counted),
    )  # fmt: skip


def adaptive_pool(writer: Writer, node: fx.Node, given: Arguments) -> str:
    """AveragePool with windows that fill the map evenly."""
    height, width = sides(node.args[0])[1:]
    rows, columns = pair(given["output_size"])
    if height % rows or width % columns:
        raise refuse(node, f"cannot pool {height}×{width} evenly to {rows}×{columns}")
    kernel = [height // rows, width // columns]
    return writer.add("AveragePool", (given["self"],), kernel_shape=kernel, strides=kernel)


def mean(writer: Writer, node: fx.Node, given: Arguments) -> str:
    """ReduceMean over height, width or both."""
    axes = sorted(axis % 4 for axis in given["dim"] or ())
    if len(sides(node.args[0])) != 3 or not axes or not set(axes) <= {2, 3}:
        raise refuse(node, "averages over other axes than height and width")
    axes_name = writer.integers(axes)
    return writer.add("ReduceMean", (given["self"], axes_name), keepdims=int(given["keepdim"]))
