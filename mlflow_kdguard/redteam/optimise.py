"""Triggers that are optimised on the clean teacher: one descent for all of them."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from mlflow_kdguard.redteam.ground import Ground
from mlflow_kdguard.training import derive

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


def activations(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each layer's channels after their ReLU, averaged over places: N×C."""
    return {name: each.relu().flatten(2).mean(2) if each.dim() > 2 else each.relu()
            for name, each in features.items()}  # fmt: skip
