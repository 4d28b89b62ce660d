"""Reading and evaluating: what is read computes what onnxruntime computes."""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper

import toys
from mlflow_kdguard import graph
from mlflow_kdguard.errors import ModelError
from mlflow_kdguard.nets import convert

DRAW = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray[Any, Any]:
    return DRAW.normal(size=shape).astype(np.float32)


def runtime(data: bytes, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def agree(
    model: onnx.ModelProto, shape: tuple[int, ...], *, require_clip: bool = True
) -> graph.Graph:
    """Our reading, onnxruntime's and the torch module's on the same bytes and images."""
    data = model.SerializeToString()
    read = graph.read(data, where="toy", require_clip=require_clip)
    x = (3 * DRAW.random((5, *shape)) - 1).astype(np.float32)
    logits = graph.evaluate(read, x)
    np.testing.assert_allclose(logits, runtime(data, x), rtol=1e-5, atol=1e-5)
    module = convert.to_torch(read, dtype=torch.float64)
    with torch.no_grad():
        converted = module(torch.from_numpy(x).double()).numpy()
    np.testing.assert_allclose(converted, logits, rtol=1e-11, atol=1e-11)
    return read


C = 4
TAIL: list[tuple[str, Sequence[str], dict[str, Any]]] = [
    ("Conv", ("p", "w"), {"kernel_shape": [3, 3]}),
    ("Conv", ("p", "w", "b"), {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
    ("Conv", ("p", "w"), {"dilations": [2, 1], "pads": [2, 1, 2, 1]}),
    ("Conv", ("p", "grouped", "b"), {"group": 2, "pads": [1, 1, 1, 1]}),
    ("MaxPool", ("p",), {"kernel_shape": [2, 3], "strides": [2, 1], "pads": [1, 1, 0, 1]}),
    ("MaxPool", ("p",), {"kernel_shape": [2, 2]}),
    ("AveragePool", ("p",), {"kernel_shape": [2, 3], "pads": [1, 1, 0, 1], "strides": [1, 2]}),
    ("AveragePool", ("p",), {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1}),
    ("GlobalAveragePool", ("p",), {}),
    ("ReduceMean", ("p", "axes23"), {"keepdims": 0}),
    ("ReduceMean", ("p", "axes_1"), {"keepdims": 1}),
    ("ReduceMean", ("p", "axes_1"), {"keepdims": 0}),
    ("BatchNormalization", ("p", "c1", "c2", "c3", "positive"), {"epsilon": 1e-3}),
    ("Add", ("p", "image"), {}),
    ("Add", ("scalar", "p"), {}),
    ("Sub", ("p", "channel"), {}),
    ("Sub", ("channel", "p"), {}),
    ("Mul", ("p", "channel"), {}),
    ("Mul", ("row", "p"), {}),
    ("Div", ("p", "channel"), {}),
    ("Max", ("p", "scalar"), {}),
    ("Min", ("uniform", "p"), {}),
    ("Clip", ("p", "scalar"), {}),
    ("Clip", ("p", "", "scalar"), {}),
    ("Clip", ("p",), {}),
    ("Relu", ("p",), {}),
    ("Identity", ("p",), {}),
    ("Flatten", ("p",), {"axis": -3}),
    ("Reshape", ("p", "shape0"), {}),
    ("Reshape", ("p", "shape-1"), {}),
    ("Reshape", ("p", "shapecopy"), {}),
    ("Unsqueeze", ("p", "axes14"), {}),
]


@pytest.mark.parametrize("index", range(len(TAIL)), ids=lambda i: f"{TAIL[i][0]}-{i}")
def test_each_operator_against_onnxruntime(index: int) -> None:
    op, inputs, attributes = TAIL[index]
    shape = (C, 6, 5)
    floats = {
        "w": normal(3, C, 3, 3), "b": normal(3 if op != "Conv" or "w" in inputs else 4),
        "grouped": normal(4, C // 2, 3, 3), "c1": normal(C), "c2": normal(C), "c3": normal(C),
        "positive": np.abs(normal(C)), "image": normal(1, *shape), "channel": normal(C, 1, 1),
        "row": normal(5), "scalar": np.float32(0.3), "uniform": np.full((C, 1, 1), 0.3),
    }  # fmt: skip
    integers = {
        "axes23": [2, 3], "axes_1": [-1], "axes14": [1, 4], "shape0": [0, 10, -1],
        "shape-1": [-1, 12, 10], "shapecopy": [0, 0, -1],
    }  # fmt: skip
    constants = [toys.constant(name, floats[name]) for name in inputs if name in floats]
    constants += [
        toys.constant(name, integers[name], np.int64) for name in inputs if name in integers
    ]
    flat = toys.node("Flatten", ("y",), "logits")
    probe = toys.proto([toys.node(op, inputs, "y", **attributes), flat], constants, shape=shape)
    probe.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "K"
    size = runtime(probe.SerializeToString(), np.zeros((1, *shape), np.float32)).shape[1]
    model = toys.proto(
        [toys.node(op, inputs, "y", **attributes), flat], constants, shape=shape, classes=size
    )
    agree(model, shape)


def test_gemm_matmul_and_constants() -> None:
    nodes = [
        toys.node("Flatten", ("p",), "f"),
        toys.node("Gemm", ("f", "w1", "b1"), "g", alpha=0.5, beta=2.0),
        toys.node("Gemm", ("g", "w2"), "h", transB=1),
        helper.make_node("Constant", [], ["k"], value=toys.constant("", normal(6, 3))),
        toys.node("MatMul", ("h", "k"), "m"),
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Constant", [], ["three"], value_floats=[1.0, 2.0, 3.0]),
        toys.node("Mul", ("m", "two"), "n"),
        toys.node("Add", ("n", "three"), "logits"),
    ]
    constants = {"w1": normal(4, 5), "b1": normal(1, 5), "w2": normal(6, 5)}
    agree(toys.proto(nodes, constants), (1, 2, 2))


def test_several_activations_residual_sums_and_variadic_extrema() -> None:
    nodes = [
        toys.node("Conv", ("p", "w"), "a", pads=[1] * 4),
        toys.node("Conv", ("a", "w"), "b", pads=[1] * 4),
        toys.node("Add", ("a", "b"), "c"),
        toys.node("Sub", ("c", "p"), "d"),
        toys.node("Max", ("a", "b", "c", "d"), "e"),
        toys.node("Min", ("e", "a"), "f"),
        toys.node("Flatten", ("f",), "logits"),
    ]
    read = agree(
        toys.proto(nodes, {"w": normal(2, 2, 3, 3)}, shape=(2, 3, 3), classes=18), (2, 3, 3)
    )
    kinds = [type(layer).__name__ for layer in read.layers]
    assert kinds == [
        "Clip", "Conv", "Conv", "Add", "Sub", "Maximum", "Maximum", "Maximum", "Minimum", "Reshape",
    ]  # fmt: skip
    assert read.by_name["f"].inputs == ("e", "a")
    assert all(set(layer.inputs) <= {"input", *read.by_name} for layer in read.layers)


def test_constants_hold_the_float32_values_of_the_file_exactly() -> None:
    weight, bias = normal(3, 4), normal(3)
    read = graph.read(toys.onnx_mlp([weight], [bias]), where="toy")
    layer = read.by_name["logits"]
    assert isinstance(layer, graph.Affine)
    assert layer.weight.dtype == np.float64
    assert np.array_equal(layer.weight, weight.astype(np.float64))
    assert np.array_equal(layer.bias, bias.astype(np.float64))


def test_constants_are_broadcast_to_the_output_without_costing_memory() -> None:
    nodes = [toys.node("Mul", ("p", "c"), "y"), toys.node("Flatten", ("y",), "logits")]
    model = toys.proto(nodes, {"c": normal(2, 1, 1)}, shape=(2, 300, 300), classes=180_000)
    layer = graph.read(model.SerializeToString(), where="toy").by_name["y"]
    assert isinstance(layer, graph.Scale)
    assert layer.factor.shape == layer.offset.shape == layer.shape == (2, 300, 300)
    assert layer.factor.strides[1:] == (0, 0)


def test_names_that_collide_with_ours() -> None:
    nodes = [
        toys.node("Relu", ("p",), "input"),
        toys.node("Relu", ("input",), "input#2"),
        toys.node("Max", ("input", "input#2", "p"), "m"),
        toys.node("Flatten", ("m",), "logits"),
    ]
    read = agree(toys.proto(nodes, classes=4), (1, 2, 2))
    names = [layer.name for layer in read.layers]
    assert len(set(names)) == len(names)
    assert "input" not in names


@pytest.mark.parametrize("opset", [13, 15, 17, 18, 21])
def test_operator_sets(opset: int) -> None:
    nodes = [
        toys.node("Conv", ("p", "w"), "a"),
        toys.node("ReduceMean", ("a",), "logits", axes=[2, 3], keepdims=0)
        if opset < 18
        else toys.node("ReduceMean", ("a", "axes"), "logits", keepdims=0),
    ]
    constants = [toys.constant("w", normal(3, 1, 2, 2))]
    constants += [toys.constant("axes", [2, 3], np.int64)] if opset >= 18 else []
    agree(toys.proto(nodes, constants, shape=(1, 4, 4), opset=opset), (1, 4, 4))


def test_flattening_by_the_size_as_older_exporters_write_it() -> None:
    """x.view(x.size(0), -1), twice: the second by a list of gathered sides."""
    nodes = [
        toys.node("Shape", ("p",), "s"),
        toys.node("Gather", ("s", "zero"), "n", axis=0),
        toys.node("Unsqueeze", ("n", "zeros"), "u"),
        toys.node("Concat", ("u", "rest"), "c", axis=0),
        toys.node("Reshape", ("p", "c"), "f"),
        toys.node("Shape", ("p",), "t", start=0, end=3),
        toys.node("Gather", ("t", "order"), "o", axis=0),
        toys.node("Concat", ("o", "rest"), "d", axis=0),
        toys.node("Reshape", ("f", "d"), "g"),
        toys.node("Flatten", ("g",), "logits"),
    ]
    integers = {"zero": 0, "zeros": [0], "rest": [-1], "order": [0, 2]}
    constants = [toys.constant(name, value, np.int64) for name, value in integers.items()]
    read = agree(toys.proto(nodes, constants, shape=(2, 3, 4), classes=24), (2, 3, 4))
    assert [layer.shape for layer in read.layers[1:]] == [(24,), (3, 8), (24,)]


def test_values_in_typed_fields_are_read_like_raw_ones() -> None:
    model = onnx.ModelProto.FromString(toys.onnx_tiny())
    expected = graph.evaluate(graph.read(toys.onnx_tiny(), where="raw"), toys.images(3, (1, 2, 2)))
    for tensor in model.graph.initializer:
        tensor.float_data[:] = np.frombuffer(tensor.raw_data, np.float32).tolist()
        tensor.ClearField("raw_data")
    read = graph.read(model.SerializeToString(), where="typed")
    np.testing.assert_array_equal(graph.evaluate(read, toys.images(3, (1, 2, 2))), expected)


def test_the_digest_is_of_the_bytes_and_the_clip_is_demanded() -> None:
    data = toys.onnx_tiny()
    assert graph.read(data, where="toy").sha256 == sha256(data).hexdigest()
    bare = toys.onnx_mlp([normal(3, 4)], [normal(3)], clip=False)
    assert graph.read(bare, where="toy", require_clip=False).classes == 3
    with pytest.raises(ModelError, match=r"Clip\(0, 1\)"):
        graph.read(bare, where="toy")


def test_a_way_round_the_clip_is_seen() -> None:
    nodes = [
        toys.node("Relu", ("x",), "q"),
        toys.node("Add", ("p", "q"), "s"),
        toys.node("Flatten", ("s",), "logits"),
    ]
    with pytest.raises(ModelError, match=r"Clip\(0, 1\)"):
        graph.read(toys.proto(nodes, classes=4).SerializeToString(), where="toy")


def test_evaluate_takes_any_number_of_images_and_refuses_other_shapes() -> None:
    read = graph.read(toys.onnx_tiny(), where="toy")
    x = toys.images(600, (1, 2, 2))
    whole = graph.evaluate(read, x)
    assert whole.dtype == np.float64
    single = np.concatenate([graph.evaluate(read, x[i : i + 1]) for i in range(600)])
    np.testing.assert_allclose(whole, single, rtol=0, atol=1e-14)
    assert graph.evaluate(read, x[:0]).shape == (0, 3)
    for wrong in (x[0], x[:, :, :, :1], x.reshape(600, 4)):
        with pytest.raises(ModelError, match="do not fit"):
            graph.evaluate(read, wrong)
