"""Projected gradient ascent on images within a ball (Madry et al., arXiv 1706.06083)."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from mlflow_kdguard.adversary.slopes import FastSlopes
from mlflow_kdguard.errors import ConfigError

Norm = Literal["linf", "l2"]

_EDGE = 1e-6
"""How far inside of the limits gradients are taken."""


def ascend(
    objective: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    eps: float,
    steps: int,
    step: float | None = None,
    norm: Norm = "linf",
    start: Literal["random"] | Tensor | None = None,
    generator: torch.Generator | None = None,
    low: float = 0.0,
    high: float = 1.0,
    last: bool = False,
) -> Tensor:
    """The images within `eps` of `x`, and in [low, high], at which `objective` was largest.

    `objective` maps N×… images to N scores; the best point ever visited is kept row by row, the
    start included (scores are taken 1e-6 inside of the limits). `last` returns the last iterate
    instead and saves the final evaluation, which is what training wants. `step` defaults to
    2.5·eps/steps. `start` is the image itself, a random point of the ball (drawn from
    `generator`), or given points. Raises ConfigError for an unknown norm or a random start
    without a generator.
    """
    if norm not in ("linf", "l2"):
        raise ConfigError(f"there is no norm called {norm!r}.", remedy="Use linf or l2.")
    length = 2.5 * eps / max(steps, 1) if step is None else step
    point = _project(_start(x, start, eps, norm, generator), x, eps, norm).clamp(low, high)
    best, score = point, torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    for number in range(steps if last else steps + 1):
        # A network's own clamp has no gradient at exactly low and high, where most pixels of a
        # scanned digit lie: they would never move.
        moving = point.clamp(low + _EDGE, high - _EDGE).detach().requires_grad_(True)
        with torch.enable_grad(), FastSlopes():
            value = objective(moving)
        if not last:
            better = value.detach() > score
            best = torch.where(_rows(better, x), point, best)
            score = torch.where(better, value.detach(), score)
        if number < steps:
            (slope,) = torch.autograd.grad(value.sum(), moving)
            moved = point + length * _direction(slope, norm)
            point = _project(moved, x, eps, norm).clamp(low, high)
    return point if last else best


def _start(
    x: Tensor,
    start: Literal["random"] | Tensor | None,
    eps: float,
    norm: Norm,
    generator: torch.Generator | None,
) -> Tensor:
    if start is None:
        return x.detach()
    if isinstance(start, Tensor):
        return start.detach()
    if generator is None:
        raise ConfigError("a random start needs a generator.")
    noise = torch.empty_like(x, requires_grad=False)
    if norm == "linf":
        return x.detach() + noise.uniform_(-eps, eps, generator=generator)
    # Uniform in the ball: a uniform direction, at a radius that is the d-th root of a uniform.
    noise.normal_(generator=generator)
    radius = torch.rand(len(x), generator=generator, device=x.device) ** (1.0 / noise[0].numel())
    return x.detach() + eps * _rows(radius, x) * _direction(noise, norm)


def _direction(slope: Tensor, norm: Norm) -> Tensor:
    if norm == "linf":
        return slope.sign()
    return slope / _lengths(slope).clamp_min(1e-12)


def _project(point: Tensor, x: Tensor, eps: float, norm: Norm) -> Tensor:
    if norm == "linf":
        return torch.minimum(torch.maximum(point, x - eps), x + eps).detach()
    shift = point - x
    return (x + shift * (eps / _lengths(shift).clamp_min(1e-12)).clamp_max(1.0)).detach()


def _lengths(shift: Tensor) -> Tensor:
    return _rows(shift.flatten(1).norm(dim=1), shift)


def _rows(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.dim() - 1))
