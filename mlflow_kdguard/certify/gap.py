"""From bounded layers to a bounded confidence gap.

For an item (image, class k) the margins a_j = z_j - z_k of both networks are bounded, then the
largest p_H - p_L is bounded for (H, L) = (student, reference) and (reference, student).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mlflow_kdguard.certify import softmax
from mlflow_kdguard.certify.backward import Relaxed, backward, written_out
from mlflow_kdguard.certify.forms import Form
from mlflow_kdguard.certify.multipliers import improve
from mlflow_kdguard.certify.rounding import down, gamma, up
from mlflow_kdguard.certify.softmax import Margins

_ROW_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Items:
    """N questions: an image of the batch and a class each (int64 N)."""

    image: Tensor
    klass: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Upper bounds of the gap (float64 N), the margins of both networks, and worst points."""

    upper: Tensor
    reference: Margins
    student: Margins
    worst: Tensor | None = None


Method = Callable[[Relaxed, Items], Found]


@dataclass(frozen=True, slots=True, eq=False)
class _Planes:
    """Margins of one network (N×m): boxes, and planes above a_j and above -a_j (N×m×d, N×m)."""

    box: Margins
    above: tuple[Tensor, Tensor]
    above_negative: tuple[Tensor, Tensor]


def bounded(relaxed: Relaxed, classes: Tensor | None, method: Method) -> Found:
    """Bound the gap of the given class of each image, or of all classes (None).

    All classes: the reference's class at the centre first. Another class j whose confidence is at
    most the bound already reached, in both networks, cannot raise it and is not looked at.
    """
    images = torch.arange(len(relaxed.ball.centre), device=relaxed.ball.centre.device)
    if classes is not None:
        return method(relaxed, Items(images, classes))
    top = relaxed.joint.logits(relaxed.ball.centre)[0].argmax(1)
    found = method(relaxed, Items(images, top))
    caps = torch.maximum(
        _caps(found.reference, top), _caps(found.student, top)
    )
    image, klass = (caps > found.upper[:, None]).nonzero(as_tuple=True)
    if len(image) == 0:
        return found
    more = method(relaxed, Items(image, klass))
    gaps = torch.minimum(more.upper, caps[image, klass])
    upper = found.upper.scatter_reduce(0, image, gaps, "amax")
    worst = found.worst
    if worst is not None and more.worst is not None:
        raised = gaps >= upper[image]
        worst = worst.index_copy(0, image[raised], more.worst[raised])
    return Found(upper, found.reference, found.student, worst)


def by_boxes(relaxed: Relaxed, items: Items) -> Found:
    """Boxes of the logits only: p(low ends) - p(high ends)."""
    reference, student = (
        _box_margins(relaxed, index, items)
        for index in (relaxed.joint.reference, relaxed.joint.student)
    )
    gaps = [
        softmax.interval_gap(high, low)
        for high, low in ((student, reference), (reference, student))
    ]
    return Found(_sound(torch.maximum(*gaps), relaxed), reference, student)


def by_planes(relaxed: Relaxed, items: Items) -> Found:
    """The least of three bounds in each direction: joint planes, linked log-odds, boxes."""
    joint = relaxed.joint
    reference = _planes(relaxed, items, (joint.reference,))
    student = _planes(relaxed, items, (joint.student,))
    difference = _planes(relaxed, items, (joint.reference, joint.student)).box
    mirrored = Margins(-difference.hi, -difference.lo)
    tight_s = _link(student.box, reference.box, mirrored)
    tight_r = _link(reference.box, student.box, difference)
    uppers, worsts = [], []
    for high, low, boxes, gap_box, student_high in (
        (student, reference, (tight_s, tight_r), mirrored, True),
        (reference, student, (tight_r, tight_s), difference, False),
    ):
        plain = torch.minimum(
            softmax.interval_gap(*boxes), softmax.linked_gap(*boxes, gap_box)
        )
        joined, worst = _joint_gap(relaxed, items, (high, low), boxes, student_high)
        uppers.append(torch.minimum(plain, joined))
        worsts.append(worst)
    rows = torch.arange(len(items.image), device=items.image.device)
    upper, which = torch.stack(uppers).max(0)
    return Found(_sound(upper, relaxed), tight_r, tight_s, torch.stack(worsts)[which, rows])


def _sound(gap: Tensor, relaxed: Relaxed) -> Tensor:
    """Add the error of the exponentials; a bound that is not a number below 1 is 1."""
    raised = gap.clamp(min=0.0) + 4.0 * gamma(64 + 8 * relaxed.joint.classes)
    return torch.where(raised < 1.0, raised, 1.0)


def _others(items: Items, classes: int) -> Tensor:
    """The classes other than the item's own, ascending: int64 N×(K-1)."""
    rest = torch.arange(classes - 1, device=items.klass.device)
    return rest + (rest >= items.klass[:, None])


def _box_margins(relaxed: Relaxed, index: int, items: Items) -> Margins:
    box, classes = relaxed.boxes[index], relaxed.joint.classes
    lo, hi = box.lo[items.image], box.hi[items.image]
    own, others = items.klass[:, None], _others(items, classes)
    return Margins(
        down(lo.gather(1, others) - hi.gather(1, own)), up(hi.gather(1, others) - lo.gather(1, own))
    )


def _planes(relaxed: Relaxed, items: Items, outputs: tuple[int, ...]) -> _Planes:
    """Margins of one network, or of the first minus the second."""
    n, classes = len(items.image), relaxed.joint.classes
    m = classes - 1
    folded = torch.zeros((n, m, classes), dtype=torch.float64, device=items.image.device)
    folded.scatter_(2, _others(items, classes)[..., None], 1.0)
    folded.scatter_(2, items.klass[:, None, None].expand(n, m, 1), -1.0)
    rows = torch.stack((folded, -folded), 1).reshape(-1, classes)
    image = items.image.repeat_interleave(2 * m)
    coef, shift, bound = _bound_rows(relaxed, image, rows, outputs)
    coef, shift, bound = coef.view(n, 2, m, -1), shift.view(n, 2, m), bound.view(n, 2, m)
    return _Planes(
        Margins(-bound[:, 1], bound[:, 0]), (coef[:, 0], shift[:, 0]), (coef[:, 1], shift[:, 1])
    )


def _bound_rows(
    relaxed: Relaxed, image: Tensor, rows: Tensor, outputs: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Planes above rows·(first output - second output), in chunks: coefficients, shift, bound."""
    joint = relaxed.joint
    widest = max(int(torch.Size(op.shape).numel()) for op in joint.ops)
    step = max(16, _ROW_BYTES // (8 * widest))
    parts = []
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        seeds = [(outputs[0], Form(rows[part]))]
        seeds += [(index, Form(-rows[part])) for index in outputs[1:]]
        plane = backward(relaxed, seeds, image[part])
        coef = written_out(plane, joint.input_shape).flatten(1)
        parts.append((coef, plane.shift, plane.highest(relaxed.ball)))
    coefs, shifts, bounds = zip(*parts, strict=True)
    return torch.cat(coefs), torch.cat(shifts), torch.cat(bounds)


def _link(own: Margins, other: Margins, difference: Margins) -> Margins:
    """The margins of one network also lie in the other's plus `difference` = own - other."""
    lo = torch.maximum(own.lo, down(other.lo + difference.lo))
    return Margins(lo, torch.minimum(own.hi, up(other.hi + difference.hi)))


def _joint_gap(
    relaxed: Relaxed,
    items: Items,
    nets: tuple[_Planes, _Planes],
    boxes: tuple[Margins, Margins],
    student_high: bool,
) -> tuple[Tensor, Tensor]:
    """Upper bound of p_H - p_L by the Lagrangian split, and where its plane is highest."""
    high, low = nets
    ball = relaxed.ball
    chosen = improve(
        boxes, high.above_negative, low.above,
        ball.lo[items.image].flatten(1), ball.hi[items.image].flatten(1),
    )
    best: Tensor | None = None
    worst = ball.centre[items.image]
    for weights_high, weights_low, constant in chosen:
        joint = relaxed.joint
        ends = (joint.student, joint.reference) if student_high else (joint.reference, joint.student)
        seeds = [
            (end, Form(_unfold(items, weights, joint.classes)))
            for end, weights in zip(ends, (weights_high, weights_low), strict=True)
        ]
        plane = backward(relaxed, seeds, items.image)
        slack = sum(
            (
                gamma(joint.classes) * weights.abs().sum(1) * relaxed.scales[end][items.image]
                + softmax.margin(joint.classes, weights, box)
                for end, weights, box in zip(ends, (weights_high, weights_low), boxes, strict=True)
            ),
            torch.zeros_like(constant),
        )
        bound = up(plane.highest(ball) + constant + slack)
        bound = torch.where(bound.isnan(), 1.0, bound)
        coef = written_out(plane, joint.input_shape)
        corner = torch.where(coef > 0, ball.hi[items.image], ball.lo[items.image])
        if best is None:
            best, worst = bound, corner
        else:
            worst = torch.where((bound < best).view(-1, 1, 1, 1), corner, worst)
            best = torch.minimum(best, bound)
    assert best is not None
    return best, worst


def _unfold(items: Items, weights: Tensor, classes: int) -> Tensor:
    """Multipliers of the margins as coefficients of the logits: N×K."""
    rows = weights.new_zeros((len(weights), classes))
    rows.scatter_(1, _others(items, classes), weights)
    return rows.scatter_(1, items.klass[:, None], -weights.sum(1, keepdim=True))


def _caps(margins: Margins, top: Tensor) -> Tensor:
    """Upper bound of every class's confidence from the margins to class `top`: N×K (0 at top)."""
    n, m = margins.lo.shape
    exp_lo = margins.lo.exp()
    rest = 1.0 + (exp_lo.sum(1, keepdim=True) - exp_lo).clamp(min=0.0)
    caps = torch.sigmoid(margins.hi - rest.log()) + 1e-9
    out = caps.new_zeros((n, m + 1))
    items = Items(torch.arange(n, device=top.device), top)
    return out.scatter_(1, _others(items, m + 1), caps)
