"""Interval bounds through any torch network (IBP, Gowal et al., arXiv 1810.12715), differentiable.

A `Box` stands for the tensors between `low` and `high`. A network is asked for a box as it is asked
for a tensor: torch hands each of its functions to `Box.__torch_function__`, which answers with the
box of what the function can return. The bounds are for training: they are in the network's own
precision, without outward rounding, and certify nothing.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlflow_kdguard.errors import ModelError


class Box:
    """Tensors between `low` and `high`, N×… each; `seen` collects what enters each ReLU."""

    def __init__(self, low: Tensor, high: Tensor, seen: list["Box"] | None = None) -> None:
        self.low, self.high = low, high
        self.seen: list[Box] = [] if seen is None else seen

    @property
    def shape(self) -> torch.Size:
        """Shape of both ends."""
        return self.low.shape

    def dim(self) -> int:
        """Number of dimensions of both ends."""
        return self.low.dim()

    def size(self, *at: int) -> Any:
        """As `Tensor.size`."""
        return self.low.size(*at)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> "Box":
        rule = _RULES.get(func)
        if rule is None:
            name = getattr(func, "__name__", str(func))
            raise ModelError(
                f"interval bounds do not pass through torch's {name}.",
                remedy="Train without interval terms, or build the network of linear layers, "
                "convolutions, ReLU, pooling, batch norm and sums.",
            )
        found: Box = rule(*args, **(kwargs or {}))
        return found

    def clamp(self, low: float | None = None, high: float | None = None) -> "Box":
        """Both ends clamped."""
        return Box(self.low.clamp(low, high), self.high.clamp(low, high), self.seen)

    def flatten(self, start: int = 0, end: int = -1) -> "Box":
        """As `Tensor.flatten`."""
        return Box(self.low.flatten(start, end), self.high.flatten(start, end), self.seen)

    def reshape(self, *shape: Any) -> "Box":
        """As `Tensor.reshape`."""
        return Box(self.low.reshape(*shape), self.high.reshape(*shape), self.seen)

    def __add__(self, other: Any) -> "Box":
        return _add(self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> "Box":
        return _add(self, -other)

    def __neg__(self) -> "Box":
        return Box(-self.high, -self.low, self.seen)

    def __mul__(self, factor: Any) -> "Box":
        one, two = self.low * factor, self.high * factor
        return Box(torch.minimum(one, two), torch.maximum(one, two), self.seen)

    __rmul__ = __mul__

    def __truediv__(self, factor: Any) -> "Box":
        return self.__mul__(1.0 / factor)


def ball(x: Tensor, eps: float) -> Box:
    """Pixels within l_inf `eps` of x, and in [0,1]."""
    return Box((x - eps).clamp(0.0, 1.0), (x + eps).clamp(0.0, 1.0))


def outputs(net: nn.Module, x: Tensor, eps: float) -> tuple[Box, list[Box]]:
    """Bounds of the logits around each image, N×K, and of what enters each ReLU.

    The network must be in evaluation mode (`training.evaluating`): the bounds are those of the
    network that ships, whose batch norm is an affine map. Raises ModelError for a network with
    other functions than linear maps, ReLU, clamps, pooling and sums.
    """
    box: Any = ball(x, eps)
    found = net(box)
    assert isinstance(found, Box)
    return found, found.seen


def _linear(box: Box, weight: Tensor, bias: Tensor | None = None) -> Box:
    return _affine(box, weight, functional.linear, bias)


def _convolution(
    box: Box, weight: Tensor, bias: Tensor | None = None, *rest: Any, **named: Any
) -> Box:
    wide = None if bias is None else bias.reshape(-1, 1, 1)
    return _affine(box, weight, lambda x, w: functional.conv2d(x, w, None, *rest, **named), wide)


def _affine(
    box: Box, weight: Tensor, apply: Callable[[Tensor, Tensor], Tensor], bias: Tensor | None
) -> Box:
    """Centre through the weights, radius through their sizes."""
    centre = apply((box.high + box.low) / 2, weight)
    if bias is not None:
        centre = centre + bias
    radius = apply((box.high - box.low) / 2, weight.abs())
    return Box(centre - radius, centre + radius, box.seen)


def _relu(box: Box, *_: Any, **__: Any) -> Box:
    box.seen.append(box)
    return Box(box.low.relu(), box.high.relu(), box.seen)


def _batch_norm(  # noqa: PLR0917  (torch's own signature)
    box: Box,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Box:
    if training:
        raise ModelError(
            "interval bounds need batch norm with fixed statistics.",
            remedy="Put the network into evaluation mode.",
        )
    side = [-1, *[1] * (box.dim() - 2)]
    factor = torch.rsqrt(variance + eps)
    factor = factor if weight is None else factor * weight
    offset = -mean * factor
    offset = offset if bias is None else offset + bias
    return box * factor.reshape(side) + offset.reshape(side)


def _add(one: Any, two: Any) -> Box:
    return _pairwise(torch.add, one, two)


def _subtract(one: Any, two: Any) -> Box:
    return _pairwise(torch.add, one, -two)


def _pairwise(function: Callable[..., Any], one: Any, two: Any) -> Box:
    """A function that grows with both of its inputs, of which one may be a tensor or a number."""
    seen = one.seen if isinstance(one, Box) else two.seen
    first, second = (
        (side.low, side.high) if isinstance(side, Box) else (side, side) for side in (one, two)
    )
    return Box(function(first[0], second[0]), function(first[1], second[1]), seen)


def _ends(function: Callable[..., Any]) -> Callable[..., Box]:
    """A function that grows with each of its inputs: ends go to ends."""

    def rule(box: Box, *args: Any, **named: Any) -> Box:
        return Box(function(box.low, *args, **named), function(box.high, *args, **named), box.seen)

    return rule


_GROWING: tuple[Callable[..., Any], ...] = (
    torch.flatten,
    torch.clamp,
    torch.max_pool2d,
    functional.max_pool2d,
    functional.avg_pool2d,
    functional.adaptive_avg_pool2d,
    functional.pad,
)
_RULES: dict[Any, Callable[..., Box]] = {
    functional.linear: _linear,
    torch.conv2d: _convolution,
    functional.conv2d: _convolution,
    functional.relu: _relu,
    torch.relu: _relu,
    functional.batch_norm: _batch_norm,
    torch.add: _add,
    torch.sub: _subtract,
    torch.maximum: partial(_pairwise, torch.maximum),
    torch.minimum: partial(_pairwise, torch.minimum),
    **{function: _ends(function) for function in _GROWING},
}
