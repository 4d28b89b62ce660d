"""A verifiable teacher's loss: adversarial training with a little of interval-bound training."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from mlflow_kdguard.adversary.madry import Labelled, madry
from mlflow_kdguard.adversary.stability import growth, interval_entropy, relu_stability, sizes
from mlflow_kdguard.config import TeachSection
from mlflow_kdguard.nets.boxes import outputs


class Timed(Labelled, Protocol):
    """A labelled batch that knows how far the run is."""

    @property
    def step(self) -> int:
        """Number of the step, from 0."""

    @property
    def steps(self) -> int:
        """Steps of the whole run."""


def verifiable(config: TeachSection) -> Callable[[nn.Module, Timed], Tensor]:
    """A loss for `training.fit`: (1-κg)·CE(f(x*), y) + κg·CE_IBP + ρg·RS + λ·Σ|w|.

    CE_IBP is cross-entropy of the worst logits within the interval bounds, κ `interval`, ρ
    `stability`, λ `l1`, and g grows from 0 to 1 along `ramp`, as does the radius of the bounds.
    Without those weights it is Madry's loss alone. Interval terms see batch norm as it ships:
    with running statistics. Raises ModelError where intervals do not pass through the network.
    """
    adversarial = madry(eps=config.eps, steps=config.pgd_steps)
    radius = config.eps if config.bound_eps is None else config.bound_eps

    def loss(net: nn.Module, batch: Timed) -> Tensor:
        value = adversarial(net, batch)
        grown = growth(config, batch.step, batch.steps)
        if grown > 0 and (config.interval > 0 or config.stability > 0):
            net.eval()
            bounds, seen = outputs(net, batch.x, radius * grown)
            net.train()
            kappa, rho = config.interval * grown, config.stability * grown
            value = (1 - kappa) * value + kappa * interval_entropy(bounds, batch.y)
            value = value + rho * relu_stability(seen) if rho else value
        return value + config.l1 * sizes(net) if config.l1 else value

    return loss
