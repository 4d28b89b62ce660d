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
from mlflow_kdguard.errors import SoundnessError
from mlflow_kdguard.graph import Graph, evaluate

SCREEN_STEPS = 4
"""Steps that every (class, sign) pair is given before the best are searched in full."""
KEPT = 2
"""(class, sign) pairs an image that are searched in full."""
_ROWS = 1024

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
    few steps from the centre, then the best `KEPT` pairs of each image are searched from the point
    that screening reached, from `hints` (where a bound is attained), and from random points.
    `joint` may be float32.
    """
    rows = _pairs(joint.classes, ball, classes)
    if classes is None:
        points, values = _ascend(joint, ball, rows, SCREEN_STEPS, 2.0 / SCREEN_STEPS)
        rows = _best_pairs(rows, points, values, len(ball.centre))
    rows = _with_starts(rows, ball, effort.restarts, generator, hints)
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


def _best_pairs(rows: _Rows, points: Tensor, values: Tensor, n: int) -> _Rows:
    order = values.argsort(descending=True)
    order = order[rows.image[order].argsort(stable=True)]
    each = len(order) // n
    kept = order.view(n, each)[:, : min(KEPT, each)].reshape(-1)
    return _Rows(rows.image[kept], rows.klass[kept], rows.sign[kept], points[kept])


def _with_starts(
    rows: _Rows, ball: Ball, restarts: int, generator: torch.Generator, hints: Tensor | None
) -> _Rows:
    starts = [rows.start]
    if hints is not None and restarts > 1:
        starts.append(hints[rows.image].to(rows.start.dtype))
    shape = rows.start.shape
    while len(starts) < max(restarts, 1):
        noise = torch.rand(shape, generator=generator, dtype=torch.float32).to(rows.start)
        starts.append(ball.centre[rows.image].to(rows.start) + ball.eps * (2.0 * noise - 1.0))
    copies = len(starts)
    return _Rows(
        rows.image.repeat(copies), rows.klass.repeat(copies), rows.sign.repeat(copies),
        torch.cat(starts),
    )


def _ascend(
    joint: Joint, ball: Ball, rows: _Rows, steps: int, rate: float
) -> tuple[Tensor, Tensor]:
    """PGD on all rows, in chunks: the best points and their values."""
    points, values = [], []
    dtype = torch.float32
    for at in range(0, len(rows.image), _ROWS):
        image, klass, sign, start = (
            value[at : at + _ROWS] for value in (rows.image, rows.klass, rows.sign, rows.start)
        )

        def gap(x: Tensor, klass: Tensor = klass, sign: Tensor = sign) -> Tensor:
            reference, student = (torch.softmax(z, 1) for z in joint.logits(x))
            return sign * (student - reference).gather(1, klass[:, None])[:, 0]

        found = ascend(
            gap, ball.centre[image].to(dtype), eps=ball.eps, steps=steps, step=rate * ball.eps,
            norm=ball.norm, start=start.to(dtype),
        )
        points.append(found)
        with torch.no_grad():
            values.append(gap(found))
    return torch.cat(points), torch.cat(values)
