"""What is being written: the ONNX nodes and constants so far, and the words all rules share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor, fx

from mlflow_kdguard.errors import ModelError

PIXELS = "pixels"
"""Name of the clipped input, which every exported graph begins with."""


@dataclass(frozen=True, slots=True)
class Padded:
    """An activation with padding that the next window must take over."""

    source: str
    pads: tuple[int, int, int, int]
    value: float


class Batch:
    """Stands for a number that depends on the batch size."""


@dataclass(slots=True, eq=False)
class Writer:
    """Nodes and constants written so far; `values` knows what each traced node became."""

    values: dict[fx.Node, Any] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    named: dict[int, str] = field(default_factory=dict)

    def add(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Write a node; returns the name of its output."""
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, values: Tensor | float) -> str:
        """The name of a float32 constant; a parameter keeps its own."""
        name = self.named.get(id(values), f"constant_{len(self.constants)}")
        tensor = torch.as_tensor(values, dtype=torch.float32).detach()
        self.constants[name] = tensor.contiguous().numpy()
        return name

    def integers(self, values: Sequence[int]) -> str:
        """The name of an int64 constant."""
        name = f"constant_{len(self.constants)}"
        self.constants[name] = np.array(values, dtype=np.int64)
        return name


Arguments = dict[str, Any]
"""Arguments of a traced call by name; activations are names of ONNX values."""


def title(node: fx.Node) -> str:
    """The name of a traced operation in torch.ops.aten."""
    schema = getattr(node.target, "_schema", None)
    return (
        str(schema.name).removeprefix("aten::") if schema else getattr(node.target, "__name__", "")
    )


def refuse(node: fx.Node, reason: str) -> ModelError:
    """The error for an operation that cannot be written, with the layer that it stands in."""
    place = str(next(reversed((node.meta.get("nn_module_stack") or {"": ("", "")}).values()))[0])
    where = f" in layer {place}" if place else ""
    return ModelError(
        f"operation {title(node)}{where} {reason}.",
        remedy="Use convolutions, linear layers, batch norm, ReLU, clamp, pooling, reshaping, "
        "residual sums, maximum and minimum; see docs/reference/networks.md.",
    )


def sides(node: Any) -> tuple[int, ...]:
    """Shape of a traced value without its batch axis."""
    sides = tuple(node.meta["val"].shape[1:])
    if not all(isinstance(side, int) for side in sides):
        raise refuse(node, "mixes the batch with the image")
    return sides


def pair(values: Any) -> list[int]:
    """Height and width of an argument that may be one number for both."""
    sides = [int(value) for value in (values if isinstance(values, list | tuple) else [values])]
    return sides * 2 if len(sides) == 1 else sides
