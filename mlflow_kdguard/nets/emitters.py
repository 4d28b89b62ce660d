"""How each traced torch operation is written as ONNX: one function a kind, one table at the end."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from mlflow_kdguard.errors import ModelError
from mlflow_kdguard.nets.emit import PIXELS, Batch, Padded, Writer

Arguments = dict[str, Any]
"""Arguments of a traced call by name; activations are names of ONNX values."""


def emit(writer: Writer, node: fx.Node) -> Any:
    """Write one traced call; returns what it became: an ONNX name, a constant, or a size."""
    if not _uses(writer, node, (str, Padded)):
        return _folded(writer, node)
    operation = _title(node)
    rule = RULES.get(operation.removesuffix("_"))
    if rule is None:
        if not node.users:
            return None
        raise _refuse(node, "has no canonical ONNX form")
    return rule(writer, node, _arguments(writer, node))


def _title(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return (
        str(schema.name).removeprefix("aten::") if schema else getattr(node.target, "__name__", "")
    )


def _refuse(node: fx.Node, reason: str) -> ModelError:
    place = str(next(reversed((node.meta.get("nn_module_stack") or {"": ("", "")}).values()))[0])
    where = f" in layer {place}" if place else ""
    return ModelError(
        f"operation {_title(node)}{where} {reason}.",
        remedy="Use convolutions, linear layers, batch norm, ReLU, clamp, pooling, reshaping, "
        "residual sums, maximum and minimum; see docs/reference/networks.md.",
    )


def _uses(writer: Writer, node: fx.Node, kinds: tuple[type, ...]) -> bool:
    return any(isinstance(writer.values.get(source), kinds) for source in node.all_input_nodes)


def _folded(writer: Writer, node: fx.Node) -> Any:
    """A call on constants alone, computed now; one on the batch size stays unknown."""
    if _uses(writer, node, (Batch,)):
        return Batch()
    arguments = fx.node.map_arg((node.args, node.kwargs), lambda source: writer.values[source])
    with torch.no_grad():
        return node.target(*arguments[0], **arguments[1])  # type: ignore[operator]


def _arguments(writer: Writer, node: fx.Node) -> Arguments:
    found: Arguments = {}
    for place, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        default = argument.default_value if argument.has_default_value() else None
        given = (
            node.args[place] if place < len(node.args) else node.kwargs.get(argument.name, default)
        )
        found[argument.name] = fx.node.map_arg(given, lambda source: writer.values[source])
    for name, value in found.items():
        if isinstance(value, Padded) and _title(node) not in _WINDOWS:
            raise _refuse(node, f"cannot take padded pixels as {name}")
    return found


def _binary(op: str) -> Callable[[Writer, fx.Node, Arguments], str]:
    def rule(writer: Writer, node: fx.Node, given: Arguments) -> str:
        left, right = given["self"], given["other"]
        if given.get("rounding_mode") is not None:
            raise _refuse(node, "rounds")
        if given.get("alpha", 1) != 1:
            right = _times(writer, right, float(given["alpha"]))
        return writer.add(op, (_operand(writer, left), _operand(writer, right)))

    return rule


def _times(writer: Writer, value: Any, factor: float) -> Any:
    if isinstance(value, str):
        return writer.add("Mul", (value, writer.constant(factor)))
    return value * factor


def _operand(writer: Writer, value: Any) -> str:
    return value if isinstance(value, str) else writer.constant(value)


def _reversed_sub(writer: Writer, node: fx.Node, given: Arguments) -> str:
    return _binary("Sub")(writer, node, given | {"self": given["other"], "other": given["self"]})


def _neg(writer: Writer, _node: fx.Node, given: Arguments) -> str:
    return writer.add("Mul", (given["self"], writer.constant(-1.0)))


def _relu(writer: Writer, _node: fx.Node, given: Arguments) -> str:
    return writer.add("Relu", (given["self"],))


def _clamp(writer: Writer, node: fx.Node, given: Arguments) -> str:
    low = given.get("min", given.get("min_val"))
    high = given.get("max", given.get("max_val"))
    if isinstance(low, Tensor | str) or isinstance(high, Tensor | str):
        raise _refuse(node, "clamps by tensors")
    if given["self"] == PIXELS and (low, high) == (0, 1):
        return PIXELS
    limits = ["" if limit is None else writer.constant(float(limit)) for limit in (low, high)]
    return writer.add("Clip", (given["self"], *limits) if limits[1] else (given["self"], limits[0]))


def _relu6(writer: Writer, node: fx.Node, given: Arguments) -> str:
    return _clamp(writer, node, given | {"min": 0, "max": 6})


def _linear(writer: Writer, _node: fx.Node, given: Arguments) -> str:
    inputs = [given["input"], writer.constant(given["weight"])]
    if given["bias"] is not None:
        inputs.append(writer.constant(given["bias"]))
    return writer.add("Gemm", inputs, transB=1)


def _matmul(writer: Writer, node: fx.Node, given: Arguments) -> str:
    left, right = given["self"], given.get("other", given.get("mat2"))
    if not isinstance(left, str) or not isinstance(right, Tensor) or right.dim() != 2:
        raise _refuse(node, "needs a constant matrix on its right")
    return writer.add("MatMul", (left, writer.constant(right)))


def _addmm(writer: Writer, node: fx.Node, given: Arguments) -> str:
    if (given["alpha"], given["beta"]) != (1, 1) or isinstance(given["self"], str):
        raise _refuse(node, "needs a constant bias, unscaled")
    product = _matmul(writer, node, {"self": given["mat1"], "other": given["mat2"]})
    return writer.add("Add", (product, writer.constant(given["self"])))


def _conv(writer: Writer, node: fx.Node, given: Arguments) -> str:
    if isinstance(given["weight"], str) or isinstance(given["bias"], str):
        raise _refuse(node, "has a kernel that depends on the images")
    kernel, dilation = list(given["weight"].shape[2:]), _two(given["dilation"])
    source, pads = _unpadded(
        node, given["input"], given["padding"], value=0.0, kernel=kernel, dilation=dilation
    )
    inputs = [source, writer.constant(given["weight"])]
    if given["bias"] is not None:
        inputs.append(writer.constant(given["bias"]))
    return writer.add(
        "Conv", inputs, kernel_shape=kernel, strides=_two(given["stride"]), pads=pads,
        dilations=dilation, group=given["groups"],
    )  # fmt: skip


def _two(values: Any) -> list[int]:
    sides = [int(value) for value in (values if isinstance(values, list | tuple) else [values])]
    return sides * 2 if len(sides) == 1 else sides


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
        own = _two(padding) * 2
    if not isinstance(source, Padded):
        return source, own
    if source.value != value:
        raise _refuse(node, f"cannot take pixels padded with {source.value}")
    return source.source, [mine + theirs for mine, theirs in zip(own, source.pads, strict=True)]


def _pad(_writer: Writer, node: fx.Node, given: Arguments) -> Padded:
    sides, value = list(given["pad"]), given.get("value")
    if given.get("mode", "constant") != "constant" or not isinstance(given["self"], str):
        raise _refuse(node, "pads in a way that windows cannot take over")
    sides += [0] * (4 - len(sides))
    if len(sides) > 4 or min(sides) < 0:
        raise _refuse(node, "pads other axes than height and width")
    left, right, top, bottom = sides
    return Padded(given["self"], (top, left, bottom, right), float(value or 0.0))


def _batch_norm(writer: Writer, node: fx.Node, given: Arguments) -> str:
    statistics = [given[name] for name in ("weight", "bias", "running_mean", "running_var")]
    if given["training"] or statistics[2] is None or statistics[3] is None:
        raise _refuse(node, "normalises by the batch")
    ones = torch.ones_like(statistics[2])
    filled = [
        default if value is None else value
        for value, default in zip(statistics, (ones, 0 * ones, ones, ones), strict=True)
    ]
    inputs = [given["input"], *(writer.constant(value) for value in filled)]
    return writer.add("BatchNormalization", inputs, epsilon=given["eps"])


def _max_pool(writer: Writer, node: fx.Node, given: Arguments) -> str:
    kernel = _two(given["kernel_size"])
    if given["ceil_mode"] or _two(given["dilation"]) != [1, 1]:
        raise _refuse(node, "uses ceil_mode or dilation")
    source, pads = _unpadded(
        node, given["self"], given["padding"], value=-math.inf, kernel=kernel, dilation=[1, 1]
    )
    strides = _two(given["stride"] or kernel)
    return writer.add("MaxPool", (source,), kernel_shape=kernel, strides=strides, pads=pads)


def _average_pool(writer: Writer, node: fx.Node, given: Arguments) -> str:
    kernel = _two(given["kernel_size"])
    if given["ceil_mode"] or given["divisor_override"] is not None:
        raise _refuse(node, "uses ceil_mode or divisor_override")
    counted = bool(given["count_include_pad"])
    if isinstance(given["self"], Padded) and not counted and any(_two(given["padding"])):
        raise _refuse(node, "counts one padding and not the other")
    counted = counted or isinstance(given["self"], Padded)
    source, pads = _unpadded(
        node, given["self"], given["padding"], value=0.0, kernel=kernel, dilation=[1, 1]
    )
    strides = _two(given["stride"] or kernel)
    return writer.add(
        "AveragePool", (source,), kernel_shape=kernel, strides=strides, pads=pads,
        count_include_pad=int(counted),
    )  # fmt: skip


def _adaptive_pool(writer: Writer, node: fx.Node, given: Arguments) -> str:
    height, width = _sides(node.args[0])[1:]
    rows, columns = _two(given["output_size"])
    if height % rows or width % columns:
        raise _refuse(node, f"cannot pool {height}×{width} evenly to {rows}×{columns}")
    kernel = [height // rows, width // columns]
    return writer.add("AveragePool", (given["self"],), kernel_shape=kernel, strides=kernel)


def _mean(writer: Writer, node: fx.Node, given: Arguments) -> str:
    axes = sorted(axis % 4 for axis in given["dim"] or ())
    if len(_sides(node.args[0])) != 3 or not axes or not set(axes) <= {2, 3}:
        raise _refuse(node, "averages over other axes than height and width")
    axes_name = writer.integers(axes)
    return writer.add("ReduceMean", (given["self"], axes_name), keepdims=int(given["keepdim"]))


def _reshape(writer: Writer, node: fx.Node, given: Arguments) -> str:
    source = node.args[0]
    if not isinstance(source, fx.Node) or _batch(source) != _batch(node) or not _sides(node):
        raise _refuse(node, "mixes the batch with the image")
    if _sides(node) == _sides(source):
        return str(given["self"])
    return writer.add("Reshape", (given["self"], writer.integers([0, *_sides(node)])))


def _batch(node: fx.Node) -> str:
    shape = node.meta["val"].shape
    return str(shape[0]) if len(shape) else ""


def _sides(node: Any) -> tuple[int, ...]:
    """Shape of a traced value without its batch axis."""
    sides = tuple(node.meta["val"].shape[1:])
    if not all(isinstance(side, int) for side in sides):
        raise _refuse(node, "mixes the batch with the image")
    return sides


def _same(_writer: Writer, node: fx.Node, given: Arguments) -> Any:
    if given.get("train") or node.meta["val"].dtype != torch.float32:
        raise _refuse(node, "drops values at random or changes their type")
    return given.get("self", given.get("input"))


def _size(_writer: Writer, node: fx.Node, given: Arguments) -> Any:
    side = node.meta["val"]
    return side if isinstance(side, int) else Batch()


_WINDOWS = ("conv2d", "max_pool2d", "avg_pool2d")
_SAME = (
    "dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "detach", "alias",
    "to", "lift_fresh_copy", "type_as",
)  # fmt: skip
_RESHAPE = ("view", "reshape", "flatten", "squeeze", "unsqueeze", "unflatten", "_unsafe_view")
RULES: dict[str, Callable[[Writer, fx.Node, Arguments], Any]] = {
    "adaptive_avg_pool2d": _adaptive_pool,
    "add": _binary("Add"),
    "addmm": _addmm,
    "avg_pool2d": _average_pool,
    "batch_norm": _batch_norm,
    "clamp": _clamp,
    "clamp_max": _clamp,
    "clamp_min": _clamp,
    "constant_pad_nd": _pad,
    "conv2d": _conv,
    "div": _binary("Div"),
    "hardtanh": _clamp,
    "linear": _linear,
    "matmul": _matmul,
    "max_pool2d": _max_pool,
    "maximum": _binary("Max"),
    "mean": _mean,
    "minimum": _binary("Min"),
    "mm": _matmul,
    "mul": _binary("Mul"),
    "neg": _neg,
    "pad": _pad,
    "relu": _relu,
    "relu6": _relu6,
    "rsub": _reversed_sub,
    "sub": _binary("Sub"),
    "sym_size": _size,
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_RESHAPE, _reshape),
}
"""Every traced operation that can be written, by its name in torch.ops.aten."""
