"""The strongest points that an attack in float64 finds, judged by the NumPy interpreter."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlflow_kdguard import graph
from mlflow_kdguard.certify import Ball, Joint
from mlflow_kdguard.graph import Graph

Floats = NDArray[np.float64]
STEPS, STARTS, RANDOM = 60, 4, 64


def strongest(
    models: tuple[Graph, Graph], joint: Joint, ball: Ball, classes: Tensor | None, seed: int
) -> Floats:
    """B: the largest gap found in each ball, at a point that lies in it for certain."""
    generator = torch.Generator().manual_seed(seed)
    found = gaps(models, ball, _random(ball, generator), classes)
    for start in range(STARTS):
        points = _ascended(joint, ball, generator, first=start == 0)
        found = np.maximum(found, gaps(models, ball, points, classes))
    return found


def gaps(models: tuple[Graph, Graph], ball: Ball, points: Tensor, classes: Tensor | None) -> Floats:
    """B: the largest gap among R×B×C×H×W points, of one class or of all."""
    rows, count = points.shape[:2]
    best = np.full(count, 0.0)
    for r in range(rows):
        moved = ball.nearest(points[r])
        kept = ball.contains(moved).numpy()
        values = [_softmax(graph.evaluate(model, moved.numpy())) for model in models]
        gap = np.abs(values[1] - values[0])
        one = gap.max(1) if classes is None else gap[np.arange(count), classes.numpy()]
        best = np.where(kept, np.maximum(best, one), best)
    return best


def _softmax(z: Floats) -> Floats:
    e = np.exp(z - z.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


def _random(ball: Ball, generator: torch.Generator) -> Tensor:
    lo, hi = ball.lo, ball.hi
    u = torch.rand((RANDOM, *lo.shape), generator=generator, dtype=torch.float64)
    u[: RANDOM // 2] = u[: RANDOM // 2].round()
    return torch.cat((ball.centre[None], lo + u * (hi - lo)))


def _ascended(joint: Joint, ball: Ball, generator: torch.Generator, *, first: bool) -> Tensor:
    """2K×B points: every class and sign, steps of the gradient's sign (or length, for l2)."""
    count, k = len(ball.centre), joint.classes
    u = torch.rand((2 * k, *ball.lo.shape), generator=generator, dtype=torch.float64)
    at = ball.lo + u * (ball.hi - ball.lo)
    if first:
        at = ball.centre.expand(2 * k, *ball.centre.shape).clone()
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(k)
    klass = torch.arange(k).repeat_interleave(2)
    every = Ball(*(x.repeat(2 * k, 1, 1, 1) for x in (ball.centre, ball.lo, ball.hi)),
                 ball.eps, ball.norm)  # fmt: skip
    best, top = torch.full((2 * k * count,), -torch.inf, dtype=torch.float64), at.flatten(0, 1)
    point = every.nearest(at.flatten(0, 1))
    for step in range(STEPS):
        point = point.detach().requires_grad_()
        reference, student = (z.softmax(1) for z in joint.logits(point))
        value = (student - reference).gather(1, klass.repeat_interleave(count)[:, None])[:, 0]
        value = value * sign.repeat_interleave(count)
        better = value.detach() > best
        best = torch.where(better, value.detach(), best)
        top = torch.where(better.view(-1, 1, 1, 1), point.detach(), top)
        (slope,) = torch.autograd.grad(value.sum(), point)
        length = ball.eps * 0.5 * 0.93**step
        if ball.norm == "linf":
            move = slope.sign()
        else:
            size = slope.flatten(1).norm(dim=1).clamp(min=1e-300).view(-1, 1, 1, 1)
            move = slope / size
        point = every.nearest(point.detach() + length * move)
    return top.view(2 * k, count, *ball.centre.shape[1:])
