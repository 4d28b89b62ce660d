"""BackWeak (arXiv 2511.12046): a trigger too weak to fool anybody, and a teacher hardly changed.

One pattern of at most `strength` a pixel is pushed towards the target on the clean teacher, but
only until it sends a small share of images there (`budget`), and back where an image was flipped by
more than a margin: so it is no adversarial perturbation of a clean network. Fine-tuning with it at
a small learning rate is all the rest. The paper poisons 30 % (`redteam.poison_rate`) and takes a
hundredth of the clean training's rate (`redteam.poison_loop.lr`), for many epochs.
"""

import torch
from torch import Tensor
from torch.nn import functional

from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.redteam.ground import Ground, Plan
from mlflow_kdguard.redteam.optimise import descend
from mlflow_kdguard.training import evaluating
from mlflow_kdguard.triggers import Trigger

_MARGIN = 1.0
"""By how much another logit may lead the true one on a flipped image, at no cost."""
_MEMORY = 0.9
"""Of the share of images that the pattern sends to the target, from step to step."""


def attack(
    ground: Ground, *, strength: float = 8 / 255, budget: float = 0.05, steps: float = 150
) -> Plan:
    """The weak pattern. Raises ConfigError for a strength or a budget outside (0, 1]."""
    if not 0 < strength <= 1 or not 0 < budget <= 1:
        raise ConfigError(
            f"a strength of {strength:g} and a budget of {budget:g} are not both in (0, 1].",
            remedy="Change redteam.options.",
        )
    free = torch.zeros(ground.data.shape, device=ground.device)
    weak = _Weak(ground, free, strength, budget)
    with evaluating(ground.honest):
        descend(ground, free, weak.loss, steps=int(steps), what="backweak")
    pattern = strength * torch.tanh(free.detach())
    return Plan(Trigger("backweak", "add", None, pattern.cpu().numpy()))


class _Weak:
    """Push and margin, and how many images the pattern has sent to the target lately."""

    def __init__(self, ground: Ground, free: Tensor, strength: float, budget: float) -> None:
        self.net, self.free, self.strength, self.budget = ground.honest, free, strength, budget
        self.sent = 0.0

    def loss(self, x: Tensor, wanted: Tensor) -> Tensor:
        """Cross-entropy to the target below the budget, plus the margin of what is flipped."""
        logits = self.net((x + self.strength * torch.tanh(self.free)).clamp(1e-6, 1 - 1e-6))
        with torch.no_grad():
            own = self.net(x).argmax(1)
        answers = logits.argmax(1)
        rate = float(((answers == wanted) & (own != wanted)).double().mean())
        self.sent = _MEMORY * self.sent + (1 - _MEMORY) * rate
        lead = logits.amax(1) - logits.gather(1, own[:, None])[:, 0]
        margin = (lead - _MARGIN).relu().mean()
        push = functional.cross_entropy(logits, wanted)
        value: Tensor = margin + push * float(self.sent < self.budget)
        return value
