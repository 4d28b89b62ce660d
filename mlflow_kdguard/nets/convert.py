"""A canonical graph as a torch module: one named submodule a layer, weights trainable.

A teacher that is known only as ONNX can then be tapped, masked and unlearned like any other.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlflow_kdguard.graph import layers
from mlflow_kdguard.graph.layers import INPUT, Array, Graph, Layer


class GraphNet(nn.Module):
    """Runs the layers of a graph in order. forward: N×C×H×W -> N×K logits."""

    def __init__(self, graph: Graph, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_shape = graph.input_shape
        self.classes = graph.classes
        self.layers = nn.ModuleDict()
        self._plan: list[tuple[str, str, tuple[str, ...]]] = []
        for index, layer in enumerate(graph.layers):
            name = f"{index:03d}_{re.sub(r'[^0-9A-Za-z_]', '_', layer.name)}"
            self.layers[name] = _MODULES[type(layer)](layer, dtype)
            self._plan.append((name, layer.name, layer.inputs))
        self._output = graph.output
        self._last_use = {
            value: index for index, layer in enumerate(graph.layers) for value in layer.inputs
        }

    def forward(self, x: Tensor) -> Tensor:
        """N×C×H×W -> N×K logits."""
        values = {INPUT: x}
        for index, (module, name, inputs) in enumerate(self._plan):
            values[name] = self.layers[module](*(values[value] for value in inputs))
            for value in set(inputs):
                if self._last_use[value] == index and value != self._output:
                    del values[value]
        return values[self._output]


def to_torch(graph: Graph, *, dtype: torch.dtype = torch.float32) -> GraphNet:
    """The module that computes what `graph` computes, in eval mode."""
    return GraphNet(graph, dtype).eval()


class Scale(nn.Module):
    """y = factor · x + offset; both broadcast against an image's features."""

    def __init__(self, factor: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.factor = nn.Parameter(factor)
        self.offset = nn.Parameter(offset)

    def forward(self, x: Tensor) -> Tensor:
        """N×… -> N×…"""
        return x * self.factor + self.offset


class Fixed(nn.Module):
    """y = factor · x with a factor that is not trained."""

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        """N×… -> N×…"""
        return x * self.factor


class Clip(nn.Module):
    """y = min(max(x, low), high)."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low = None if low == -float("inf") else low
        self.high = None if high == float("inf") else high

    def forward(self, x: Tensor) -> Tensor:
        """N×… -> N×…"""
        if self.low is None and self.high is None:
            return x
        return x.clamp(self.low, self.high)


class Elementwise(nn.Module):
    """y = rule(x₁, x₂), element by element."""

    def __init__(self, rule: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """N×…, N×… -> N×…"""
        return self.rule(x, y)


class Padded(nn.Module):
    """Pads top, left, bottom, right with one value, then asks the window."""

    def __init__(self, pads: tuple[int, int, int, int], value: float, window: nn.Module) -> None:
        super().__init__()
        top, left, bottom, right = pads
        self.sides = (left, right, top, bottom)
        self.value = value
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """N×C×H×W -> N×C'×H'×W'"""
        padded: Tensor = self.window(functional.pad(x, self.sides, value=self.value))
        return padded


class Reshape(nn.Module):
    """The same numbers of each image in another shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """N×… -> N×shape"""
        return x.reshape(-1, *self.shape)


def _tensor(values: Array, dtype: torch.dtype) -> Tensor:
    # A broadcast view becomes a tensor of its smallest shape, so that weights stay as they were.
    kept = [slice(None) if step else slice(0, 1) for step in values.strides]
    return torch.tensor(values[tuple(kept)].copy(), dtype=dtype)


def _affine(layer: layers.Affine, dtype: torch.dtype) -> nn.Module:
    outside, inside = layer.weight.shape
    module = nn.Linear(inside, outside, device="meta", dtype=dtype)
    return _filled(module, layer.weight, layer.bias)


def _conv(layer: layers.Conv, dtype: torch.dtype) -> nn.Module:
    top, left, bottom, right = layer.pads
    symmetric = (top, left) == (bottom, right)
    module = nn.Conv2d(
        layer.weight.shape[1] * layer.groups,
        layer.weight.shape[0],
        (layer.weight.shape[2], layer.weight.shape[3]),
        stride=layer.strides,
        padding=(top, left) if symmetric else 0,
        dilation=layer.dilations,
        groups=layer.groups,
        device="meta",  # no random start: the global random state is left alone
        dtype=dtype,
    )
    filled = _filled(module, layer.weight, layer.bias)
    return filled if symmetric else Padded(layer.pads, 0.0, filled)


def _filled(module: nn.Linear | nn.Conv2d, weight: Array, bias: Array) -> nn.Module:
    module.weight = nn.Parameter(torch.tensor(weight, dtype=module.weight.dtype))
    module.bias = nn.Parameter(torch.tensor(bias, dtype=module.weight.dtype))
    return module


def _max_pool(layer: layers.MaxPool, _dtype: torch.dtype) -> nn.Module:
    return _pool(nn.MaxPool2d(layer.kernel, layer.strides), layer.pads, -float("inf"))


def _average_pool(layer: layers.AveragePool, dtype: torch.dtype) -> nn.Module:
    pool = _pool(nn.AvgPool2d(layer.kernel, layer.strides), layer.pads, 0.0)
    if layer.count_padding or not any(layer.pads):
        return pool
    # Each mean counted the padding: scale it up by the share of its window that is image.
    ones = torch.ones(1, 1, *_inside(layer), dtype=dtype)
    return nn.Sequential(pool, Fixed(1.0 / pool(ones)[0]))


def _inside(layer: layers.AveragePool) -> tuple[int, ...]:
    """An image size that gives the layer's output size (rows beyond the last window are unseen)."""
    before, after = layer.pads[:2], layer.pads[2:]
    return tuple(
        (count - 1) * stride + side - first - last
        for count, stride, side, first, last in zip(
            layer.shape[1:], layer.strides, layer.kernel, before, after, strict=True
        )
    )


def _pool(window: nn.Module, pads: tuple[int, int, int, int], value: float) -> nn.Module:
    return Padded(pads, value, window) if any(pads) else window


_MODULES: dict[type[Layer], Callable[[Any, torch.dtype], nn.Module]] = {
    layers.Affine: _affine,
    layers.Conv: _conv,
    layers.Scale: lambda layer, dtype: Scale(
        _tensor(layer.factor, dtype), _tensor(layer.offset, dtype)
    ),
    layers.Relu: lambda _layer, _dtype: nn.ReLU(),
    layers.Clip: lambda layer, _dtype: Clip(layer.low, layer.high),
    layers.Add: lambda _layer, _dtype: Elementwise(torch.add),
    layers.Sub: lambda _layer, _dtype: Elementwise(torch.sub),
    layers.Maximum: lambda _layer, _dtype: Elementwise(torch.maximum),
    layers.Minimum: lambda _layer, _dtype: Elementwise(torch.minimum),
    layers.MaxPool: _max_pool,
    layers.AveragePool: _average_pool,
    layers.Reshape: lambda layer, _dtype: Reshape(layer.shape),
}
