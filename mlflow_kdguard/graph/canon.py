"""Is this ONNX file canonical: can it be read in only one way?

What is refused here are the places where two honest readers of the same bytes disagree, or where
reading would need more than these bytes: see `docs/threat-model.md`. Nothing here looks at what
the nodes compute.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import TensorProto

from mlflow_kdguard.errors import ModelError, NonFiniteError, UnsafeModelError
from mlflow_kdguard.graph.layers import Shape

OPSETS = range(13, 22)
"""Operator sets that are read."""
IR_VERSIONS = range(7, 11)
"""ONNX file versions that are read."""
LARGEST_NODES = 20_000
LARGEST_CONSTANT = 2.0**20
"""Largest magnitude of a constant.

A float32 holds 24 bits. An offset of 2^20 leaves x in [0,1] four of them, and with larger ones
(x + 2^26 - 2^26) the runtime returns zeros where exact arithmetic returns x.
"""

EXPORT = (
    "Export again with one input N×C×H×W (float32, dynamic batch), one output N×K, opset 18, "
    "weights inside the file: torch.onnx.export(net.eval(), (x,), path, dynamo=False, "
    'opset_version=18, dynamic_axes={"x": {0: "N"}, "logits": {0: "N"}}, input_names=["x"], '
    'output_names=["logits"]).'
)


@dataclass(frozen=True, slots=True, eq=False)
class Canonical:
    """A file that passed: its nodes in order, its constants, its input and output.

    `claims`: what it says of the shapes of values inside, not compared with anything yet.
    """

    where: str
    opset: int
    nodes: tuple[onnx.NodeProto, ...]
    constants: dict[str, NDArray[np.generic]]
    input_name: str
    input_shape: Shape
    output_name: str
    output_shape: Shape | None
    claims: tuple[onnx.ValueInfoProto, ...]


def parse(data: bytes, *, where: str) -> Canonical:
    """Decode and check; raises ModelError, UnsafeModelError or NonFiniteError naming `where`."""
    model = _decode(data, where)
    _check_envelope(model, where)
    opset = _opset(model, where)
    graph = model.graph
    _check_names(graph, where)
    constants = {tensor.name: array(tensor, where=where) for tensor in graph.initializer}
    _check_used(graph, where)
    input_name, input_shape = _input(graph, where)
    output_name, output_shape = _output(graph, where)
    return Canonical(
        where,
        opset,
        tuple(graph.node),
        constants,
        input_name,
        input_shape,
        output_name,
        output_shape,
        tuple(graph.value_info),
    )


def refuse(where: str, reason: str, remedy: str = EXPORT) -> ModelError:
    """The error for a file that is not canonical."""
    return ModelError(f"{where}: {reason}.", remedy=remedy)


def _decode(data: bytes, where: str) -> onnx.ModelProto:
    if not data:
        raise refuse(where, "the file is empty", "Name the ONNX file that was meant.")
    broken = "Copy or export the file again: it is truncated, damaged, or not ONNX."
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except (DecodeError, RuntimeError, ValueError) as error:
        raise refuse(where, "these bytes are not an ONNX model", broken) from error
    if not model.HasField("graph") or not model.graph.node:
        raise refuse(where, "these bytes hold no ONNX graph", broken)
    if len(model.graph.node) > LARGEST_NODES:
        raise refuse(where, f"{len(model.graph.node)} nodes, more than {LARGEST_NODES}")
    stripped = onnx.ModelProto()
    stripped.CopyFrom(model)
    stripped.DiscardUnknownFields()
    if stripped.ByteSize() != model.ByteSize():
        raise refuse(where, "the file holds fields that ONNX does not define", broken)
    return model


def _check_envelope(model: onnx.ModelProto, where: str) -> None:
    for present, what in (
        (model.functions, "local functions"),
        (model.training_info, "training information"),
        (model.configuration, "device configurations"),
        (model.graph.sparse_initializer, "sparse initializers"),
        (model.graph.quantization_annotation, "quantisation annotations"),
    ):
        if present:
            raise refuse(where, f"the file holds {what}")
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or node.overload:
            raise refuse(where, f"{title(node)} is of the custom domain {node.domain!r}")
        _check_attributes(node, where)
    _check_onnx(model, where)


def _check_attributes(node: onnx.NodeProto, where: str) -> None:
    names = Counter(attribute.name for attribute in node.attribute)
    for attribute in node.attribute:
        if names[attribute.name] > 1:
            raise refuse(where, f"{title(node)} has two attributes called {attribute.name!r}")
        if attribute.HasField("g") or attribute.graphs:
            raise refuse(where, f"{title(node)} holds a subgraph")
        if attribute.ref_attr_name:
            raise refuse(where, f"{title(node)} refers to an attribute of a function")


def _check_onnx(model: onnx.ModelProto, where: str) -> None:
    # External data are refused first: the checker would look for the file.
    for tensor in model.graph.initializer:
        _check_inline(tensor, where)
    for node in model.graph.node:
        for attribute in node.attribute:
            _check_inline(attribute.t, where)
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise refuse(where, f"not valid ONNX ({reason.rstrip('.')})") from error


def _opset(model: onnx.ModelProto, where: str) -> int:
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if len(versions) != 1 or versions[0] not in OPSETS:
        raise refuse(where, f"opset {versions} is not one of {OPSETS[0]} to {OPSETS[-1]}")
    if model.ir_version not in IR_VERSIONS:
        raise refuse(
            where,
            f"ONNX file version (IR) {model.ir_version} is not one of {IR_VERSIONS[0]} to "
            f"{IR_VERSIONS[-1]}",
        )
    return int(versions[0])


def _check_names(graph: onnx.GraphProto, where: str) -> None:
    values = [value.name for value in (*graph.input, *graph.initializer)]
    values += [name for node in graph.node for name in node.output]
    for name, count in Counter(values).items():
        if not name:
            raise refuse(where, "a value without a name")
        if count > 1:
            raise refuse(where, f"{count} inputs, initializers or node outputs are called {name!r}")
    for name, count in Counter(node.name for node in graph.node).items():
        if name and count > 1:
            raise refuse(where, f"{count} nodes are called {name!r}")


def _check_used(graph: onnx.GraphProto, where: str) -> None:
    needed = {value.name for value in graph.output}
    for node in reversed(graph.node):
        if not needed.intersection(node.output):
            raise refuse(where, f"{title(node)} does not reach the output")
        needed.update(node.input)
    for tensor in graph.initializer:
        if tensor.name not in needed:
            raise refuse(where, f"initializer {tensor.name!r} is not used")


def _check_inline(tensor: TensorProto, where: str) -> None:
    if tensor.data_location != TensorProto.DEFAULT or tensor.external_data:
        raise UnsafeModelError(
            f"{where}: tensor {tensor.name!r} keeps its values in another file.",
            remedy="Store all weights inside the ONNX file (save_as_external_data=False).",
        )


def array(tensor: TensorProto, *, where: str) -> NDArray[np.generic]:
    """A float32 or int64 tensor whose values are given in exactly one way, bounded and finite."""
    kinds: dict[int, str] = {
        TensorProto.FLOAT: "float_data",
        TensorProto.INT64: "int64_data",
    }
    if tensor.data_type not in kinds:
        raise refuse(where, f"tensor {tensor.name!r} is neither float32 nor int64")
    own = kinds[tensor.data_type]
    given = [name for name in ("raw_data", *_TYPED) if getattr(tensor, name)]
    if tensor.HasField("segment") or given not in (["raw_data"], [own]):
        raise refuse(where, f"tensor {tensor.name!r} gives its values {_ways(given)}")
    size = int(np.prod([int(side) for side in tensor.dims], dtype=object)) if tensor.dims else 1
    kind = np.dtype("<f4" if own == "float_data" else "<i8")
    held = (
        len(tensor.raw_data) / kind.itemsize if given == ["raw_data"] else len(getattr(tensor, own))
    )
    if min(tensor.dims, default=1) < 1 or held != size:
        raise refuse(where, f"tensor {tensor.name!r} does not hold {list(tensor.dims)} values")
    values = (
        np.frombuffer(tensor.raw_data, kind)
        if given == ["raw_data"]
        else np.array(getattr(tensor, own), kind)
    ).reshape(tuple(tensor.dims))
    if kind.kind == "f" and not np.isfinite(values).all():
        raise NonFiniteError(
            f"{where}: tensor {tensor.name!r} holds NaN or infinity.",
            remedy="Train again, or export from a checkpoint taken before training diverged.",
        )
    return values


_TYPED = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


def _ways(given: list[str]) -> str:
    return f"as {' and '.join(given)}" if given else "nowhere, or in segments"


def _input(graph: onnx.GraphProto, where: str) -> tuple[str, Shape]:
    if len(graph.input) != 1:
        names = [value.name for value in graph.input]
        raise refuse(where, f"one input is needed, N×C×H×W; the graph has {names}")
    value = graph.input[0]
    batch, shape = _tensor_shape(value, where)
    if shape is None or len(shape) != 3:
        raise refuse(where, f"input {value.name!r} is not N×C×H×W")
    if batch is not None:
        raise refuse(where, f"the batch size of input {value.name!r} is fixed at {batch}")
    return value.name, shape


def _output(graph: onnx.GraphProto, where: str) -> tuple[str, Shape | None]:
    if len(graph.output) != 1:
        names = [value.name for value in graph.output]
        raise refuse(where, f"one output is needed, N×K logits; the graph has {names}")
    value = graph.output[0]
    batch, shape = _tensor_shape(value, where)
    if batch is not None:
        raise refuse(where, f"the batch size of output {value.name!r} is fixed at {batch}")
    return value.name, shape


def _tensor_shape(value: onnx.ValueInfoProto, where: str) -> tuple[int | None, Shape | None]:
    """Batch size (None = dynamic) and the other sides of a float32 tensor (None = undeclared)."""
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or kind.elem_type != TensorProto.FLOAT:
        raise refuse(where, f"{value.name!r} is not a float32 tensor")
    if not kind.HasField("shape"):
        return None, None
    sides = [side.dim_value if side.HasField("dim_value") else None for side in kind.shape.dim]
    if not sides or any(side is None or side < 1 for side in sides[1:]):
        raise refuse(where, f"every side of {value.name!r} but the batch must be fixed")
    return sides[0], tuple(int(side) for side in sides[1:] if side is not None)


def title(node: onnx.NodeProto) -> str:
    """How messages call a node."""
    return f"node {node.name or ', '.join(node.output)!r} ({node.op_type})"
