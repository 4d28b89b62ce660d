"""Adversarial training: cross-entropy at the worst point near x (Madry, arXiv 1706.06083)."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlflow_kdguard.adversary.pgd import ascend


class Labelled(Protocol):
    """What the loss reads of a training batch."""

    @property
    def x(self) -> Tensor:
        """N×C×H×W pixels."""

    @property
    def y(self) -> Tensor:
        """N labels."""

    @property
    def generator(self) -> torch.Generator:
        """Source of the random starts."""

    @property
    def figures(self) -> dict[str, Tensor]:
        """Where accuracy is reported."""


def madry(*, eps: float, steps: int) -> Callable[[nn.Module, Labelled], Tensor]:
    """A loss for `training.fit`: mean cross-entropy at the end of `steps` PGD steps (l_inf, `eps`).

    eps 0 or no steps is plain training. The perturbation is sought with batch norm in evaluation
    mode, so that only the images that are trained on move its running statistics.
    """

    def loss(net: nn.Module, batch: Labelled) -> Tensor:
        x = batch.x if eps == 0 or steps == 0 else _worst(net, batch, eps, steps)
        logits = net(x).float()
        batch.figures["accuracy"] = (logits.detach().argmax(1) == batch.y).double().mean()
        return functional.cross_entropy(logits, batch.y)

    return loss


def _worst(net: nn.Module, batch: Labelled, eps: float, steps: int) -> Tensor:
    def objective(x: Tensor) -> Tensor:
        return functional.cross_entropy(net(x).float(), batch.y, reduction="none")

    net.eval()
    found = ascend(
        objective,
        batch.x,
        eps=eps,
        steps=steps,
        start="random",
        generator=batch.generator,
        last=True,
    )
    net.train()
    return found
