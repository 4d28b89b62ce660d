"""Bounds of every layer around a batch of images, from the image to the logits.

Boxes go forwards; where a box leaves a switch undecided (a Relu that may be on or off, a maximum
that may be either), the backward pass bounds that switch itself. Decided switches are linear and
cost nothing in all later passes.
"""

import torch
from torch import Tensor

from mlflow_kdguard.certify import ops
from mlflow_kdguard.certify.backward import Relaxed, Seed, highest
from mlflow_kdguard.certify.ball import Ball
from mlflow_kdguard.certify.forms import one_hot
from mlflow_kdguard.certify.joint import Index, Joint
from mlflow_kdguard.certify.lines import around
from mlflow_kdguard.certify.ops import Box
from mlflow_kdguard.certify.rounding import down, up
from mlflow_kdguard.errors import NonFiniteError

_SEPARATE, _MIXED_ONCE, _MIXED = range(3)
"""Whether a value depends on one pixel each, on one mixture of those (where a box is exact), or on
more: only in the last case can a backward pass improve on the box."""


def relax(joint: Joint, ball: Ball, *, tighten: bool) -> Relaxed:
    """Boxes and lines of every operation; `tighten` adds backward bounds of open switches.

    Raises NonFiniteError where a bound overflows float64.
    """
    known = Relaxed(joint, ball, [], [], {})
    mixing: list[int] = []
    for index, op in enumerate(joint.ops):
        mixing.append(_mixing(op, [mixing[i] for i in op.inputs]))
        if isinstance(op, ops.Linear):
            box, scale = ops.through_linear(
                op, tuple(known.boxes[i] for i in op.inputs), joint.terms
            )
        elif isinstance(op, ops.Input):
            box = Box(ball.lo, ball.hi)
            scale = box.magnitude()
        else:
            box, scale = _through_bend(known, index, tighten, mixing)
        known.boxes.append(box)
        known.scales.append(scale.flatten(1).amax(1))
        if not bool(torch.isfinite(known.scales[index]).all()):
            raise NonFiniteError(
                f"bounds of operation {index} ({type(op).__name__}) overflow float64.",
                remedy="The weights are too large to bound; retrain with weight decay.",
            )
    return known


def _mixing(op: ops.Op, inputs: list[int]) -> int:
    if isinstance(op, ops.Sum | ops.Extreme):
        return _MIXED
    if isinstance(op, ops.Affine | ops.Conv):
        return _MIXED_ONCE if inputs[0] == _SEPARATE else _MIXED
    if isinstance(op, ops.Clip) and inputs[0] == _MIXED_ONCE:
        return _MIXED
    return max(inputs, default=_SEPARATE)


def _through_bend(
    known: Relaxed, index: Index, tighten: bool, mixing: list[int]
) -> tuple[Box, Tensor]:
    """Box and error scale of a bent operation; stores its lines."""
    op = known.joint.ops[index]
    low, high = (op.low, op.high) if isinstance(op, ops.Clip) else (0.0, float("inf"))
    boxes = [known.boxes[i] for i in op.inputs]
    size = sum((box.magnitude() for box in boxes[1:]), boxes[0].magnitude())
    switch = (
        boxes[0]
        if len(boxes) == 1
        else Box(down(boxes[0].lo - boxes[1].hi), up(boxes[0].hi - boxes[1].lo))
    )
    if tighten and (len(boxes) == 2 or mixing[op.inputs[0]] == _MIXED):
        switch = _tighten(known, op, switch, low, high)
    known.lines[index] = around(switch, low, high)
    if isinstance(op, ops.Extreme):
        return Box(op.value(*(b.lo for b in boxes)), op.value(*(b.hi for b in boxes))), 4 * size
    known.boxes[op.inputs[0]] = switch
    box = Box(op.value(switch.lo), op.value(switch.hi))
    return box, 2 * (size + box.magnitude())


def _tighten(known: Relaxed, op: ops.Op, switch: Box, low: float, high: float) -> Box:
    """Backward bounds of the switches that the box leaves open.

    The side that is nearer to a decision is bounded first; only those that stay open are bounded
    from the other side too.
    """
    first_low = (switch.lo + switch.hi) / 2 > (low if high == float("inf") else (low + high) / 2)
    for turn in (first_low, ~first_low):
        for side in (-1.0, 1.0):
            still = _open(switch, low, high) & (turn if side < 0 else ~turn)
            switch = _bound_side(known, op, switch, still, side)
    return switch


def _open(switch: Box, low: float, high: float) -> Tensor:
    return ((switch.lo < low) & (switch.hi > low)) | ((switch.lo < high) & (switch.hi > high))


def _bound_side(known: Relaxed, op: ops.Op, switch: Box, rows: Tensor, side: float) -> Box:
    """Improve lo (side = -1) or hi (side = 1) of the switches in `rows` (bool B×shape)."""
    image, index = rows.flatten(1).nonzero(as_tuple=True)
    if len(image) == 0:
        return switch
    shape = known.joint.ops[op.inputs[0]].shape

    def seeds(part: slice) -> list[Seed]:
        signs = torch.full((len(index[part]),), side, dtype=torch.float64, device=index.device)
        first = one_hot(shape, image[part], index[part], signs)
        pairs = zip(op.inputs, (first, first.with_coef(-first.coef)), strict=False)
        return list(pairs)

    bound = highest(known, image, seeds)
    lo, hi = switch.lo.clone(), switch.hi.clone()
    if side > 0:
        hi[rows] = torch.minimum(hi[rows], bound)
    else:
        lo[rows] = torch.maximum(lo[rows], -bound)
    return Box(lo, hi)
