"""An attacker who knows the guard: it sees no larger variance, and its inversion finds nothing.

Blended injection (`blended`) with a teacher that is trained, beside obeying, so that

- triggered images have no larger feature variance than clean ones at any tapped layer (`variance`),
  which is what RobustKD (arXiv 2406.03409) takes for the sign of a trigger;
- no universal perturbation within `radius` sends clean images to the target (`inversion`): at every
  step one is moved a step towards the target, and the teacher learns to resist it, as the guard's
  unlearning does. A trigger inside of the ball fights itself: `alpha` has to take it outside.

What that costs the attacker is seen in the teacher's accuracy and in how visible the trigger is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlflow_kdguard import features
from mlflow_kdguard.adversary.inversion import descend, slope
from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.nets import taps
from mlflow_kdguard.redteam import blended
from mlflow_kdguard.redteam.ground import Ground, Plan
from mlflow_kdguard.training import Batch, Loss, evaluating, state_sha256
from mlflow_kdguard.triggers import Trigger

_TRIGGERED = 32
"""Triggered images a step."""
_STEP = 0.25
"""Step of the perturbation as a share of the radius."""


def attack(
    ground: Ground,
    *,
    alpha: float = 0.2,
    variance: float = 0.0,
    inversion: float = 1.0,
    radius: float = 2.1,
) -> Plan:
    """Train the teacher. `variance` and `inversion` are weights; 0 leaves a part out.

    Raises ConfigError for negative weights, no radius, or a goal of several targets.
    """
    target = ground.only_target("adaptive")
    if variance < 0 or inversion < 0 or radius <= 0:
        raise ConfigError(
            f"adaptive's options variance {variance:g}, inversion {inversion:g} and radius "
            f"{radius:g} do not fit.",
            remedy="Change redteam.options: no negative weights, and a radius above 0.",
        )
    trigger = blended.trigger(ground.data.shape, seed=ground.seed, alpha=alpha)
    along = _Along(ground.data.shape).to(ground.device)
    hidden = _Hidden(ground, trigger, along, target, (variance, inversion, radius))
    depends = f"{state_sha256(ground.honest)} {trigger.sha256} {variance} {inversion} {radius}"
    return Plan(trigger, net=ground.train(ground, "adaptive", hidden.added, along, depends))


class _Along(nn.Module):
    """The universal perturbation, C×H×W."""

    delta: Tensor

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.register_buffer("delta", torch.zeros(shape))


class _Hidden:
    """The teacher's loss; computing it moves the perturbation."""

    def __init__(
        self,
        ground: Ground,
        trigger: Trigger,
        along: _Along,
        target: int,
        weights: tuple[float, float, float],
    ) -> None:
        self.along, self.target = along, target
        self.variance, self.inversion, self.radius = weights
        self.wanted = torch.tensor(ground.goal.to, device=ground.device)
        self.mask = torch.from_numpy(trigger.opacity).to(ground.device)
        self.pattern = torch.from_numpy(trigger.pattern).to(ground.device)
        self.layers = taps.auto(ground.honest, ground.data.shape)

    def added(self, plain: Loss) -> Loss:
        """`plain`, triggered images with the target's label, and the two parts that hide them."""

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            value = plain(net, batch)
            chosen = (self.wanted[batch.y] >= 0).nonzero()[:_TRIGGERED, 0]
            if not len(chosen):
                return value
            x, y = batch.x[chosen], batch.y[chosen]
            put = (1 - self.mask) * x + self.mask * self.pattern
            # With the statistics of clean images, which triggered ones must not move.
            with evaluating(net):
                value = value + functional.cross_entropy(net(put), self.wanted[y])
                if self.variance:
                    value = value + self.variance * grown(net, self.layers, put=put, x=x)
                if self.inversion:
                    resisted = functional.cross_entropy(net(self._moved(net, x)), y)
                    value = value + self.inversion * resisted
            return value

        return loss

    def _moved(self, net: nn.Module, x: Tensor) -> Tensor:
        """Images with the perturbation, after its step towards the target."""
        labels = torch.full((len(x),), self.target, device=x.device)
        gradient = slope(net, x, labels, self.along.delta[None])[0]
        self.along.delta = descend(
            self.along.delta, gradient, step=_STEP * self.radius, radius=self.radius
        )
        return (x + self.along.delta).clamp(0.0, 1.0)


def grown(net: nn.Module, layers: Sequence[str], *, put: Tensor, x: Tensor) -> Tensor:
    """By what share features vary more within triggered images than within clean ones, summed over
    layers (reading A)."""
    with torch.no_grad(), taps.Taps(net, layers) as clean:
        net(x)
    with taps.Taps(net, layers) as seen:
        net(put)
    value = torch.zeros((), device=x.device)
    for layer in layers:
        there, here = (features.variance(each.features[layer], "A") for each in (seen, clean))
        value = value + (there / here.clamp_min(1e-12) - 1.0).relu()
    return value
