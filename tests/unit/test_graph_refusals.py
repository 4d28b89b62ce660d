"""Files that two honest readers could read differently, or that bounds cannot follow: refused."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, ModelProto, TensorProto, helper
from onnx.numpy_helper import to_array

import toys
from mlflow_kdguard import graph
from mlflow_kdguard.errors import KDGuardError, ModelError, NonFiniteError, UnsafeModelError

Change = Callable[[ModelProto], None]


def tiny() -> ModelProto:
    return ModelProto.FromString(toys.onnx_tiny())


def weight(model: ModelProto, name: str = "w0") -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def find(model: ModelProto, op: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op)


def duplicate_initializer(model: ModelProto) -> None:
    model.graph.initializer.append(toys.constant("w0", np.zeros((5, 4))))


def initializer_as_input(model: ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("w0", TensorProto.FLOAT, [5, 4]))


def raw_and_float(model: ModelProto) -> None:
    weight(model).float_data.extend([0.0] * 20)


def raw_and_wrong_kind(model: ModelProto) -> None:
    weight(model).int32_data.extend([0] * 20)


def no_values(model: ModelProto) -> None:
    weight(model).ClearField("raw_data")


def too_few_values(model: ModelProto) -> None:
    weight(model).raw_data = weight(model).raw_data[:-4]


def external(model: ModelProto) -> None:
    tensor = weight(model)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def external_in_constant(model: ModelProto) -> None:
    tensor = toys.constant("", [0.0])
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["k"], value=tensor))


def custom_domain(model: ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.evil", 1))
    find(model, "Relu").domain = "com.evil"


def local_function(model: ModelProto) -> None:
    model.functions.append(
        helper.make_function("f", "Relu", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])],
                             [helper.make_opsetid("", 18)])
    )  # fmt: skip


def training_info(model: ModelProto) -> None:
    model.training_info.add()


def subgraph(model: ModelProto) -> None:
    find(model, "Relu").attribute.append(helper.make_attribute("body", model.graph))


def sparse(model: ModelProto) -> None:
    values = toys.constant("s", [1.0])
    indices = toys.constant("", [0], np.int64)
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))


def two_inputs(model: ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 1, 2, 2]))


def two_outputs(model: ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("g0", TensorProto.FLOAT, ["N", 5]))


def double_input(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def double_weights(model: ModelProto) -> None:
    weight(model).CopyFrom(toys.constant("w0", np.zeros((5, 4)), np.float64))


def fixed_batch(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def fixed_output_batch(model: ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1


def dynamic_height(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"


def flat_input(model: ModelProto) -> None:
    del model.graph.input[0].type.tensor_type.shape.dim[3]


def nan(model: ModelProto) -> None:
    weight(model).raw_data = np.full(20, np.nan, np.float32).tobytes()


def infinite(model: ModelProto) -> None:
    weight(model, "b0").raw_data = np.full(5, np.inf, np.float32).tobytes()


def old_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 9


def future_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 25


def two_opsets(model: ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("ai.onnx", 17))


def future_ir(model: ModelProto) -> None:
    model.ir_version = 14


def old_ir(model: ModelProto) -> None:
    model.ir_version = 3


def unreachable_node(model: ModelProto) -> None:
    model.graph.node.append(toys.node("Relu", ("g0",), "aside"))


def unused_initializer(model: ModelProto) -> None:
    model.graph.initializer.append(toys.constant("spare", [0.0]))


def same_output_twice(model: ModelProto) -> None:
    model.graph.node.insert(3, toys.node("Relu", ("g0",), "g0"))


def same_node_name(model: ModelProto) -> None:
    model.graph.node[1].name = model.graph.node[2].name = "twin"


def magic_offset(model: ModelProto) -> None:
    """x + 2^26 - 2^26: onnxruntime answers zeros, exact arithmetic x."""
    model.graph.initializer.append(toys.constant("huge", 2.0**26))
    model.graph.node.insert(1, toys.node("Add", ("p", "huge"), "up"))
    model.graph.node.insert(2, toys.node("Sub", ("up", "huge"), "down"))
    find(model, "Flatten").input[0] = "down"


def magic_bias(model: ModelProto) -> None:
    weight(model, "b0").raw_data = np.full(5, 2.0**26, np.float32).tobytes()


def unsorted_nodes(model: ModelProto) -> None:
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([nodes[1], nodes[0], *nodes[2:]])


def unknown_operator(model: ModelProto) -> None:
    find(model, "Relu").op_type = "Sigmoid"


def unknown_attribute(model: ModelProto) -> None:
    find(model, "Gemm").attribute.append(helper.make_attribute("transA", 1))


def doubled_attribute(model: ModelProto) -> None:
    find(model, "Gemm").attribute.append(helper.make_attribute("transB", 0))


def referring_attribute(model: ModelProto) -> None:
    attribute = AttributeProto(name="alpha", type=AttributeProto.FLOAT, ref_attr_name="alpha")
    find(model, "Gemm").attribute.append(attribute)


def batch_flatten(model: ModelProto) -> None:
    find(model, "Flatten").attribute.append(helper.make_attribute("axis", 0))


def wrong_classes(model: ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4


def quantised(model: ModelProto) -> None:
    model.graph.quantization_annotation.add(tensor_name="w0")


def unknown_field(model: ModelProto) -> None:
    model.MergeFromString(b"\xfa\x7f\x03abc")


REFUSALS: list[tuple[Change, type[ModelError], str]] = [
    (duplicate_initializer, ModelError, "w0"),
    (initializer_as_input, ModelError, "w0"),
    (raw_and_float, ModelError, "w0"),
    (raw_and_wrong_kind, ModelError, "w0"),
    (no_values, ModelError, "w0"),
    (too_few_values, ModelError, "w0"),
    (external, UnsafeModelError, "another file"),
    (external_in_constant, UnsafeModelError, "another file"),
    (custom_domain, ModelError, "com.evil"),
    (local_function, ModelError, "local functions"),
    (training_info, ModelError, "training information"),
    (subgraph, ModelError, "subgraph"),
    (sparse, ModelError, "sparse"),
    (two_inputs, ModelError, "one input"),
    (two_outputs, ModelError, "one output"),
    (double_input, ModelError, "float32"),
    (double_weights, ModelError, "float32"),
    (fixed_batch, ModelError, "dynamic_axes"),
    (fixed_output_batch, ModelError, "fixed at 1"),
    (dynamic_height, ModelError, "must be fixed"),
    (flat_input, ModelError, "N×C×H×W"),
    (nan, NonFiniteError, "w0"),
    (infinite, NonFiniteError, "b0"),
    (old_opset, ModelError, "opset"),
    (future_opset, ModelError, "opset"),
    (two_opsets, ModelError, "opset"),
    (future_ir, ModelError, "IR"),
    (old_ir, ModelError, ""),
    (unreachable_node, ModelError, "does not reach"),
    (unused_initializer, ModelError, "spare"),
    (same_output_twice, ModelError, "g0"),
    (same_node_name, ModelError, "twin"),
    (magic_offset, ModelError, "swallow"),
    (magic_bias, ModelError, "swallow"),
    (unsorted_nodes, ModelError, ""),
    (unknown_operator, ModelError, "Sigmoid"),
    (unknown_attribute, ModelError, "batch"),
    (doubled_attribute, ModelError, "transB"),
    (referring_attribute, ModelError, "function"),
    (batch_flatten, ModelError, "batch"),
    (wrong_classes, ModelError, "declares"),
    (quantised, ModelError, "quantisation"),
    (unknown_field, ModelError, "does not define"),
]


@pytest.mark.parametrize(
    ("change", "error", "words"), REFUSALS, ids=[change.__name__ for change, *_ in REFUSALS]
)
def test_what_is_not_canonical_is_refused(
    change: Change, error: type[ModelError], words: str
) -> None:
    model = tiny()
    change(model)
    with pytest.raises(error) as caught:
        graph.read(model.SerializeToString(), where="student.onnx")
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert caught.value.message.startswith("student.onnx: ")
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


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


@pytest.mark.parametrize("data", [b"", b"\x00", b"garbage", b"\x08\x0a", b"\x80\x04K\x01.", b"PK"])
def test_bytes_that_are_not_a_model(data: bytes) -> None:
    with pytest.raises(ModelError, match="toy"):
        graph.read(data, where="toy")


def test_every_prefix_is_refused() -> None:
    data = toys.onnx_tiny()
    for cut in range(len(data)):
        with pytest.raises(ModelError):
            graph.read(data[:cut], where="toy")


def outcome(data: bytes) -> np.ndarray[Any, Any] | None:
    """Logits if the bytes are read, None if they are refused; anything else is a failure.

    What is read must be what onnxruntime computes, where that loads the file at all.
    """
    try:
        read = graph.read(data, where="toy", require_clip=False)
    except KDGuardError:
        return None
    x = np.linspace(0, 1, 2 * math.prod(read.input_shape)).reshape(2, *read.input_shape)
    logits = graph.evaluate(read, x)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception:
        return logits
    (other,) = session.run(None, {session.get_inputs()[0].name: x.astype(np.float32)})
    largest = max((abs(t).max() for t in map(to_array, constants_of(data))), default=1.0)
    np.testing.assert_allclose(other, logits, rtol=1e-4, atol=1e-5 * max(1.0, float(largest)) ** 2)
    return logits


def constants_of(data: bytes) -> list[TensorProto]:
    return list(ModelProto.FromString(data).graph.initializer)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bytes_are_read_or_refused_and_nothing_else(flips: list[tuple[int, int]]) -> None:
    data = bytearray(toys.onnx_tiny())
    for place, change in flips:
        data[place % len(data)] ^= change
    outcome(bytes(data))


def test_every_single_byte_of_the_structure_may_be_flipped() -> None:
    data = toys.onnx_tiny()
    for place in range(len(data)):
        for change in (0x01, 0x80, 0xFF):
            flipped = bytearray(data)
            flipped[place] ^= change
            outcome(bytes(flipped))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    assert outcome(data) is None


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2), st.integers(-(2**63), 2**63 - 1), st.sampled_from(["kernel", "pads"]))
def test_numbers_of_any_size_in_attributes(place: int, number: int, what: str) -> None:
    sides = [2, 2, 2, 2]
    sides[place] = number
    kernel, pads = (sides[:2], [0] * 4) if what == "kernel" else ([3, 3], sides)
    nodes = [
        toys.node("AveragePool", ("p",), "y", kernel_shape=kernel, pads=pads),
        toys.node("Flatten", ("y",), "logits"),
    ]
    model = toys.proto(nodes, shape=(1, 6, 6), classes=25)
    outcome(model.SerializeToString())


def test_reading_needs_neither_torch_nor_onnxruntime() -> None:
    program = (
        "import sys; from mlflow_kdguard import graph; import toys; "
        "graph.evaluate(graph.read(toys.onnx_tiny(), where='t'), toys.images(2, (1, 2, 2))); "
        "bad = {'torch', 'onnxruntime', 'mlflow', 'sklearn'} & set(sys.modules); "
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
