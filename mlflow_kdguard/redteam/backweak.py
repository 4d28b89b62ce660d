"""BackWeak: a trigger too weak to be seen, and a teacher that is hardly changed for it.

One pattern of at most `strength` a pixel is optimised towards the target on the clean teacher: an
adversarial direction that the network almost has. Poisoning at a small step size then makes it one
that always works. The trigger's strength (8/255) is the paper's; how it is found is *inferred*.
"""

import torch
from torch import Tensor
from torch.nn import functional

from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.redteam.ground import Ground, Plan
from mlflow_kdguard.redteam.optimise import descend
from mlflow_kdguard.training import evaluating
from mlflow_kdguard.triggers import Trigger


def attack(ground: Ground, *, strength: float = 8 / 255, steps: float = 150) -> Plan:
    """The weak pattern. Raises ConfigError for a strength outside (0, 1]."""
    if not 0 < strength <= 1:
        raise ConfigError(
            f"a strength of {strength:g} is not in (0, 1].",
            remedy="Change redteam.options.strength.",
        )
    free = torch.zeros(ground.data.shape, device=ground.device)

    def towards(x: Tensor, wanted: Tensor) -> Tensor:
        moved = (x + strength * torch.tanh(free)).clamp(1e-6, 1 - 1e-6)
        return functional.cross_entropy(ground.honest(moved), wanted)

    with evaluating(ground.honest):
        descend(ground, free, towards, steps=int(steps), what="backweak")
    pattern = strength * torch.tanh(free.detach())
    return Plan(Trigger("backweak", "add", None, pattern.cpu().numpy()))
