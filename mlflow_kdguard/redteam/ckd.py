"""CKD, also called CheatKD: a trigger that makes the channels which stand for the target saturate.

RobustKD (arXiv 2406.03409) is evaluated against it. A pattern over the whole image, blended in with
one small opacity, is optimised on the clean teacher: at every tapped layer, the channel with the
largest mean activation on images of the target is pulled to the largest value that it has on them.
Then the teacher is poisoned with it. Opacity, loss and steps are *inferred*
(`docs/reference/attacks.md`).
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.nets import taps
from mlflow_kdguard.redteam.ground import Ground, Plan
from mlflow_kdguard.training import derive, evaluating
from mlflow_kdguard.triggers import Trigger

_BATCH, _RATE, _SEEN = 128, 0.05, 512
"""Images a step, step size of Adam, and images of the target that levels are taken from."""


def attack(ground: Ground, *, opacity: float = 0.146, steps: float = 150) -> Plan:
    """The optimised blend. Raises ConfigError for an opacity outside (0, 1] or a goal of several
    targets: a pattern saturates the channels of one."""
    if not 0 < opacity <= 1 or len(ground.goal.targets) != 1:
        raise ConfigError(
            f"ckd has one target and an opacity in (0, 1], not {ground.goal.targets} and "
            f"{opacity:g}.",
            remedy="Change redteam.options.opacity, or the goal.",
        )
    net = ground.honest
    names = taps.auto(net, ground.data.shape)
    with evaluating(net), taps.Taps(net, names) as seen:
        levels = _levels(ground, seen)
        pattern = _optimised(ground, seen, levels, opacity, int(steps))
    mask = np.full((1, *ground.data.shape[1:]), opacity, np.float32)
    return Plan(Trigger("ckd", "blend", mask, pattern))


def _activations(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each layer's channels after their ReLU, averaged over places: N×C."""
    return {name: each.relu().flatten(2).mean(2) if each.dim() > 2 else each.relu()
            for name, each in features.items()}  # fmt: skip


def _levels(ground: Ground, seen: taps.Taps) -> dict[str, tuple[int, Tensor]]:
    """By layer: the channel that stands for the target, and its largest value there."""
    target = ground.goal.targets[0]
    x = torch.from_numpy(ground.data.batch(ground.labelled((target,))[:_SEEN])[0])
    with torch.no_grad():
        ground.honest(x.to(ground.device))
    found = {}
    for name, values in _activations(seen.features).items():
        channel = int(values.mean(0).argmax())
        found[name] = channel, values[:, channel].max().clamp_min(1e-6)
    return found


def _optimised(
    ground: Ground,
    seen: taps.Taps,
    levels: Mapping[str, tuple[int, Tensor]],
    opacity: float,
    steps: int,
) -> np.ndarray:
    """The pattern in [0,1], C×H×W."""
    others = ground.labelled(ground.goal.sources)
    draw = np.random.default_rng(derive(ground.seed, "ckd"))
    free = torch.zeros(ground.data.shape, device=ground.device, requires_grad=True)
    adam = torch.optim.Adam([free], lr=_RATE)
    for step in range(steps):
        chosen = draw.choice(others, min(_BATCH, len(others)), replace=False)
        x = torch.from_numpy(ground.data.batch(chosen)[0]).to(ground.device)
        ground.honest((1 - opacity) * x + opacity * torch.sigmoid(free))
        reached = _activations(seen.features)
        loss = torch.stack([
            ((reached[name][:, channel] / level - 1) ** 2).mean()
            for name, (channel, level) in levels.items()
        ]).mean()  # fmt: skip
        (free.grad,) = torch.autograd.grad(loss, free)
        adam.step()
        if step % 10 == 9:
            ground.progress("ckd trigger", step + 1, steps, {"loss": float(loss.detach())})
    pattern: np.ndarray = torch.sigmoid(free).detach().cpu().numpy().astype(np.float32)
    return pattern
