"""Triggers that are optimised on the clean teacher: one descent for all of them."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mlflow_kdguard.redteam.ground import Ground
from mlflow_kdguard.training import derive, evaluating

BATCH, RATE = 128, 0.05
"""Images a step, and step size of Adam."""


def descend(
    ground: Ground,
    free: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    what: str,
) -> Tensor:
    """Minimise loss(x, wanted labels) over `free`, on images of the attacked classes.

    `free` is changed in place and returned, without gradients; the draws follow from the seed.
    """
    wanted = ground.goal.wanted(ground.data.y)
    others = ground.labelled(ground.goal.sources)
    draw = np.random.default_rng(derive(ground.seed, what))
    free.requires_grad_(True)
    adam = torch.optim.Adam([free], lr=RATE)
    for step in range(steps):
        chosen = draw.choice(others, min(BATCH, len(others)), replace=False)
        x = torch.from_numpy(ground.data.batch(chosen)[0]).to(ground.device)
        value = loss(x, torch.from_numpy(wanted[chosen]).to(ground.device))
        (free.grad,) = torch.autograd.grad(value, free)
        adam.step()
        if step % 10 == 9:
            ground.progress(f"{what} trigger", step + 1, steps, {"loss": float(value.detach())})
    return free.detach()


class Learned(nn.Module):
    """A tensor that is trained beside a teacher, with its Adam: all of it buffers, so that it goes
    into the teacher's checkpoints, and that the teacher's optimiser leaves it alone."""

    free: Tensor
    first: Tensor
    second: Tensor

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        for name, value in (("free", start), ("first", start * 0.0), ("second", start * 0.0)):
            self.register_buffer(name, value)

    def step(self, gradient: Tensor, number: int, *, rate: float = RATE) -> None:
        """Step `number` (from 1)."""
        self.first.lerp_(gradient, 0.1)
        self.second.lerp_(gradient.square(), 0.001)
        first = self.first / (1 - 0.9**number)
        second = self.second / (1 - 0.999**number)
        self.free -= rate * first / (second.sqrt() + 1e-8)


def activations(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each layer's channels after their ReLU, averaged over places: N×C."""
    return {name: each.relu().flatten(2).mean(2) if each.dim() > 2 else each.relu()
            for name, each in features.items()}  # fmt: skip


def constant(net: nn.Module, x: Tensor) -> Tensor:
    """Logits in evaluation mode, through weights that no gradient reaches."""
    weights = {name: weight.detach() for name, weight in net.named_parameters()}
    with evaluating(net):
        logits: Tensor = functional_call(net, weights, (x,))
        return logits
