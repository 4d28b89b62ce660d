"""How each traced torch operation is written as ONNX: one function a kind, one table at the end."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from mlflow_kdguard.nets import emit_windows
from mlflow_kdguard.nets.writer import (
    PIXELS,
    Arguments,
    Batch,
    Padded,
    Writer,
    refuse,
    sides,
    title,
)


def emit(writer: Writer, node: fx.Node) -> Any:
    """Write one traced call; returns what it became: an ONNX name, a constant, or a size."""
    if not _uses(writer, node, (str, Padded)):
        return _folded(writer, node)
    operation = title(node)
    rule = RULES.get(operation.removesuffix("_"))
    if rule is None:
        if not node.users:
            return None
        raise refuse(node, "has no canonical ONNX form")
    return rule(writer, node, _arguments(writer, node))


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
        if isinstance(value, Padded) and title(node) not in emit_windows.TAKE_PADDING:
            raise refuse(node, f"cannot take padded pixels as {name}")
    return found


def _binary(op: str) -> Callable[[Writer, fx.Node, Arguments], str]:
    def rule(writer: Writer, node: fx.Node, given: Arguments) -> str:
        left, right = given["self"], given["other"]
        if given.get("rounding_mode") is not None:
            raise refuse(node, "rounds")
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
        raise refuse(node, "clamps by tensors")
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
        raise refuse(node, "needs a constant matrix on its right")
    return writer.add("MatMul", (left, writer.constant(right)))


def _addmm(writer: Writer, node: fx.Node, given: Arguments) -> str:
    if (given["alpha"], given["beta"]) != (1, 1) or isinstance(given["self"], str):
        raise refuse(node, "needs a constant bias, unscaled")
    product = _matmul(writer, node, {"self": given["mat1"], "other": given["mat2"]})
    return writer.add("Add", (product, writer.constant(given["self"])))


def _reshape(writer: Writer, node: fx.Node, given: Arguments) -> str:
    source = node.args[0]
    if not isinstance(source, fx.Node) or _batch(source) != _batch(node) or not sides(node):
        raise refuse(node, "mixes the batch with the image")
    if sides(node) == sides(source):
        return str(given["self"])
    return writer.add("Reshape", (given["self"], writer.integers([0, *sides(node)])))


def _batch(node: fx.Node) -> str:
    shape = node.meta["val"].shape
    return str(shape[0]) if len(shape) else ""


def _same(_writer: Writer, node: fx.Node, given: Arguments) -> Any:
    if given.get("train") or node.meta["val"].dtype != torch.float32:
        raise refuse(node, "drops values at random or changes their type")
    return given.get("self", given.get("input"))


def _size(_writer: Writer, node: fx.Node, given: Arguments) -> Any:
    side = node.meta["val"]
    return side if isinstance(side, int) else Batch()


_SAME = (
    "dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "detach", "alias",
    "to", "lift_fresh_copy", "type_as",
)  # fmt: skip
_RESHAPE = ("view", "reshape", "flatten", "squeeze", "unsqueeze", "unflatten", "_unsafe_view")
RULES: dict[str, Callable[[Writer, fx.Node, Arguments], Any]] = {
    "adaptive_avg_pool2d": emit_windows.adaptive_pool,
    "add": _binary("Add"),
    "addmm": _addmm,
    "avg_pool2d": emit_windows.average_pool,
    "batch_norm": emit_windows.batch_norm,
    "clamp": _clamp,
    "clamp_max": _clamp,
    "clamp_min": _clamp,
    "constant_pad_nd": emit_windows.pad,
    "conv2d": emit_windows.conv,
    "div": _binary("Div"),
    "hardtanh": _clamp,
    "linear": _linear,
    "matmul": _matmul,
    "max_pool2d": emit_windows.max_pool,
    "maximum": _binary("Max"),
    "mean": emit_windows.mean,
    "minimum": _binary("Min"),
    "mm": _matmul,
    "mul": _binary("Mul"),
    "neg": _neg,
    "pad": emit_windows.pad,
    "relu": _relu,
    "relu6": _relu6,
    "rsub": _reversed_sub,
    "sub": _binary("Sub"),
    "sym_size": _size,
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_RESHAPE, _reshape),
}
"""Every traced operation that can be written, by its name in torch.ops.aten."""
