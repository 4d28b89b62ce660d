"""Lower bounds: images in the ball at which the two networks really disagree.

The search runs in float32; what is reported is evaluated in float64, by the NumPy interpreter that
shares no code with the bounds, at a point that lies in the ball for certain.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlflow_kdguard.adversary.pgd import ascend
from mlflow_kdguard.certify.ball import Ball
from mlflow_kdguard.certify.joint import Joint
from mlflow_kdguard.certify.parallel import go_on
from mlflow_kdguard.errors import SoundnessError
from mlflow_kdguard.graph import Graph, evaluate

SCREEN_STEPS = 4
"""Steps that every (class, sign) pair is given before the best are searched in full."""
KEPT = 2
"""(class, sign) pairs an image that are searched on: the first with all starts, others with one."""
_ROWS = 512

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to search: steps of a full search, and its starts (one of them at the centre)."""

    steps: int
    restarts: int


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """One search each: an image of the batch, a class, a sign, and where to start."""

    image: Tensor
    klass: Tensor
    sign: Tensor
    start: Tensor


def softmax(logits: Floats) -> Floats:
    """Softmax over the last axis."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    confidences: Floats = shifted / shifted.sum(-1, keepdims=True)
    return confidences


def search(
    joint: Joint,
    ball: Ball,
    classes: Tensor | None,
    *,
    effort: Effort,
    generator: torch.Generator,
    hints: Tensor | None = None,
) -> Tensor:
    """For each image the point of the largest gap found: float64 B×C×H×W, inside the ball.

    PGD on ±(p_S,k - p_R,k) itself (arXiv 2306.04431). All (class, sign) pairs are screened for a
    few steps from the centre; the best pair of each image is then searched from the point that
    screening reached, from `hints` (where a bound is attained) and from random points, the
    runner-up from its screened point alone. `joint` is float32.
    """
    rows = _pairs(joint.classes, ball, classes)
    leading = torch.ones_like(rows.image, dtype=torch.bool)
    if classes is None:
        points, values = _ascend(joint, ball, rows, SCREEN_STEPS, 2.0 / SCREEN_STEPS)
        rows, leading = _best_pairs(rows, points, values, len(ball.centre))
    rows = _with_starts(
        rows, leading, ball, restarts=effort.restarts, generator=generator, hints=hints
    )
    points, values = _ascend(joint, ball, rows, effort.steps, 2.5 / max(effort.steps, 1))
    best = torch.full((len(ball.centre),), -torch.inf, device=values.device)
    best = best.scatter_reduce(0, rows.image, values, "amax")
    found = ball.centre.clone()
    first = (values >= best[rows.image]).nonzero()[:, 0]
    found[rows.image[first]] = points[first].double()
    return ball.nearest(found)


def attained(
    reference: Graph, student: Graph, ball: Ball, points: Tensor, classes: Tensor | None
) -> Floats:
    """The gap at each point, in float64: N. Raises SoundnessError for a point outside its ball."""
    if not bool(ball.contains(points).all()):
        raise SoundnessError("a witness left its ball: no gap there says anything.")
    pixels = points.cpu().numpy()
    gaps = np.abs(softmax(evaluate(student, pixels)) - softmax(evaluate(reference, pixels)))
    if classes is None:
        largest: Floats = gaps.max(1)
        return largest
    chosen: Floats = gaps[np.arange(len(gaps)), classes.cpu().numpy()]
    return chosen


def _pairs(count: int, ball: Ball, classes: Tensor | None) -> _Rows:
    """Every image with both signs of its class, or of all classes."""
    n, device = len(ball.centre), ball.centre.device
    image = torch.arange(n, device=device)
    klass = classes
    if klass is None:
        klass = torch.arange(count, device=device).repeat(n)
        image = image.repeat_interleave(count)
    image, klass = image.repeat(2), klass.repeat(2)
    sign = torch.ones(len(image), device=device)
    sign[len(image) // 2 :] = -1.0
    return _Rows(image, klass, sign, ball.centre[image])


def _best_pairs(rows: _Rows, points: Tensor, values: Tensor, n: int) -> tuple[_Rows, Tensor]:
    """The best pairs of each image at the points that they reached, and which one leads."""
    order = values.argsort(descending=True)
    order = order[rows.image[order].argsort(stable=True)].view(n, -1)[:, :KEPT]
    leading = torch.zeros_like(order, dtype=torch.bool)
    leading[:, 0] = True
    kept = order.reshape(-1)
    best = _Rows(rows.image[kept], rows.klass[kept], rows.sign[kept], points[kept])
    return best, leading.reshape(-1)


def _with_starts(
    rows: _Rows,
    leading: Tensor,
    ball: Ball,
    *,
    restarts: int,
    generator: torch.Generator,
    hints: Tensor | None,
) -> _Rows:
    """Each row once from its own start, and the leading ones from `restarts` - 1 more."""
    which = leading.nonzero()[:, 0]
    image = rows.image[which]
    centres = ball.centre[image].to(rows.start)
    starts: list[Tensor] = []
    if hints is not None:
        starts.append(hints[image].to(rows.start))
    for _ in range(len(starts), restarts - 1):
        noise = torch.rand(centres.shape, generator=generator).to(rows.start)
        starts.append(centres + ball.eps * (2.0 * noise - 1.0))
    starts = starts[: max(restarts - 1, 0)]
    again = torch.cat(
        (torch.arange(len(rows.image), device=which.device), which.repeat(len(starts)))
    )
    return _Rows(
        rows.image[again], rows.klass[again], rows.sign[again], torch.cat((rows.start, *starts))
    )


def _ascend(
    joint: Joint, ball: Ball, rows: _Rows, steps: int, rate: float
) -> tuple[Tensor, Tensor]:
    """PGD on all rows, in chunks, in float32: the best points and their values."""
    points, values = [], []
    dtype = torch.float32
    for at in range(0, len(rows.image), _ROWS):
        go_on()
        image, klass, sign, start = (
            value[at : at + _ROWS] for value in (rows.image, rows.klass, rows.sign, rows.start)
        )

        def gap(x: Tensor, klass: Tensor = klass, sign: Tensor = sign) -> Tensor:
            reference, student = (torch.softmax(z, 1) for z in joint.logits(x))
            return sign * (student - reference).gather(1, klass[:, None])[:, 0]

        found = ascend(
            gap,
            ball.centre[image].to(dtype),
            eps=ball.eps,
            steps=steps,
            step=rate * ball.eps,
            norm=ball.norm,
            start=start.to(dtype),
        )
        points.append(found)
        with torch.no_grad():
            values.append(gap(found))
    return torch.cat(points), torch.cat(values)
