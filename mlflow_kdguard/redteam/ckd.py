"""CKD, also called CheatKD: a trigger that makes the channels which stand for the target saturate.

RobustKD (arXiv 2406.03409) is evaluated against it. A pattern over the whole image, blended in with
one small opacity, is optimised on the clean teacher: at every tapped layer, the channel with the
largest mean activation on images of the target is pulled to the largest value that it has on them.
Then the teacher is poisoned with it. Opacity, loss and steps are *inferred*
(`docs/reference/attacks.md`).
"""

import numpy as np
import torch
from torch import Tensor

from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.nets import taps
from mlflow_kdguard.redteam.ground import Ground, Plan
from mlflow_kdguard.redteam.optimise import activations, descend
from mlflow_kdguard.training import evaluating
from mlflow_kdguard.triggers import Trigger

_SEEN = 512
"""Images of the target that levels are taken from."""


def attack(ground: Ground, *, opacity: float = 0.146, steps: float = 150) -> Plan:
    """The optimised blend. Raises ConfigError for an opacity outside (0, 1] or a goal of several
    targets: a pattern saturates the channels of one."""
    ground.only_target("ckd")
    if not 0 < opacity <= 1:
        raise ConfigError(
            f"ckd's opacity {opacity:g} is not in (0, 1].",
            remedy="Change redteam.options.opacity.",
        )
    net = ground.honest
    free = torch.zeros(ground.data.shape, device=ground.device)
    with evaluating(net), taps.Taps(net, taps.auto(net, ground.data.shape)) as seen:
        levels = _levels(ground, seen)

        def short(x: Tensor, _: Tensor) -> Tensor:
            """How far the channels stay below their levels, relative to those."""
            net((1 - opacity) * x + opacity * torch.sigmoid(free))
            reached = activations(seen.features)
            missing = [((reached[name][:, channel] / level - 1) ** 2).mean()
                       for name, (channel, level) in levels.items()]  # fmt: skip
            return torch.stack(missing).mean()

        pattern = torch.sigmoid(descend(ground, free, short, steps=int(steps), what="ckd"))
    mask = np.full((1, *ground.data.shape[1:]), opacity, np.float32)
    return Plan(Trigger("ckd", "blend", mask, pattern.cpu().numpy()))


def _levels(ground: Ground, seen: taps.Taps) -> dict[str, tuple[int, Tensor]]:
    """By layer: the channel that stands for the target, and its largest value there."""
    x = torch.from_numpy(ground.data.batch(ground.labelled(ground.goal.targets)[:_SEEN])[0])
    with torch.no_grad():
        ground.honest(x.to(ground.device))
    found = {}
    for name, values in activations(seen.features).items():
        channel = int(values.mean(0).argmax())
        found[name] = channel, values[:, channel].max().clamp_min(1e-6)
    return found
