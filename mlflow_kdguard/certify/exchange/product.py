"""The two networks as ONNX files that a solver reads: with softmax, and side by side on one image.

The networks' own nodes and constants are copied, not read and written anew, so that a product
computes what the two files compute. Only the leading Clip(0, 1) is left out: the boxes that are
asked about lie in [0, 1], where it changes nothing, and few solvers read it.
"""

from dataclasses import fields
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mlflow_kdguard import graph
from mlflow_kdguard.errors import ModelError

Form = Literal["softmax", "margins"]

INPUT = "x"
CONFIDENCES = "confidences"
DIFFERENCE = "difference"


def confidences(data: bytes, *, where: str) -> bytes:
    """A network with a softmax behind its logits: image N×C×H×W -> confidences N×K.

    Raises ModelError for a file that `graph.read` refuses.
    """
    read, part = _part(data, where)
    nodes = [*part.node, *_softmax(part, CONFIDENCES)]
    return _file(read, nodes, [*part.initializer], CONFIDENCES, _opset(data))


def product(reference: bytes, student: bytes, *, form: Form = "softmax") -> bytes:
    """Both networks on one image: N×C×H×W -> N×K differences p_S,k - p_R,k of the confidences.

    `form` says how a confidence is computed: by the operator Softmax, or ("margins") as
    1 / (1 + sum over j of exp(z_j - z_k)), which has no largest logit to bound.

    Raises ModelError for files that `graph.read` refuses, that do not fit each other, or whose
    operator sets differ and cannot be made equal.
    """
    check_pair(
        graph.read(reference, where="the reference"), graph.read(student, where="the student")
    )
    opset = max(_opset(reference), _opset(student))
    (read, left), (_, right) = (
        _part(_raised(data, opset, where), where, prefix=prefix)
        for data, where, prefix in (
            (reference, "the reference", "reference_"),
            (student, "the student", "student_"),
        )
    )
    confident = _softmax if form == "softmax" else _margins
    ends = [(left, "p_reference"), (right, "p_student")]
    nodes = [
        *(node for part, name in ends for node in (*part.node, *confident(part, name))),
        # Sub of two variables is read by fewer solvers than a constant matrix and Add.
        helper.make_node("MatMul", ["p_reference", "negation"], ["negated"], name="negated"),
        helper.make_node("Add", ["p_student", "negated"], [DIFFERENCE], name=DIFFERENCE),
    ]
    constants = [*left.initializer, *right.initializer, *_matrices(read.classes, form)]
    return _file(read, nodes, constants, DIFFERENCE, opset)


def check_pair(reference: graph.Graph, student: graph.Graph) -> None:
    """ModelError where two networks do not take the same images or give other classes."""
    if reference.input_shape != student.input_shape or reference.classes != student.classes:
        raise ModelError(
            f"the reference maps {reference.input_shape} to {reference.classes} logits, the "
            f"student {student.input_shape} to {student.classes}: there is no gap to ask about.",
            remedy="Ask about a student and the reference that it was distilled from.",
        )


def _part(data: bytes, where: str, *, prefix: str = "") -> tuple[graph.Graph, onnx.GraphProto]:
    """A network that was read, and its graph with other names and without its clip."""
    read = graph.read(data, where=where)
    part = onnx.ModelProto.FromString(data).graph
    names = {part.input[0].name: INPUT}
    _drop_clip(part)
    for value in (*part.initializer, *part.node):
        own = value.output if isinstance(value, onnx.NodeProto) else [value.name]
        names |= {name: f"{prefix}{name}" if prefix else _free(name) for name in own}
    for node in part.node:
        node.name = names[node.output[0]]
        for given in (node.input, node.output):
            given[:] = [names.get(name, name) for name in given]
    for tensor in part.initializer:
        tensor.name = names[tensor.name]
    part.output[0].name = names[part.output[0].name]
    return read, part


def _free(name: str) -> str:
    """A name that is neither that of the image nor that of the confidences."""
    return f"net_{name}"


def _drop_clip(part: onnx.GraphProto) -> None:
    """Leave out the node that clips the image, and the constants that it alone uses."""
    first = next((node for node in part.node if node.op_type == "Clip"), None)
    image = part.input[0].name
    if first is None or first.input[0] != image:
        return  # an Identity stands before it: the clip stays, which is as right
    part.node.remove(first)
    for node in part.node:
        node.input[:] = [image if name == first.output[0] else name for name in node.input]
    used = {name for node in part.node for name in node.input}
    for held in (part.node, part.initializer):
        for value in list(held):
            own = value.output if isinstance(value, onnx.NodeProto) else [value.name]
            if set(own) <= set(first.input) - used:
                held.remove(value)


def _softmax(part: onnx.GraphProto, output: str) -> list[onnx.NodeProto]:
    return [helper.make_node("Softmax", [part.output[0].name], [output], name=output, axis=1)]


def _margins(part: onnx.GraphProto, output: str) -> list[onnx.NodeProto]:
    """1 / sum_j exp(z_j - z_k), with exp 0 = 1 for j = k; an overflow gives 0, never NaN."""
    steps: tuple[tuple[str, list[str], str], ...] = (
        ("MatMul", ["margins"], "all"),
        ("Reshape", ["square"], "margins"),
        ("Exp", [], "odds"),
        ("ReduceSum", ["over"], "sum"),
        ("Reciprocal", [], ""),
    )
    nodes, at = [], part.output[0].name
    for op, constants, what in steps:
        name = f"{output}_{what}" if what else output
        nodes.append(helper.make_node(op, [at, *constants], [name], name=name))
        at = name
    nodes[3].attribute.append(helper.make_attribute("keepdims", 0))
    return nodes


def _matrices(count: int, form: Form) -> list[onnx.TensorProto]:
    """Constants of the product: -I, and what turns logits into a table of z_j - z_k, row k."""
    made: dict[str, NDArray[Any]] = {"negation": -np.eye(count, dtype=np.float32)}
    if form == "margins":
        logits = np.eye(count, dtype=np.float32)
        made["margins"] = (logits[:, None, :] - logits[:, :, None]).reshape(count, -1)
        made["square"] = np.array([0, count, count], np.int64)
        made["over"] = np.array([2], np.int64)
    return [numpy_helper.from_array(values, name) for name, values in made.items()]


def _file(
    read: graph.Graph,
    nodes: list[onnx.NodeProto],
    constants: list[onnx.TensorProto],
    output: str,
    opset: int,
) -> bytes:
    made = helper.make_graph(
        nodes,
        "kdguard",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["N", *read.input_shape])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", read.classes])],
        initializer=constants,
    )
    model = helper.make_model(
        made,
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=max(8, helper.find_min_ir_version_for([helper.make_opsetid("", opset)])),
        producer_name="mlflow-kdguard",
    )
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"the networks make no valid ONNX together ({reason}).") from error
    return bytes(model.SerializeToString(deterministic=True))


def _opset(data: bytes) -> int:
    model = onnx.ModelProto.FromString(data)
    return int(next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx")))


def _raised(data: bytes, opset: int, where: str) -> bytes:
    """The network in a newer operator set; it must be read as the same layers as before."""
    if _opset(data) == opset:
        return data
    before = graph.read(data, where=where)
    remedy = f"Export both networks with opset {opset}."
    model = onnx.ModelProto.FromString(data)
    del model.graph.value_info[:]
    try:
        raised = onnx.version_converter.convert_version(model, opset)
    except RuntimeError as error:
        raise ModelError(f"{where} cannot be raised to opset {opset}.", remedy=remedy) from error
    del raised.graph.value_info[:]
    result = bytes(raised.SerializeToString())
    if not _same(before, graph.read(result, where=where)):
        raise ModelError(f"{where} is another network in opset {opset}.", remedy=remedy)
    return result


def _same(one: graph.Graph, other: graph.Graph) -> bool:
    pairs = zip(one.layers, other.layers, strict=False)
    return len(one.layers) == len(other.layers) and all(
        type(left) is type(right)
        and all(
            np.array_equal(getattr(left, item.name), getattr(right, item.name))
            for item in fields(left)
        )
        for left, right in pairs
    )
