"""NAD (Li et al., ICLR 2021, arXiv 2101.05930): attention of a fine-tuned copy as the teacher.

A first copy is fine-tuned on the clean images. A second one learns to have that copy's attention
maps (the sum of squared channels, normalised) at the tapped layers: CE + β·Σ ‖A - A'‖².
With `beta` 0 it is fine-tuning for twice as long: the ablation that its authors left to others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlflow_kdguard.detox.loop import drive
from mlflow_kdguard.detox.state import State, Work
from mlflow_kdguard.detox.tuning import Loss, Tuning, open_copy, options, plain, tuned
from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.nets.taps import Taps, auto

NAME = "nad"
OPTIONS = {"steps": 300.0, "lr": 0.02, "beta": 500.0}


def attention(features: Tensor) -> Tensor:
    """N×C×H×W (or N×C) -> N×P: squares of the channels after their ReLU, summed, of length one."""
    energy = features.relu().square()
    maps = energy.sum(1).flatten(1) if features.dim() > 2 else energy
    return functional.normalize(maps, dim=1)


def cleanse(state: State, work: Work) -> State:
    """Fine-tune a teacher for the copy, then the copy towards its attention."""
    given = options(work, OPTIONS)
    first = Tuning(f"{NAME} teacher", open_copy(state, work), plain, given)
    drive(first, state, work, lambda: state.judge(state.preview(first.module), work.device))
    teacher = first.module.eval().requires_grad_(False)
    layers = work.config.layers
    names = auto(teacher, state.train.shape) if layers == "auto" else layers
    if not names:
        raise ConfigError("detox.layers names no layer.", remedy="Write auto, or layer names.")
    loss = towards(teacher, names, given["beta"])
    return tuned(state, work, Tuning(NAME, open_copy(state, work), loss, given))


def towards(teacher: nn.Module, names: Sequence[str], beta: float) -> Loss:
    """CE + β·Σ over the layers `names` of the mean squared distance to the teacher's attention."""

    def loss(net: nn.Module, x: Tensor, y: Tensor, _: torch.Generator) -> Tensor:
        with torch.no_grad(), Taps(teacher, names) as there:
            teacher(x)
        with Taps(net, names) as here:
            value = functional.cross_entropy(net(x), y)
        apart = [
            (attention(here.features[name]) - attention(there.features[name])).square().mean()
            for name in names
        ]
        return value + beta * torch.stack(apart).sum()

    return loss
