"""A torch network as ONNX bytes: traced once by torch.export, then written node by node.

Only what the graph reader reads is written (`docs/decisions/0030-own-onnx-writer.md`): anything
else in the trace is an error that names it. What depends on parameters alone (a mask's sigmoid, a
statistic's reshape) is computed here and becomes a constant. The same weights give the same bytes.
"""

import copy
import warnings
from collections.abc import Sequence

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn
from torch.export.graph_signature import InputKind

from mlflow_kdguard.errors import KDGuardError, ModelError
from mlflow_kdguard.nets import emitters
from mlflow_kdguard.nets.writer import PIXELS, Writer

IR_VERSION = 10
"""ONNX file version that every runtime in use loads."""


def to_bytes(net: nn.Module, shape: Sequence[int], *, opset: int) -> bytes:
    """The network in eval mode as one ONNX file; the caller's network is left as it is.

    `shape` is (C, H, W). Input "x" N×C×H×W, output "logits" N×K, Clip(0,1) first, weights inside.
    Raises ModelError naming the first operation that has no canonical form.
    """
    program = _trace(net, shape)
    writer = _written(program)
    outputs = program.graph.output_node().args[0]
    output = outputs[0] if isinstance(outputs, tuple) and len(outputs) == 1 else None
    logits = writer.values.get(output) if isinstance(output, fx.Node) else None
    sides = tuple(output.meta["val"].shape) if isinstance(output, fx.Node) else ()
    if not isinstance(logits, str) or logits == PIXELS or len(sides) != 2:
        raise ModelError(
            f"{type(net).__name__} does not return N×K logits of its images.",
            remedy="Return one tensor of logits from forward in eval mode.",
        )
    return _serialised(writer, logits, tuple(shape), int(sides[1]), opset)


def _trace(net: nn.Module, shape: Sequence[int]) -> torch.export.ExportedProgram:
    """All operations of one forward pass, with a batch size that stays open."""
    own = copy.deepcopy(net).cpu().float().eval()
    batch = {0: torch.export.Dim("N", min=1)}
    with warnings.catch_warnings(), torch.no_grad():
        # torch's own deprecations inside its tracer say nothing about the caller's network.
        warnings.filterwarnings("ignore", module=r"torch\.")
        try:
            return torch.export.export(
                own, (torch.zeros(2, *shape),), dynamic_shapes=(batch,), strict=False
            )
        except KDGuardError:
            raise
        except Exception as error:  # tracing runs the network's own code
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"{type(net).__name__} cannot be traced for export: {reason}",
                remedy="forward must not branch on values of the images or fix the batch size.",
            ) from error


def _written(program: torch.export.ExportedProgram) -> Writer:
    writer = Writer()
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    tensors = {**program.state_dict, **program.constants}
    for node in program.graph.nodes:
        if node.op == "placeholder" and specs[node.name].kind is InputKind.USER_INPUT:
            low, high = writer.constant(0.0), writer.constant(1.0)
            writer.values[node] = writer.add("Clip", ("x", low, high))
            _rename(writer.nodes, writer.values[node], PIXELS)
            writer.values[node] = PIXELS
        elif node.op == "placeholder":
            target = specs[node.name].target
            writer.values[node] = tensor = tensors[target]
            writer.named[id(tensor)] = str(target)
        elif node.op == "call_function":
            writer.values[node] = emitters.emit(writer, node)
    return writer


def _rename(nodes: list[onnx.NodeProto], old: str, new: str) -> None:
    for node in nodes:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]
        node.name = new if node.name == old else node.name


def _serialised(
    writer: Writer, logits: str, shape: tuple[int, ...], classes: int, opset: int
) -> bytes:
    _rename(writer.nodes, logits, "logits")
    nodes: list[onnx.NodeProto] = []
    needed = {"logits"}
    for node in reversed(writer.nodes):
        if needed.intersection(node.output):
            nodes.insert(0, node)
            needed.update(node.input)
    constants = {name: values for name, values in writer.constants.items() if name in needed}
    graph = helper.make_graph(
        nodes,
        "kdguard",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])],
        initializer=[numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=IR_VERSION,
        producer_name="mlflow-kdguard",
    )
    return bytes(model.SerializeToString(deterministic=True))
