"""The canonical layers that every ONNX graph is read into.

A `Graph` is a list of layers in topological order. Each layer has a unique name and names its
inputs; "input" is the graph's own input, an image C×H×W (no batch axis: every layer acts on each
image alone, which the reader checks). Constants are NumPy arrays in float64 that hold exactly the
float32 values of the file. Shapes leave out the batch axis.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Shape = tuple[int, ...]

INPUT = "input"
"""Name of the graph's input."""


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """Base of all layers: a unique name, the names of its inputs, the shape of its output."""

    name: str
    inputs: tuple[str, ...]
    shape: Shape


@dataclass(frozen=True, slots=True, eq=False)
class Affine(Layer):
    """y = W x + b on the last axis. weight: out×in, bias: out."""

    weight: Array
    bias: Array


@dataclass(frozen=True, slots=True, eq=False)
class Conv(Layer):
    """2-d convolution. weight: out×(in/groups)×kh×kw, bias: out; pads: top, left, bottom, right."""

    weight: Array
    bias: Array
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]
    groups: int


@dataclass(frozen=True, slots=True, eq=False)
class Scale(Layer):
    """y = factor · x + offset, element by element (factor and offset have the output's shape)."""

    factor: Array
    offset: Array


@dataclass(frozen=True, slots=True, eq=False)
class Relu(Layer):
    """y = max(x, 0)."""


@dataclass(frozen=True, slots=True, eq=False)
class Clip(Layer):
    """y = min(max(x, low), high)."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class Add(Layer):
    """y = x₁ + x₂, both of the output's shape."""


@dataclass(frozen=True, slots=True, eq=False)
class Sub(Layer):
    """y = x₁ - x₂, both of the output's shape."""


@dataclass(frozen=True, slots=True, eq=False)
class Maximum(Layer):
    """y = max(x₁, x₂), element by element, both of the output's shape."""


@dataclass(frozen=True, slots=True, eq=False)
class Minimum(Layer):
    """y = min(x₁, x₂), element by element, both of the output's shape."""


@dataclass(frozen=True, slots=True, eq=False)
class MaxPool(Layer):
    """Largest value of each window; padding never wins."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class AveragePool(Layer):
    """Mean of each window. `count_padding` says whether padding counts as zeros in the mean."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    count_padding: bool


@dataclass(frozen=True, slots=True, eq=False)
class Reshape(Layer):
    """The same numbers in another shape (Flatten, Reshape, Squeeze, Unsqueeze); row-major."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A whole network: image C×H×W in, logits out."""

    input_shape: Shape
    layers: tuple[Layer, ...]
    output: str
    sha256: str
    by_name: dict[str, Layer] = field(repr=False, compare=False)

    @property
    def classes(self) -> int:
        """Number of logits."""
        return self.by_name[self.output].shape[0]
