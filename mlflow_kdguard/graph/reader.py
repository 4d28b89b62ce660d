"""ONNX bytes -> canonical layers: one table row an operator."""

from collections.abc import Callable

import onnx

from mlflow_kdguard.errors import KDGuardError
from mlflow_kdguard.files import sha256
from mlflow_kdguard.graph import canon, claims, operators, sizes, windows
from mlflow_kdguard.graph.layers import INPUT, Clip, Graph
from mlflow_kdguard.graph.walk import Activation, Walk

OPERATORS: dict[str, Callable[[Walk, onnx.NodeProto], None]] = {
    "Add": operators.add,
    "AveragePool": windows.average_pool,
    "BatchNormalization": windows.batch_normalization,
    "Clip": operators.clip,
    "Concat": sizes.concat,
    "Constant": operators.constant,
    "Conv": windows.conv,
    "Div": operators.div,
    "Flatten": operators.flatten,
    "Gather": sizes.gather,
    "Gemm": operators.gemm,
    "GlobalAveragePool": windows.global_average_pool,
    "Identity": operators.identity,
    "MatMul": operators.matmul,
    "Max": operators.maximum,
    "MaxPool": windows.max_pool,
    "Min": operators.minimum,
    "Mul": operators.mul,
    "ReduceMean": windows.reduce_mean,
    "Relu": operators.relu,
    "Reshape": operators.reshape,
    "Shape": sizes.shape,
    "Squeeze": operators.squeeze,
    "Sub": operators.sub,
    "Unsqueeze": operators.unsqueeze,
}
"""Every operator that is read; all others are refused."""


def read(data: bytes, *, where: str, require_clip: bool = True) -> Graph:
    """Read an ONNX file into canonical layers; nothing in it is executed.

    `where` names the file in messages. `require_clip`: the graph must begin by clipping its input
    to [0,1], as every exported graph does; a teacher from outside may lack it.

    Raises ModelError (UnsafeModelError, NonFiniteError) with the node and the reason where the
    file is malformed, not canonical, or uses what bounds cannot be computed for.
    """
    file = canon.parse(data, where=where)
    walk = Walk(where, file.opset, dict(file.constants))
    walk.values[file.input_name] = Activation(INPUT, file.input_shape)
    for node in file.nodes:
        _read_node(walk, node)
    claims.check(walk, file.claims)
    output = walk.values.get(file.output_name)
    if not isinstance(output, Activation) or len(output.shape) != 1 or not walk.layers:
        raise canon.refuse(where, f"output {file.output_name!r} is not N×K logits of the image")
    if file.output_shape not in (None, output.shape):
        reason = f"the file declares an output of shape {file.output_shape} and computes"
        raise canon.refuse(where, f"{reason} {output.shape}")
    layers = tuple(walk.layers)
    by_name = {layer.name: layer for layer in layers}
    graph = Graph(file.input_shape, layers, output.layer, sha256(data), by_name)
    if require_clip and not clips_first(graph):
        raise canon.refuse(
            where,
            "the graph does not begin with Clip(0, 1) on its input",
            "Export it with `kdguard export`, which puts the clip first.",
        )
    return graph


def clips_first(graph: Graph) -> bool:
    """Whether all that the graph sees of its input went through Clip(0, 1)."""
    users = [layer for layer in graph.layers if INPUT in layer.inputs]
    return (
        len(users) == 1 and isinstance(users[0], Clip) and (users[0].low, users[0].high) == (0, 1)
    )


def _read_node(walk: Walk, node: onnx.NodeProto) -> None:
    if node.op_type not in OPERATORS:
        known = ", ".join(sorted(OPERATORS))
        raise walk.refuse(node, "this operator is not supported", f"Supported: {known}.")
    if len(node.output) != 1:
        raise walk.refuse(node, "has more than one output")
    try:
        OPERATORS[node.op_type](walk, node)
    except KDGuardError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError) as error:
        # An attribute or a tensor of a kind that its operator does not have.
        raise walk.refuse(node, f"is malformed ({error})") from error
