"""ONNX files made to be read in two ways: what each hides, and what is expected of the reader.

A case is a name, a way to make the file, and the words of its refusal; no words mean that the file
is harmless and is read. Everything is a small real ONNX file: 2×4×4 images, three classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

import toys

SHAPE = (2, 4, 4)
CLASSES = 3
Nodes = list[onnx.NodeProto]
Tensors = list[onnx.TensorProto]


@dataclass(frozen=True)
class Case:
    """A crafted file; `words` are of its refusal, None where it must be read and agree."""

    name: str
    make: Callable[[], ModelProto]
    words: str | None = None


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Any:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def ints(name: str, *values: int) -> onnx.TensorProto:
    return toys.constant(name, list(values), np.int64)


def node(op: str, inputs: str, output: str = "y", **attributes: Any) -> onnx.NodeProto:
    """One node; inputs are separated by spaces, "-" is one left out."""
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(op, names, [output], name=output, **attributes)


def ended(
    nodes: Sequence[onnx.NodeProto], constants: Sequence[onnx.TensorProto] = (), *, width: int,
    opset: int = 18,
) -> ModelProto:  # fmt: skip
    """Nodes from "p" to "y", then Flatten and a Gemm of `width` numbers an image to the logits."""
    tail = [node("Flatten", "y", "flat"), node("Gemm", "flat w_end b_end", "logits", transB=1)]
    end = [
        toys.constant("w_end", normal(CLASSES, width, seed=7, scale=width**-0.5)),
        toys.constant("b_end", normal(CLASSES, seed=8)),
    ]
    return toys.proto([*nodes, *tail], [*constants, *end], shape=SHAPE, opset=opset)


def one(
    op: str, inputs: str, *constants: onnx.TensorProto, width: int = 32, opset: int = 18,
    **attributes: Any,
) -> Callable[[], ModelProto]:  # fmt: skip
    """A file whose middle is one node."""
    return lambda: ended([node(op, inputs, **attributes)], constants, width=width, opset=opset)


def plain() -> ModelProto:
    """A harmless network with two linear layers and a Relu."""
    nodes = [
        node("Flatten", "p", "h"),
        node("Gemm", "h w b", "g", transB=1),
        node("Relu", "g", "y"),
    ]
    constants = [toys.constant("w", normal(6, 32)), toys.constant("b", normal(6))]
    return ended(nodes, constants, width=6)


def changed(change: Callable[[ModelProto], object]) -> Callable[[], ModelProto]:
    """The harmless network after `change`."""

    def make() -> ModelProto:
        model = plain()
        change(model)
        return model

    return make


def tensor(model: ModelProto, name: str) -> TensorProto:
    return next(each for each in model.graph.initializer if each.name == name)


def claimed(name: str, kind: int, shape: Sequence[int | str] | None) -> Callable[[ModelProto], Any]:
    """A change: the file claims a type and a shape for a value inside."""
    info = helper.make_tensor_value_info(name, kind, shape)
    return lambda model: model.graph.value_info.append(info)
