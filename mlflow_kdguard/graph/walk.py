"""The state of reading one graph: which value is a constant, which one a layer's output."""

from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mlflow_kdguard.errors import ModelError
from mlflow_kdguard.graph import canon
from mlflow_kdguard.graph.layers import INPUT, Array, Layer, Shape

LARGEST_ACTIVATION = 2**24
"""Most numbers an image may become in one layer."""
LARGEST_TOTAL = 2**28
"""Most numbers an image may become in all layers together."""


@dataclass(frozen=True, slots=True)
class Activation:
    """A value that depends on the image: the layer that makes it, and its shape without batch."""

    layer: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Size:
    """Integers about shapes; None is the batch size."""

    sides: tuple[int | None, ...]
    scalar: bool = False


Value = Activation | Size | NDArray[np.generic]


@dataclass(slots=True, eq=False)
class Walk:
    """Values known so far, and the layers made from them."""

    where: str
    opset: int
    values: dict[str, Value]
    layers: list[Layer] = field(default_factory=list)
    names: set[str] = field(default_factory=lambda: {INPUT})
    total: int = 0

    def refuse(self, node: onnx.NodeProto, reason: str, remedy: str = canon.EXPORT) -> ModelError:
        """The error for a node that has no canonical layer."""
        return canon.refuse(self.where, f"{canon.title(node)}: {reason}", remedy)

    def activation(self, node: onnx.NodeProto, place: int) -> Activation:
        """Input `place` of a node, which must depend on the image."""
        value = self.value(node, place)
        if not isinstance(value, Activation):
            raise self.refuse(node, f"input {place} must depend on the image, not be a constant")
        return value

    def floats(self, node: onnx.NodeProto, place: int) -> Array:
        """Input `place` of a node, which must be a float constant of bounded magnitude."""
        value = self.value(node, place)
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            raise self.refuse(node, f"input {place} must be a float32 constant")
        return self.bounded(node, value.astype(np.float64))

    def integers(self, node: onnx.NodeProto, place: int) -> list[int]:
        """Input `place` of a node, which must be a list of integers known beforehand.

        A first entry that is the batch size comes as 0, which is how Reshape keeps an axis.
        """
        value = self.value(node, place)
        if isinstance(value, Size) and not value.scalar and None not in value.sides[1:]:
            return [side or 0 for side in value.sides]
        if not isinstance(value, np.ndarray) or value.dtype.kind != "i" or value.ndim != 1:
            raise self.refuse(node, f"input {place} must be a constant list of integers")
        return [int(number) for number in value]

    def bounded(self, node: onnx.NodeProto, values: Array) -> Array:
        """Constants that float32 arithmetic can carry; ModelError otherwise."""
        largest = float(np.abs(values).max(initial=0.0))
        if not largest <= canon.LARGEST_CONSTANT:
            raise self.refuse(
                node,
                f"a constant of magnitude {largest:.3g} (limit {canon.LARGEST_CONSTANT:.0f}) would "
                "swallow the float32 numbers that it meets",
                "Rescale the network's weights.",
            )
        return values

    def value(self, node: onnx.NodeProto, place: int) -> Value:
        """Input `place` of a node, which must be given."""
        if not self.has(node, place):
            raise self.refuse(node, f"input {place} is missing")
        name = node.input[place]
        if name not in self.values:
            raise self.refuse(node, f"input {name!r} is not known at this point")
        return self.values[name]

    def has(self, node: onnx.NodeProto, place: int) -> bool:
        """Whether an optional input is given."""
        return place < len(node.input) and node.input[place] != ""

    def fresh(self, wish: str) -> str:
        """A layer name that is not taken: the wish itself, if possible."""
        name, count = wish, 1
        while name in self.names:
            count += 1
            name = f"{wish}#{count}"
        self.names.add(name)
        return name

    def add(self, node: onnx.NodeProto, layer: Layer) -> Activation:
        """Append a layer and make it the value of the node's output."""
        size = prod(layer.shape)
        self.total += size
        if not layer.shape or min(layer.shape) < 1 or size > LARGEST_ACTIVATION:
            raise self.refuse(node, f"makes an activation of shape {layer.shape}")
        if self.total > LARGEST_TOTAL:
            raise self.refuse(node, f"the activations exceed {LARGEST_TOTAL} numbers an image")
        self.layers.append(layer)
        value = Activation(layer.name, layer.shape)
        self.values[node.output[0]] = value
        return value

    def attributes(self, node: onnx.NodeProto, **defaults: Any) -> dict[str, Any]:
        """The attributes of a node; ModelError for one that is not among `defaults`."""
        found = dict(defaults)
        for attribute in node.attribute:
            if attribute.name not in defaults:
                raise self.refuse(node, f"attribute {attribute.name!r} is not supported")
            found[attribute.name] = onnx.helper.get_attribute_value(attribute)
        return found
