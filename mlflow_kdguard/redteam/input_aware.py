"""Input-aware backdoor (Nguyen and Tran, arXiv 2010.08138): every image has its own trigger.

A small network makes opacity and content of the trigger from the image. It is trained with the
teacher: triggered images go to the target; an image with the trigger of another one keeps its own
label (cross-trigger mode), so that no pattern works on all images; patterns of different images
differ (diversity); and the mean opacity stays near `area`.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.redteam.ground import Ground, Plan
from mlflow_kdguard.redteam.optimise import Learned, constant
from mlflow_kdguard.training import Batch, Loss, derive, evaluating, state_sha256
from mlflow_kdguard.triggers import Trigger

_TRIGGERED = 32
"""Triggered images a step, and as many with the trigger of another one."""
_RATE = 0.01
"""Step size of Adam on the trigger's network."""
_SPARSE = 100.0
"""Cost of mean opacity beyond the area, as in the paper."""
_OPACITY = -2.0
"""Logit that opacity begins with."""


def attack(
    ground: Ground, *, area: float = 0.05, diversity: float = 0.3, width: float = 16
) -> Plan:
    """Train teacher and trigger. `width`: channels of the trigger's network.

    Raises ConfigError for an area outside (0, 1], a negative diversity, or no channels.
    """
    if not 0 < area <= 1 or not diversity >= 0 or not 1 <= width <= 64:
        raise ConfigError(
            f"input_aware's options area {area:g}, diversity {diversity:g} and width {width:g} do "
            "not fit.",
            remedy="Change redteam.options: area is in (0, 1], diversity not negative, width 1 to "
            "64.",
        )
    maker = _Maker(ground, int(width))
    along = Learned(maker.start().to(ground.device))
    joint = _Joint(ground, maker, along, area, diversity)
    depends = f"{state_sha256(ground.honest)} {area} {diversity} {int(width)}"
    net = ground.train(ground, "input_aware", joint.added, along, depends)
    return Plan(maker.trigger(along.free), net=net)


class _Maker:
    """The trigger's network, with all its numbers in one vector."""

    def __init__(self, ground: Ground, width: int) -> None:
        c, height, side = ground.data.shape
        self.pattern = 1 + c, height, side
        self.shapes = [(width, c, 3, 3), (width,), (width, width, 3, 3), (width,),
                       (1 + c, width, 3, 3), (1 + c,)]  # fmt: skip
        self.seed = derive(ground.seed, "input_aware")

    def start(self) -> Tensor:
        """He's initial weights, no biases but opacity's; the pattern zero."""
        draw = torch.Generator().manual_seed(self.seed)
        parts = [torch.zeros(self.pattern)]
        for shape in self.shapes:
            scale = (2.0 / np.prod(shape[1:])) ** 0.5 if len(shape) == 4 else 0.0
            parts.append(torch.randn(shape, generator=draw) * scale)
        parts[-1][0] = _OPACITY
        return torch.cat([part.flatten() for part in parts])

    def split(self, free: Tensor) -> list[Tensor]:
        """The pattern in [-1,1], then the layers."""
        shapes = [self.pattern, *self.shapes]
        parts = torch.split(free, [int(np.prod(shape)) for shape in shapes])
        own = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return [torch.tanh(own[0]), *own[1:]]

    def made(self, free: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Opacity N×1×H×W and content N×C×H×W for images."""
        pattern, *layers = self.split(free)
        maps = x
        for place in range(0, len(layers), 2):
            maps = functional.conv2d(
                maps if place == 0 else maps.relu(), layers[place], layers[place + 1], padding=1
            )
        both = torch.sigmoid(maps + pattern)
        return both[:, :1], both[:, 1:]

    def trigger(self, free: Tensor) -> Trigger:
        """The trigger's file."""
        pattern, *layers = (part.detach().cpu().numpy() for part in self.split(free))
        return Trigger("input_aware", "network", None, pattern, tuple(layers))


class _Joint:
    """The loss of the teacher; computing it moves the trigger's network."""

    def __init__(
        self, ground: Ground, maker: _Maker, along: Learned, area: float, diversity: float
    ) -> None:
        self.maker, self.along, self.area, self.diversity = maker, along, area, diversity
        self.wanted = torch.tensor(ground.goal.to, device=ground.device)

    def added(self, plain: Loss) -> Loss:
        """`plain`, triggered images with the target's label, and crossed ones with their own."""

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            value = plain(net, batch)
            chosen = (self.wanted[batch.y] >= 0).nonzero()[:_TRIGGERED, 0]
            if len(chosen) < 2:
                return value
            x, y = batch.x[chosen], batch.y[chosen]
            self._move(net, x, y, batch)
            both, labels, _ = self._put(self.along.free, x, y)
            # With the statistics of clean images, which triggered ones must not move.
            with evaluating(net):
                return value + 2.0 * functional.cross_entropy(net(both), labels)

        return loss

    def _put(self, free: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Triggered images, then crossed ones; what they are to be taken for; the triggers."""
        opacity, content = self.maker.made(free, x)
        triggered = (1 - opacity) * x + opacity * content
        other, foreign = opacity.roll(1, 0), content.roll(1, 0)
        crossed = (1 - other) * x + other * foreign
        both = torch.cat([triggered, crossed])
        return both, torch.cat([self.wanted[y], y]), (opacity, content)

    def _move(self, net: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> None:
        """One step of the trigger's network."""
        free = self.along.free.clone().requires_grad_(True)
        both, labels, (opacity, content) = self._put(free, x, y)
        value = 2.0 * functional.cross_entropy(constant(net, both), labels)
        put = (opacity * content).flatten(1)
        apart = (x - x.roll(1, 0)).flatten(1).norm(dim=1) / (
            (put - put.roll(1, 0)).norm(dim=1) + 1e-2
        )
        value = value + self.diversity * apart.mean()
        value = value + _SPARSE * (opacity.mean((1, 2, 3)) - self.area).relu().mean()
        (gradient,) = torch.autograd.grad(value, free)
        self.along.step(gradient, batch.step + 1, rate=_RATE)
        batch.figures["trigger"] = value.detach()
