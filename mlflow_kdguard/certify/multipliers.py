"""Choice of the multipliers of the Lagrangian split; any choice is sound, so speed decides.

The network part is replaced by the planes that are already known above each margin, which costs
a small matrix product instead of a pass through both networks. What is found is then bounded by
one real pass.
"""

import torch
from torch import Tensor

from mlflow_kdguard.certify import softmax
from mlflow_kdguard.certify.softmax import Margins

STEPS = 24
_RATE = 0.15

Chosen = tuple[Tensor, Tensor, Tensor]
"""Multipliers of the high and of the low network (N×m each) and the constant (N)."""


def improve(
    boxes: tuple[Margins, Margins],
    high: tuple[Tensor, Tensor],
    low: tuple[Tensor, Tensor],
    x_lo: Tensor,
    x_hi: Tensor,
) -> list[Chosen]:
    """Multipliers to start with, and the best after a few steps of Adam.

    `high`: planes above -a_j (N×m×d coefficients, N×m shifts), `low`: planes above b_j;
    `x_lo`, `x_hi`: N×d ends of the ball's box.
    """
    with torch.inference_mode(False), torch.enable_grad():
        high, low = _own(high), _own(low)
        boxes = Margins(*_own((boxes[0].lo, boxes[0].hi))), Margins(*_own((boxes[1].lo, boxes[1].hi)))
        start = _start(boxes)
        parameters = [value.clone().requires_grad_() for value in start]
        optimiser = torch.optim.Adam(parameters, lr=_RATE, betas=(0.9, 0.9))
        best: Tensor | None = None
        kept = [value.clone() for value in start]
        for _ in range(STEPS):
            chosen = _multipliers(parameters, boxes)
            value = _estimate(chosen, high, low, x_lo, x_hi)
            seen = value.detach()
            better = torch.ones_like(seen, dtype=torch.bool) if best is None else seen < best
            best = seen if best is None else torch.minimum(best, seen)
            for place, parameter in zip(kept, parameters, strict=True):
                place[better] = parameter.detach()[better]
            optimiser.zero_grad()
            value.sum().backward()
            optimiser.step()
    return [_multipliers(values, boxes) for values in (start, kept)]


def _own(values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return values[0].clone(), values[1].clone()


def _start(boxes: tuple[Margins, Margins]) -> list[Tensor]:
    """Parameters of the midpoints' tangents with the secants' slopes."""
    high, low = boxes
    middles = [(box.lo + box.hi) / 2 for box in boxes]
    weights_low = softmax_slope(low)[:, None] * torch.softmax(middles[1], -1)
    return [
        torch.zeros_like(middles[0]),
        softmax_slope(high).log(),
        weights_low.clamp(min=1e-12).log(),
    ]


def softmax_slope(box: Margins) -> Tensor:
    """Secant slope of the sigmoid between the ends of the log-odds, in (0, 1/4]: N."""
    t_lo, t_hi = -torch.logsumexp(box.hi, -1), -torch.logsumexp(box.lo, -1)
    run = (t_hi - t_lo).clamp(min=1e-9)
    return ((torch.sigmoid(t_hi) - torch.sigmoid(t_lo)) / run).clamp(1e-12, 0.25)


def _multipliers(parameters: list[Tensor], boxes: tuple[Margins, Margins]) -> Chosen:
    where, slope, weights_low = parameters
    high, low = boxes
    at = high.lo + torch.sigmoid(where) * (high.hi - high.lo)
    upper = softmax.upper_plane(high, at, slope.exp().clamp(1e-12, 0.25))
    weights = weights_low.exp()
    return upper.weights, weights, upper.constant + softmax.lower_constant(low, weights)


def _estimate(
    chosen: Chosen, high: tuple[Tensor, Tensor], low: tuple[Tensor, Tensor], x_lo: Tensor, x_hi: Tensor
) -> Tensor:
    weights_high, weights_low, constant = chosen
    coef = (-weights_high[:, None] @ high[0] + weights_low[:, None] @ low[0])[:, 0]
    shift = (-weights_high * high[1] + weights_low * low[1]).sum(1)
    top = (coef.clamp(min=0.0) * x_hi + coef.clamp(max=0.0) * x_lo).sum(1)
    return top + shift + constant
