"""From bounded layers to a bounded confidence gap.

For an item (image, class k) the margins of both networks are bounded, then the largest p_H - p_L
for (H, L) = (student, reference) and for (reference, student).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mlflow_kdguard.certify import confidence, keep, margins, refine, split
from mlflow_kdguard.certify.backward import Relaxed
from mlflow_kdguard.certify.confidence import Margins
from mlflow_kdguard.certify.margins import Items
from mlflow_kdguard.certify.rounding import gamma
from mlflow_kdguard.certify.setting import Setting


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Upper bounds of the gap (float64 N), the margins of both networks, and worst points."""

    upper: Tensor
    reference: Margins
    student: Margins
    worst: Tensor | None = None


Method = Callable[[Relaxed, Items], Found]


def bounded(relaxed: Relaxed, classes: Tensor | None, method: Method) -> Found:
    """Bound the gap of the given class of each image, or of all classes (None).

    All classes: the reference's class at the centre first. Another class j whose confidence is at
    most the bound already reached, in both networks, cannot raise it and is not looked at.
    """
    images = torch.arange(len(relaxed.ball.centre), device=relaxed.ball.centre.device)
    if classes is not None:
        return method(relaxed, Items(images, classes))
    top = Items(images, relaxed.joint.logits(relaxed.ball.centre)[0].argmax(1))
    found = method(relaxed, top)
    caps = torch.maximum(margins.caps(found.reference, top), margins.caps(found.student, top))
    image, klass = (~(caps <= found.upper[:, None])).nonzero(as_tuple=True)
    if len(image) == 0:
        return found
    more = method(relaxed, Items(image, klass))
    gaps = torch.minimum(more.upper, caps[image, klass].nan_to_num(1.0).clamp(max=1.0))
    upper = found.upper.scatter_reduce(0, image, gaps, "amax")
    worst = found.worst
    if worst is not None and more.worst is not None:
        raised = gaps >= upper[image]
        worst = worst.index_copy(0, image[raised], more.worst[raised])
    return Found(upper, found.reference, found.student, worst)


def by_boxes(relaxed: Relaxed, items: Items) -> Found:
    """Boxes of the logits only: p(low ends) - p(high ends)."""
    reference = margins.boxed(relaxed, items, relaxed.joint.reference)
    student = margins.boxed(relaxed, items, relaxed.joint.student)
    gap = torch.maximum(
        confidence.interval_gap(student, reference), confidence.interval_gap(reference, student)
    )
    return Found(sound(gap, relaxed), reference, student)


def by_planes(relaxed: Relaxed, items: Items) -> Found:
    """The least of three bounds in each direction: joint planes, linked log-odds, boxes."""
    start = directions(relaxed, items)
    upper, which = start.upper.view(2, -1).max(0)
    worst = start.worst.view(2, len(upper), *relaxed.joint.input_shape)
    worst = worst[which, torch.arange(len(upper), device=upper.device)]
    return Found(sound(upper, relaxed), start.reference, start.student, worst)


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """Both directions of N items (2N rows, first the student's), with what is known of each.

    `upper` (2N) before `sound`; `parameters`: multipliers to go on from.
    """

    rows: split.Rows
    parameters: split.Parameters
    upper: Tensor
    worst: Tensor
    reference: Margins
    student: Margins


def directions(relaxed: Relaxed, items: Items, *, refining: bool = True) -> Directions:
    """Margins, multipliers and bounds of both directions; `refining` halves boxes as well."""
    joint = relaxed.joint
    reference = margins.planes(relaxed, items, (joint.reference,))
    student = margins.planes(relaxed, items, (joint.student,))
    difference = margins.planes(relaxed, items, (joint.reference, joint.student)).box
    mirrored = Margins(-difference.hi, -difference.lo)
    own_reference = margins.link(reference.box, student.box, difference)
    own_student = margins.link(student.box, reference.box, mirrored)
    rows = split.Rows(
        Items(items.image.repeat(2), items.klass.repeat(2)),
        torch.arange(2, device=items.image.device).repeat_interleave(len(items.image))[:, None]
        == 0,
        own_student.joined(own_reference),
        own_reference.joined(own_student),
        mirrored.joined(difference),
        (
            _join(student.above_negative, reference.above_negative),
            _join(reference.above, student.above),
        ),
    )
    plain = torch.minimum(
        confidence.interval_gap(rows.high, rows.low),
        confidence.linked_gap(rows.high, rows.low, rows.difference),
    )
    parameters, upper, worst = _joined(relaxed, rows, plain, refining)
    return Directions(rows, parameters, upper, worst, own_reference, own_student)


def _joined(
    relaxed: Relaxed, rows: split.Rows, plain: Tensor, refining: bool
) -> tuple[split.Parameters, Tensor, Tensor]:
    """Multipliers, the least of `plain` and split bounds (N), and where its plane is highest."""
    best = torch.where(plain.isnan(), 1.0, plain)
    notes = _notes(relaxed, rows) if refining else None
    each = torch.arange(len(best), device=best.device)
    worst = relaxed.ball.centre[rows.items.image]
    parameters = split.search(rows, relaxed.ball)
    for values in (split.start(rows), parameters):
        bound, plane = split.joint_bound(relaxed, rows, split.multipliers(values, rows))
        worst = torch.where((bound < best).view(-1, 1, 1, 1), plane.corner(relaxed.ball), worst)
        best = torch.where(bound < best, bound, best)
        if notes is not None:
            notes.evaluated(keep.names(each), values)
    which = (best > refine.SMALL).nonzero()[:, 0]
    if refining and len(which):
        begin = [value[which] for value in parameters]
        kept = None if notes is None else (notes, keep.names(which))
        bound, corner = refine.refined(relaxed, rows.take(which), begin, kept)
        closer = bound < best[which]
        worst[which[closer]] = corner[closer]
        best[which[closer]] = bound[closer]
    return parameters, best, worst


def _notes(relaxed: Relaxed, rows: split.Rows) -> keep.Halving | None:
    if relaxed.kept is None:
        return None
    outputs = (relaxed.joint.student, relaxed.joint.reference)
    return keep.Halving(relaxed.kept, Setting.of(relaxed, outputs), rows)


def sound(gap: Tensor, relaxed: Relaxed) -> Tensor:
    """Add the error of the exponentials; a bound that is not a number below 1 is 1."""
    raised = gap.clamp(min=0.0) + 4.0 * gamma(64 + 8 * relaxed.joint.classes)
    return torch.where(raised < 1.0, raised, 1.0)


def _join(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat((a[0], b[0])), torch.cat((a[1], b[1]))
