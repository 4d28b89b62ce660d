"""Cheaper gradients with respect to images, on the CPU.

The CPU kernels for the input gradient of a convolution are slow where the input has few channels,
as images do: on 28×28 grey images the first layer's took half of the time of a whole PGD step.
For stride 2 that gradient is itself a plain convolution, one output channel for each of the four
positions within a 2×2 cell of the input, put in place by a pixel shuffle.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_FEW = 4
_PADDING = {3: 1, 5: 2}
"""Kernel size -> padding for which every image gradient depends on 3×3 output cells only."""


class FastSlopes(TorchFunctionMode):
    """Within the block, gradients through first layers reach the images faster, and no weights.

    Convolutions with stride 2, 3×3 or 5×5 kernels and at most four input channels give the same
    outputs as ever, and the same image gradients up to rounding. Everything else is untouched.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.conv2d and not kwargs and _applies(*args):
            return _FewChannels.apply(*args)
        return func(*args, **(kwargs or {}))


class _FewChannels(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        context.save_for_backward(weight)
        return torch.conv2d(x, weight, bias, *rest)

    @staticmethod
    def backward(context: Any, *slopes: Tensor) -> Any:
        (weight,) = context.saved_tensors
        cells = functional.conv2d(slopes[0], _subpixels(weight), padding=1)
        return functional.pixel_shuffle(cells, 2), *[None] * 6


def _applies(x: Any, weight: Tensor, *rest: Any) -> bool:
    """Whether these are arguments of a convolution that is replaced."""
    if len(rest) != 5 or not isinstance(x, Tensor) or not x.requires_grad or x.dim() != 4:
        return False
    _, stride, padding, dilation, groups = rest
    size = weight.shape[2]
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    plain = plain and not torch.is_autocast_enabled("cpu")
    even = x.shape[1] <= _FEW and x.shape[2] % 2 == 0 == x.shape[3] % 2
    square = weight.shape[3] == size in _PADDING
    return bool(
        plain
        and even
        and square
        and tuple(stride) == (2, 2)
        and tuple(dilation) == (1, 1)
        and groups == 1
        and tuple(padding) == (_PADDING[size],) * 2
    )


def _subpixels(weight: Tensor) -> Tensor:
    """O×C×k×k -> 4C×O×3×3, so that the image gradient is a convolution and a pixel shuffle.

    Pixel 2a+r takes output cell a+d through tap r + padding - 2d, for d in -1, 0, 1.
    """
    outside, inside, size, _ = weight.shape
    remainder, d = torch.arange(2)[:, None], torch.arange(-1, 2)[None]
    tap = remainder + _PADDING[size] - 2 * d
    # Taps outside of the kernel read the zero that is appended after it.
    tap = torch.where((tap >= 0) & (tap < size), tap, size)
    padded = functional.pad(weight, (0, 1, 0, 1))
    taken = padded[:, :, tap[:, None, :, None], tap[None, :, None, :]]
    return taken.permute(1, 2, 3, 0, 4, 5).reshape(4 * inside, outside, 3, 3)
