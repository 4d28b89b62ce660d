"""Files that two honest readers could read differently, or that bounds cannot follow: refused."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, ModelProto, TensorProto, helper

import toys
from mlflow_kdguard import graph
from mlflow_kdguard.errors import ModelError, NonFiniteError, UnsafeModelError

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
