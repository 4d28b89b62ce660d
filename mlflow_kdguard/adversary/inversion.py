"""Universal targeted perturbations: the smallest trigger that a network could have learned.

For a class t, one additive pattern δ with ‖δ‖₂ <= radius (pixels in [0,1]) is searched that sends
clean images of all other classes to t:

    δ <- project(δ - step · g/‖g‖),   g = ∇_δ mean CE(f(clip(x + δ, 0, 1)), t),   y(x) ≠ t

A backdoor is a shortcut of exactly this kind, so the rate of its target stands out from the rates
of the other classes (Neural Cleanse's idea, Wang et al. 2019, with an L2 ball instead of a mask).
How far it must stand out depends on the training regime; see `audit.calibration`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlflow_kdguard.errors import DataError, NonFiniteError, UsageError
from mlflow_kdguard.records import Progress, Rate, silent

_AT_ONCE = 1024
"""Images in one forward pass."""
_EDGE = 1e-6
"""How far inside of [0,1] gradients are taken."""
_STEP = 0.2
"""Step of the search as a share of the radius."""


@dataclass(frozen=True, slots=True, eq=False)
class Inverted:
    """The pattern found for one class: C×H×W, to be added to pixels, and how often it works.

    `rate` counts the given images of other classes that are sent to `target`.
    """

    target: int
    delta: Tensor
    rate: Rate


def project(delta: Tensor, radius: float) -> Tensor:
    """Each pattern of …×C×H×W scaled back into the L2 ball of `radius`."""
    norm = delta.flatten(-3).norm(dim=-1).clamp_min(1e-12)
    scaled: Tensor = delta * (radius / norm).clamp_max(1.0)[..., None, None, None]
    return scaled


def descend(delta: Tensor, gradient: Tensor, *, step: float, radius: float) -> Tensor:
    """One normalised gradient step inside the L2 ball; delta and gradient: …×C×H×W."""
    norm = gradient.flatten(-3).norm(dim=-1).clamp_min(1e-12)
    return project(delta - step * gradient / norm[..., None, None, None], radius)


def invert(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    target: int,
    *,
    radius: float,
    steps: int,
    batch: int,
    generator: torch.Generator,
    step: float | None = None,
) -> Inverted:
    """Search the universal perturbation of one class.

    x: N×C×H×W pixels, y: N labels, on the network's device; `generator` is a CPU generator.
    Raises DataError without images of another class, NonFiniteError for logits that are not finite.
    """
    search = _Search(net, x, y, radius, steps, batch, _STEP * radius if step is None else step)
    return search.run((target,), _seeds(generator, 1))[0]


def invert_all(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    classes: int,
    radius: float,
    steps: int,
    batch: int,
    generator: torch.Generator,
    step: float | None = None,
    targets: Sequence[int] | None = None,
    progress: Progress = silent,
) -> tuple[Inverted, ...]:
    """`invert` for every class (or `targets`), several classes in one pass.

    Each class draws from a generator of its own, so that the groups do not change what is drawn.
    """
    asked = tuple(range(classes)) if targets is None else tuple(targets)
    if any(not 0 <= target < classes for target in asked):
        raise UsageError(f"targets {asked} are not all classes of 0..{classes - 1}.")
    search = _Search(net, x, y, radius, steps, batch, _STEP * radius if step is None else step)
    seeds = _seeds(generator, len(asked))
    size = max(1, _AT_ONCE // batch)
    results: list[Inverted] = []
    for start in range(0, len(asked), size):
        group = asked[start : start + size]
        results += search.run(group, seeds[start : start + size])
        best = max(found.rate.rate for found in results)
        progress("inversion", len(results), len(asked), {"rate_max": best})
    return tuple(results)


def reach(
    net: nn.Module, x: Tensor, y: Tensor, target: int, *, radius: float, steps: int = 4
) -> Rate:
    """How many images of other classes reach `target` by a small perturbation of their own.

    Projected gradient descent from each image, steps of 1.5·radius/steps in an L2 ball of
    `radius`; black and white pixels stay as they are, so that what an image shows is changed and
    nothing is drawn beside it. A trigger that is made for each image leaves no universal pattern,
    but it makes its class near from everywhere. Raises DataError, NonFiniteError.
    """
    others, hits = _others(y, target).to(x.device), 0
    with _frozen(net):
        for start in range(0, len(others), _AT_ONCE):
            images = x[others[start : start + _AT_ONCE]]
            labels = torch.full((len(images),), target, device=x.device)
            delta = torch.zeros_like(images)
            for _ in range(steps):
                moved = images + delta
                inside = (moved > _EDGE) & (moved < 1.0 - _EDGE)
                gradient = slope(net, images, labels, delta) * inside
                delta = descend(delta, gradient, step=1.5 * radius / steps, radius=radius)
            with torch.no_grad():
                answers = net((images + delta).clamp(0.0, 1.0)).argmax(1)
            hits += int((answers == target).sum())
    return Rate(k=hits, n=len(others))


def rate(net: nn.Module, x: Tensor, y: Tensor, target: int, delta: Tensor) -> Rate:
    """How many images of other classes `delta` sends to `target`."""
    return _rated(net, x, y, (target,), delta[None])[0].rate


@contextmanager
def _frozen(net: nn.Module) -> Iterator[None]:
    """Evaluation mode and no weight gradients, restored afterwards."""
    modes = [(module, module.training) for module in net.modules()]
    wanted = [(weight, weight.requires_grad) for weight in net.parameters()]
    net.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for weight, requires in wanted:
            weight.requires_grad_(requires)


def _seeds(generator: torch.Generator, count: int) -> list[int]:
    return [int(seed) for seed in torch.randint(2**62, (count,), generator=generator)]


@dataclass(frozen=True, slots=True, eq=False)
class _Search:
    """Images and settings that all classes share."""

    net: nn.Module
    x: Tensor
    y: Tensor
    radius: float
    steps: int
    batch: int
    step: float

    def run(self, targets: Sequence[int], seeds: Sequence[int]) -> list[Inverted]:
        """The patterns of a few classes, found together, with their rates."""
        return _rated(self.net, self.x, self.y, targets, self._deltas(targets, seeds))

    def _deltas(self, targets: Sequence[int], seeds: Sequence[int]) -> Tensor:
        x, batch = self.x, self.batch
        others = [_others(self.y, target) for target in targets]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        labels = torch.tensor(targets, device=x.device).repeat_interleave(batch)
        delta = torch.zeros((len(targets), *x.shape[1:]), device=x.device, dtype=x.dtype)
        with _frozen(self.net):
            for _ in range(self.steps):
                drawn = [
                    other[torch.randint(len(other), (batch,), generator=generator)]
                    for other, generator in zip(others, generators, strict=True)
                ]
                gradient = slope(self.net, x[torch.cat(drawn).to(x.device)], labels, delta)
                delta = descend(delta, gradient, step=self.step, radius=self.radius)
        return delta


def slope(net: nn.Module, images: Tensor, labels: Tensor, delta: Tensor) -> Tensor:
    """∇_δ of the summed cross-entropy towards `labels`, T×C×H×W for T patterns.

    images: N×C×H×W with N = T·(images a pattern), in the order of the patterns. A pixel at exactly
    0 or 1 counts as movable: torch's clamp has no gradient there, and most pixels of a scanned
    digit are exactly 0, so the gradient is taken a hair inside of both limits.
    Raises NonFiniteError.
    """
    moved = images + delta.repeat_interleave(len(images) // len(delta), dim=0)
    point = moved.clamp(_EDGE, 1.0 - _EDGE).detach().requires_grad_(True)
    loss = functional.cross_entropy(net(point), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, point)
    if not torch.isfinite(gradient).all():
        raise NonFiniteError(
            "the network's gradient is not finite during inversion.",
            remedy="Check the model's weights and outputs.",
        )
    movable = gradient * ((moved >= 0.0) & (moved <= 1.0))
    return movable.reshape(len(delta), -1, *delta.shape[1:]).sum(1)


def _others(y: Tensor, target: int) -> Tensor:
    """Positions of labelled images of other classes, on the CPU."""
    others = ((y != target) & (y >= 0)).nonzero().flatten().cpu()
    if len(others) == 0:
        raise DataError(
            f"no labelled image of a class other than {target}: nothing to invert with.",
            remedy="Give clean labelled images of all classes (data.clean).",
        )
    return others


def _rated(
    net: nn.Module, x: Tensor, y: Tensor, targets: Sequence[int], deltas: Tensor
) -> list[Inverted]:
    results = []
    with _frozen(net), torch.no_grad():
        for target, delta in zip(targets, deltas, strict=True):
            others = _others(y, target).to(x.device)
            hits = 0
            for start in range(0, len(others), _AT_ONCE):
                images = x[others[start : start + _AT_ONCE]]
                answers = net((images + delta).clamp(0.0, 1.0)).argmax(1)
                hits += int((answers == target).sum())
            results.append(Inverted(target, delta, Rate(k=hits, n=len(others))))
    return results
