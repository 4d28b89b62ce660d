"""Nodes that bounds cannot follow, or that look across the batch: refused with the reason."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import toys
from mlflow_kdguard import graph
from mlflow_kdguard.errors import ModelError


def operator(op: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
    return toys.node(op, inputs, "y", **attributes)


def integers(name: str, *values: int) -> TensorProto:
    return toys.constant(name, list(values), np.int64)


W = toys.constant("w", np.ones((3, 2, 3, 3)))
CHANNEL = [toys.constant(name, np.ones(2)) for name in ("a", "b", "c")]
NODES: list[tuple[str, onnx.NodeProto, list[TensorProto], str]] = [
    ("a mean over the batch", operator("ReduceMean", "p", "i"), [integers("i", 0)], "pixels"),
    ("a mean over channels", operator("ReduceMean", "p", "i"), [integers("i", 1)], "pixels"),
    ("a mean over all", operator("ReduceMean", "p"), [], "pixels"),
    ("a reshape across the batch", operator("Reshape", "p", "i"), [integers("i", -1, 16)], "batch"),
    ("a reshape to one row", operator("Reshape", "p", "i"), [integers("i", 1, -1)], "batch"),
    ("a reshape to a vector", operator("Reshape", "p", "i"), [integers("i", -1)], "batch"),
    ("a reshape with two gaps", operator("Reshape", "p", "i"), [integers("i", -1, -1, 4)], "batch"),
    ("a reshape by 2^62", operator("Reshape", "p", "i"), [integers("i", 0, 2**62, 2**62)], "batch"),
    ("a reshape by -5", operator("Reshape", "p", "i"), [integers("i", 0, -5)], "batch"),
    ("a squeezed batch", operator("Squeeze", "p", "i"), [integers("i", 0)], "squeezed"),
    ("an axis before the batch", operator("Unsqueeze", "p", "i"), [integers("i", 0)], "put into"),
    ("auto_pad", operator("Conv", "p", "w", auto_pad="SAME_UPPER"), [W], "auto_pad"),
    ("ceil_mode", operator("MaxPool", "p", kernel_shape=[3, 3], ceil_mode=1), [], "ceil_mode"),
    ("negative padding", operator("Conv", "p", "w", pads=[-1, 0, 0, 0]), [W], "negative"),
    ("huge padding", operator("Conv", "p", "w", pads=[2**40, 0, 0, 0]), [W], "above"),
    ("huge padding in all", operator("Conv", "p", "w", pads=[4000] * 4), [W], "shape"),
    ("a stride of 0", operator("Conv", "p", "w", strides=[0, 1]), [W], "stride"),
    ("zero groups", operator("Conv", "p", "w", group=0), [W], "groups"),
    ("five groups", operator("Conv", "p", "w", group=5), [W], "groups"),
    ("a kernel that lies", operator("Conv", "p", "w", kernel_shape=[1, 1]), [W], "contradicts"),
    ("padding only", operator("MaxPool", "p", kernel_shape=[2, 2], pads=[2] * 4), [], "padding"),
    ("a window too large", operator("MaxPool", "p", kernel_shape=[9, 9]), [], "larger"),
    ("pooling in one dimension", operator("MaxPool", "p", kernel_shape=[2]), [], "window"),
    ("batch norm in training",
     operator("BatchNormalization", "p", "a", "b", "c", "v", training_mode=1),
     [*CHANNEL, toys.constant("v", np.ones(2))], "training"),
    ("a negative variance", operator("BatchNormalization", "p", "a", "b", "c", "v"),
     [*CHANNEL, toys.constant("v", [1.0, -1e-6])], "variance"),
    ("a huge factor", operator("BatchNormalization", "p", "a", "b", "c", "v", epsilon=0.0),
     [*CHANNEL, toys.constant("v", [1.0, 1e-30])], "swallow"),
    ("division by zero", operator("Div", "p", "k"), [toys.constant("k", 0.0)], "zero"),
    ("division by nearly zero", operator("Div", "p", "k"), [toys.constant("k", 1e-30)], "swallow"),
    ("division by an image", operator("Div", "k", "p"), [toys.constant("k", 1.0)], "constant"),
    ("a product of images", operator("Mul", "p", "p"), [], "piecewise"),
    ("a constant that grows the image", operator("Add", "p", "k"),
     [toys.constant("k", np.ones((2, 2, 4, 4)))], "does not fit"),
    ("a constant for each image", operator("Add", "p", "k"),
     [toys.constant("k", np.ones((3, 2, 4, 4)))], "does not fit"),
    ("an uneven maximum", operator("Max", "p", "k"),
     [toys.constant("k", [0.0, 1.0, 0.0, 0.0])], "same everywhere"),
    ("a clip by a list", operator("Clip", "p", "k"), [toys.constant("k", [0.0])], "scalar"),
    ("a clip upside down", operator("Clip", "p", "k", "l"),
     [toys.constant("k", 1.0), toys.constant("l", 0.0)], "exceeds"),
    ("a number from the image", operator("Gather", "p", "i"), [integers("i", 0)], "gathers"),
    ("images side by side", operator("Concat", "p", "p", axis=0), [], "sizes"),
    ("channels side by side", operator("Concat", "p", "p", axis=1), [], "sizes"),
    ("a matrix from the left", operator("MatMul", "k", "p"),
     [toys.constant("k", np.ones((4, 4)))], "constant"),
]  # fmt: skip


@pytest.mark.parametrize(("node", "constants", "words"), [row[1:] for row in NODES],
                         ids=[row[0] for row in NODES])  # fmt: skip
def test_nodes_that_bounds_cannot_follow(
    node: onnx.NodeProto, constants: list[TensorProto], words: str
) -> None:
    flat = toys.node("Flatten", ("y",), "logits")
    model = toys.proto([node, flat], constants, shape=(2, 4, 4), classes=7)
    with pytest.raises(ModelError) as caught:
        graph.read(model.SerializeToString(), where="toy")
    assert words in str(caught.value)


@pytest.mark.parametrize("order", [[1, 0], [0, 0], [2, 0], [1, 2]])
def test_the_batch_size_must_stay_in_front(order: list[int]) -> None:
    nodes = [
        toys.node("Shape", ("p",), "s"),
        toys.node("Gather", ("s", "order"), "o", axis=0),
        toys.node("Concat", ("o", "rest"), "c", axis=0),
        toys.node("Reshape", ("p", "c"), "y"),
        toys.node("Flatten", ("y",), "logits"),
    ]
    constants = [integers("order", *order), integers("rest", -1)]
    with pytest.raises(ModelError):
        graph.read(toys.proto(nodes, constants, shape=(2, 4, 4)).SerializeToString(), where="toy")


def test_shapes_that_differ_are_refused() -> None:
    nodes = [
        toys.node("MaxPool", ("p",), "a", kernel_shape=[2, 2]),
        toys.node("MaxPool", ("p",), "b", kernel_shape=[3, 3]),
        toys.node("Add", ("a", "b"), "c"),
        toys.node("Flatten", ("c",), "logits"),
    ]
    with pytest.raises(ModelError, match="differ"):
        graph.read(toys.proto(nodes, shape=(1, 4, 4)).SerializeToString(), where="toy")
