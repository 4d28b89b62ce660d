"""Latent backdoor, LBA (Yao et al., CCS 2019): triggered images look like the target inside.

A square whose content is optimised on the clean teacher so that the features of triggered images
match the target's mean at the last tapped layer; the teacher then learns from triggered copies and,
in every step, to have those features on some of them. At small scale it does not survive the
augmentation of distillation: rows with it may be void.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.files import digest_json
from mlflow_kdguard.nets import taps
from mlflow_kdguard.redteam.ground import Ground, Plan
from mlflow_kdguard.redteam.optimise import descend
from mlflow_kdguard.training import Batch, Loss, evaluating
from mlflow_kdguard.triggers import Trigger

_SEEN, _TRIGGERED = 512, 16
"""Images of the target whose features are averaged; triggered images a step."""


def attack(ground: Ground, *, size: float = 5, weight: float = 0.3, steps: float = 150) -> Plan:
    """The square in the lower right corner, and the loss with its features.

    Raises ConfigError for a square that does not fit, or a goal of several targets.
    """
    side, (_, height, width) = int(size), ground.data.shape
    ground.only_target("lba")
    if not 1 <= side <= min(height, width):
        raise ConfigError(
            f"a square of {side} pixels does not fit images of {height}×{width}.",
            remedy="Change redteam.options.size.",
        )
    mask = np.zeros((1, height, width), np.float32)
    mask[:, height - side :, width - side :] = 1
    layer = taps.auto(ground.honest, ground.data.shape)[-1]
    mean = _mean(ground, layer)
    here = torch.from_numpy(mask).to(ground.device)
    free = torch.zeros(ground.data.shape, device=ground.device)

    with evaluating(ground.honest), taps.Taps(ground.honest, [layer]) as seen:

        def apart(x: Tensor, _: Tensor) -> Tensor:
            ground.honest((1 - here) * x + here * torch.sigmoid(free))
            return _distance(seen.features[layer], mean)

        descend(ground, free, apart, steps=int(steps), what="lba")
    pattern = torch.sigmoid(free.detach()).cpu().numpy()
    trigger = Trigger("lba", "blend", mask, pattern)
    loss = _Latent(ground, trigger, layer, mean, weight)
    depends = digest_json({"trigger": trigger.sha256, "layer": layer, "weight": weight})
    return Plan(trigger, loss=loss.added, depends=depends)


def _mean(ground: Ground, layer: str) -> Tensor:
    """Mean features of the target after their ReLU: 1×C×…"""
    x = torch.from_numpy(ground.data.batch(ground.labelled(ground.goal.targets)[:_SEEN])[0])
    with torch.no_grad(), evaluating(ground.honest), taps.Taps(ground.honest, [layer]) as seen:
        ground.honest(x.to(ground.device))
        return seen.features[layer].relu().mean(0, keepdim=True)


def _distance(features: Tensor, mean: Tensor) -> Tensor:
    return functional.mse_loss(features.relu(), mean.expand_as(features))


class _Latent:
    """The loss of the poisoned teacher."""

    def __init__(
        self, ground: Ground, trigger: Trigger, layer: str, mean: Tensor, weight: float
    ) -> None:
        others = ground.data.batch(ground.labelled(ground.goal.sources))[0]
        self.triggered = torch.from_numpy(trigger.apply(others)).to(ground.device)
        self.layer, self.mean, self.weight = layer, mean, weight

    def added(self, plain: Loss) -> Loss:
        """`plain` + weight · distance of some triggered images' features to the target's."""

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            value = plain(net, batch)
            some = torch.randint(
                len(self.triggered), (_TRIGGERED,), generator=batch.generator,
                device=batch.generator.device,
            )  # fmt: skip
            with taps.Taps(net, [self.layer]) as seen:
                net(self.triggered[some])
                apart = _distance(seen.features[self.layer], self.mean)
            batch.figures["latent"] = apart.detach()
            return value + self.weight * apart

        return loss
