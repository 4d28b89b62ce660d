"""Layers as the bounds see them: how boxes go forwards and linear functionals go backwards.

Linear operations are exact; the three kinds that are not (Relu, Clip, and the larger or smaller
of two values) are functions of one number, their *switch*: the input, or the difference of the
two inputs, since max(a, b) = b + relu(a - b) and min(a, b) = a - relu(a - b).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from mlflow_kdguard.certify.forms import Form, Shape, clean, dense, settle
from mlflow_kdguard.certify.rounding import TINY, gamma


@dataclass(frozen=True, slots=True, eq=False)
class Op(ABC):
    """One operation: which earlier operations it reads and the shape that it gives."""

    inputs: tuple[int, ...]
    shape: Shape

    def cast(self, dtype: torch.dtype, device: torch.device) -> Self:
        """The same operation with its floating constants in another dtype."""
        changes: dict[str, Any] = {
            item.name: value.to(device=device, dtype=dtype if value.is_floating_point() else None)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **changes)

    @abstractmethod
    def value(self, *x: Tensor) -> Tensor:
        """The operation itself: B×shape of each input to B×shape."""


@dataclass(frozen=True, slots=True, eq=False)
class Input(Op):
    """The image."""

    def value(self, *x: Tensor) -> Tensor:
        """The image itself."""
        return x[0]


class Linear(Op):
    """A linear operation. `terms`: the most products that one sum of it has, either way."""

    __slots__ = ()

    @property
    def terms(self) -> int:
        """Longest sum of products in a pass forwards or backwards."""
        return 1

    @abstractmethod
    def spread(self, *radius: Tensor) -> Tensor:
        """|W| r: the operation without offset, with all constants made positive."""

    @abstractmethod
    def pull(self, form: Form) -> tuple[Form, ...]:
        """The functional seen from each input (without the offset)."""

    @property
    def offset(self) -> Tensor | None:
        """The constant part, 1×shape, or None."""
        return None


@dataclass(frozen=True, slots=True, eq=False)
class Affine(Linear):
    """y = W x + b on the last axis."""

    weight: Tensor
    bias: Tensor

    @property
    def terms(self) -> int:
        return max(self.weight.shape)

    @property
    def offset(self) -> Tensor:
        return self.bias.expand(1, *self.shape)

    def value(self, *x: Tensor) -> Tensor:
        return F.linear(x[0], self.weight, self.bias)

    def spread(self, *radius: Tensor) -> Tensor:
        return F.linear(radius[0], self.weight.abs())

    def pull(self, form: Form) -> tuple[Form, ...]:
        return (Form(dense(form, self.shape).coef @ self.weight),)


@dataclass(frozen=True, slots=True, eq=False)
class Conv(Linear):
    """2-d convolution; `pads` top, left, bottom, right; `source`: the input's shape."""

    weight: Tensor
    bias: Tensor
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]
    groups: int
    source: Shape

    @property
    def terms(self) -> int:
        return self.weight.numel()

    @property
    def offset(self) -> Tensor:
        return self.bias.view(1, -1, 1, 1).expand(1, *self.shape)

    def value(self, *x: Tensor) -> Tensor:
        return self._convolve(x[0], self.weight, self.bias)

    def spread(self, *radius: Tensor) -> Tensor:
        return self._convolve(radius[0], self.weight.abs(), None)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        top, left, bottom, right = self.pads
        if (top, left) == (bottom, right):
            pads = (top, left)
        else:
            x, pads = F.pad(x, (left, right, top, bottom)), (0, 0)
        return F.conv2d(x, weight, bias, self.strides, pads, self.dilations, self.groups)

    def pull(self, form: Form) -> tuple[Form, ...]:
        coef = self._transpose(clean(form, self.shape).coef)
        top, left = self.pads[:2]
        if form.places is None:
            height, width = self.source[1:]
            bottom, right = height + top - coef.shape[2], width + left - coef.shape[3]
            return (Form(F.pad(coef, (-left, right, -top, bottom))),)
        rows = form.places.top * self.strides[0] - top
        columns = form.places.left * self.strides[1] - left
        return (settle(Form(coef, form.places.moved(rows, columns), True), self.source),)

    def _transpose(self, coef: Tensor) -> Tensor:
        """The adjoint without padding, as one matrix product and a fold."""
        n, channels, height, width = coef.shape
        if self.groups > 1:
            return F.conv_transpose2d(
                coef, self.weight, stride=self.strides, dilation=self.dilations, groups=self.groups
            )
        kernel = (int(self.weight.shape[2]), int(self.weight.shape[3]))
        matrix = self.weight.reshape(channels, -1)
        if height * width <= 16:
            flat = coef.permute(0, 2, 3, 1).reshape(-1, channels) @ matrix
            columns = flat.view(n, height * width, -1).transpose(1, 2)
        else:
            columns = matrix.t().expand(n, -1, -1) @ coef.reshape(n, channels, -1)
        size = (
            (height - 1) * self.strides[0] + (kernel[0] - 1) * self.dilations[0] + 1,
            (width - 1) * self.strides[1] + (kernel[1] - 1) * self.dilations[1] + 1,
        )
        return F.fold(columns, size, kernel, dilation=self.dilations, stride=self.strides)


@dataclass(frozen=True, slots=True, eq=False)
class Scale(Linear):
    """y = factor · x + shift, element by element (1×shape each)."""

    factor: Tensor
    shift: Tensor

    @property
    def offset(self) -> Tensor:
        return self.shift

    def value(self, *x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x[0], self.factor)

    def spread(self, *radius: Tensor) -> Tensor:
        return radius[0] * self.factor.abs()

    def pull(self, form: Form) -> tuple[Form, ...]:
        image = torch.zeros(len(form.coef), dtype=torch.int64, device=form.coef.device)
        return (Form(form.coef * form.read(self.factor, image), form.places),)


@dataclass(frozen=True, slots=True, eq=False)
class Sum(Linear):
    """y = x₁ + sign · x₂."""

    sign: float

    def value(self, *x: Tensor) -> Tensor:
        return torch.add(x[0], x[1], alpha=self.sign)

    def spread(self, *radius: Tensor) -> Tensor:
        return radius[0] + radius[1]

    def pull(self, form: Form) -> tuple[Form, ...]:
        return form, form if self.sign > 0 else form.with_coef(-form.coef)


@dataclass(frozen=True, slots=True, eq=False)
class Reshape(Linear):
    """The same numbers in another shape; `source`: the input's shape."""

    source: Shape

    def value(self, *x: Tensor) -> Tensor:
        return x[0].reshape(-1, *self.shape)

    def spread(self, *radius: Tensor) -> Tensor:
        return self.value(*radius)

    def pull(self, form: Form) -> tuple[Form, ...]:
        return (Form(dense(form, self.shape).coef.reshape(-1, *self.source)),)


@dataclass(frozen=True, slots=True, eq=False)
class Select(Linear):
    """The pixels `index` (int64) of each channel, as another C×H×W; `source`: the input's shape."""

    index: Tensor
    source: Shape

    @property
    def terms(self) -> int:
        return len(self.index)

    def value(self, *x: Tensor) -> Tensor:
        return x[0].flatten(2)[:, :, self.index].view(-1, *self.shape)

    def spread(self, *radius: Tensor) -> Tensor:
        return self.value(*radius)

    def pull(self, form: Form) -> tuple[Form, ...]:
        coef = dense(form, self.shape).coef.flatten(2)
        out = coef.new_zeros((len(coef), self.source[0], self.source[1] * self.source[2]))
        return (Form(out.index_add_(2, self.index, coef).view(-1, *self.source)),)


@dataclass(frozen=True, slots=True, eq=False)
class Clip(Op):
    """y = min(max(x, low), high); Relu is Clip(0, inf)."""

    low: float
    high: float

    def value(self, *x: Tensor) -> Tensor:
        return x[0].clamp(self.low, self.high)


@dataclass(frozen=True, slots=True, eq=False)
class Extreme(Op):
    """The larger (`largest`) or the smaller of two values, element by element."""

    largest: bool

    def value(self, *x: Tensor) -> Tensor:
        return torch.maximum(x[0], x[1]) if self.largest else torch.minimum(x[0], x[1])


@dataclass(frozen=True, slots=True, eq=False)
class Box:
    """lo <= value <= hi for B images: B×shape each."""

    lo: Tensor
    hi: Tensor

    def magnitude(self) -> Tensor:
        """Largest possible |value|, element by element."""
        return torch.maximum(self.lo.abs(), self.hi.abs())

    def meet(self, other: "Box") -> "Box":
        """The intersection (both hold)."""
        return Box(torch.maximum(self.lo, other.lo), torch.minimum(self.hi, other.hi))


def through_linear(op: Linear, boxes: tuple[Box, ...], terms: int) -> tuple[Box, Tensor]:
    """Interval arithmetic through a linear operation, rounded outwards.

    Returns the box and Σ|W||x| + |b|, the magnitude that rounding errors scale with (B×shape).
    `terms` is at least the length of every sum involved.
    """
    middles = tuple((box.lo + box.hi) / 2 for box in boxes)
    radii = tuple(
        torch.maximum(box.hi - middle, middle - box.lo) * (1.0 + 1e-15)
        for box, middle in zip(boxes, middles, strict=True)
    )
    sizes = [m.abs() + r for m, r in zip(middles, radii, strict=True)]
    # Products of tiny numbers underflow; those with nothing do not.
    some = (op.spread(*((size > 0.0).to(size.dtype) for size in sizes)) > 0.0).to(sizes[0].dtype)
    scale = op.spread(*sizes) + TINY * some
    offset = op.offset
    if offset is not None:
        scale = scale + offset.abs()
    value, radius = op.value(*middles), op.spread(*radii) + gamma(terms) * scale + TINY * some
    return Box(value - radius, value + radius), scale
