"""Linear bounds on the difference of two torch networks, differentiable (CROWN, arXiv 1811.00866).

Each ReLU lies between two lines over the interval of its input (`boxes`). Going backwards, the line
is chosen by the sign of what is asked of it, so that c·z is bounded by one affine function of the
pixels; those of the two networks are subtracted before the pixels take their worst values. The
backward pass is autograd's own, with the lines in place of ReLU's slope: any network of linear
maps and ReLU will do. The bounds are for training and certify nothing.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mlflow_kdguard.errors import ModelError
from mlflow_kdguard.nets.boxes import Box, ball, outputs


def margin_gaps(
    student: nn.Module, reference: nn.Module, x: Tensor, eps: float, directions: Tensor
) -> Tensor:
    """Upper bounds of c·(z_S(x') - z_T(x')) within l_inf `eps` of each image: N×M.

    `directions`: N×M×K, the c of each image. Gradients reach the student alone. Both networks
    must be in evaluation mode. Raises ModelError for functions other than linear maps and ReLU.
    """
    count = directions.shape[1]
    here = _affine(student, x, eps, directions, learn=True)
    there = _affine(reference, x, eps, -directions, learn=False)
    box = ball(x, eps)
    radius = ((box.high - box.low) / 2).repeat_interleave(count, 0).flatten(1)
    worst = ((here[0] + there[0]).abs() * radius).sum(1)
    return (here[1] + there[1] + worst).reshape(-1, count)


def _affine(
    net: nn.Module, x: Tensor, eps: float, directions: Tensor, *, learn: bool
) -> tuple[Tensor, Tensor]:
    """Slopes and value at the box's centre of affine upper bounds of c·z: NM×pixels and NM."""
    count = directions.shape[1]
    with torch.set_grad_enabled(learn):
        _, seen = outputs(net, x, eps)
    box = ball(x, eps)
    centre = ((box.low + box.high) / 2).repeat_interleave(count, 0).requires_grad_(True)
    asked = directions.flatten(0, 1)
    # Twice: what is differentiated by way of lines has their slopes, not those of the network.
    with torch.set_grad_enabled(learn), _Entering() as entering:
        value = (asked * net(centre)).sum(1)
    with torch.enable_grad(), _Lines(seen, entering.inputs, count) as lines:
        (slopes,) = torch.autograd.grad((asked * net(centre)).sum(), centre, create_graph=learn)
    value = value + torch.stack(lines.slack).sum(0) if lines.slack else value
    found = slopes.flatten(1), value
    return found if learn else (found[0].detach(), found[1].detach())


class _Entering(TorchFunctionMode):
    """Within the block, keeps what enters each ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _RELUS:
            self.inputs.append(args[0])
            return args[0].clamp(min=0.0)  # never in place
        return func(*args, **(kwargs or {}))


class _Lines(TorchFunctionMode):
    """Within the block every ReLU passes back through its lines, and leaves its slack here."""

    def __init__(self, seen: list[Box], inputs: list[Tensor], repeats: int) -> None:
        super().__init__()
        self._relus = iter(zip(seen, inputs, strict=True))
        self._repeats = repeats
        self.slack: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _RELUS:
            box, at = next(self._relus)
            low, high = (end.repeat_interleave(self._repeats, 0) for end in (box.low, box.high))
            return _Relaxed.apply(args[0], at, low, high, self.slack)
        if func in _CURVED:
            raise ModelError(
                f"joint bounds do not pass through torch's {func.__name__}.",
                remedy="Set distill.joint_gap to 0.",
            )
        return func(*args, **(kwargs or {}))


_RELUS = (functional.relu, torch.relu)
_CURVED = (
    functional.max_pool2d,
    torch.max_pool2d,
    torch.maximum,
    torch.minimum,
)


class _Relaxed(torch.autograd.Function):
    """ReLU whose backward pass goes through its upper line where more is asked for, else its lower.

    The bound is linear after this ReLU: at the point of evaluation it exceeds the network by what
    each line exceeds its ReLU (whose input there is `at`), weighted by what is asked of it. That is
    what `slack` gathers.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  (torch's own protocol)
        context: Any, x: Tensor, at: Tensor, low: Tensor, high: Tensor, slack: list[Tensor]
    ) -> Tensor:
        context.save_for_backward(at, low, high)
        context.slack = slack
        return x.relu()

    @staticmethod
    def backward(context: Any, *asked: Tensor) -> Any:
        at, low, high = context.saved_tensors
        open_ = (low < 0) & (high > 0)
        width = torch.where(open_, high - low, 1.0)
        closed = (low >= 0).to(at.dtype)
        upper = torch.where(open_, high / width, closed)
        offset = torch.where(open_, -high * low / width, 0.0)
        lower = torch.where(open_, (high > -low).to(at.dtype), closed)
        more, less = asked[0].clamp(min=0.0), asked[0].clamp(max=0.0)
        value = at.relu()
        above = more * (upper * at + offset - value) + less * (lower * at - value)
        context.slack.append(above.flatten(1).sum(1))
        return more * upper + less * lower, None, None, None, None
