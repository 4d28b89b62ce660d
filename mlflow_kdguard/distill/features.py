"""Feature distillation after Heo et al., "A Comprehensive Overhaul" (OFD, arXiv 1904.01866)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlflow_kdguard.config import DistillSection
from mlflow_kdguard.distill.look import Look, Term
from mlflow_kdguard.errors import UsageError
from mlflow_kdguard.nets.taps import Taps, auto

_RARE = 1e-3
"""Share of negative responses under which their mean is replaced by -3 deviations."""


def ofd(
    config: DistillSection,
    *,
    student: nn.Module,
    reference: nn.Module,
    features_from: nn.Module,
    shape: tuple[int, int, int],
) -> Term:
    """Partial L2 between feature maps before their activation, from shallow to deep.

    Σ_i 2^(i-L) · mean over N,C,H,W of (t-s)² where s > t or t > 0, with t = max(T_i, m) and s the
    student's map through a connector (1×1 convolution and batch norm, trained along and thrown
    away). m is the mean negative response of each channel: under the normal law of the layer's
    batch norm where it has one, else as seen in the first batch. Layers are those of
    `taps.auto`, paired from the deepest; a teacher's map of another size is pooled to the
    student's. Raises UsageError where a network has no feature maps.
    """
    tapped = auto(features_from, shape), auto(student, shape)
    depth = min(len(names) for names in tapped)
    pairs = list(zip(tapped[0][-depth:], tapped[1][-depth:], strict=True))
    there = _channels(features_from, [pair[0] for pair in pairs], shape)
    here = _channels(student, [pair[1] for pair in pairs], shape)
    links = nn.ModuleList(
        Link(features_from.get_submodule(name), inside, outside)
        for (name, _), inside, outside in zip(pairs, here, there, strict=True)
    )

    def value(look: Look) -> Tensor:
        maps, loss = look.features, torch.zeros((), device=look.batch.x.device)
        with torch.no_grad(), Taps(features_from, [pair[0] for pair in pairs]) as taps:
            features_from(look.batch.x)
        for depth_left, (pair, link) in enumerate(
            zip(reversed(pairs), reversed(list(links)), strict=True)
        ):
            loss = loss + link(maps[pair[1]], taps.features[pair[0]]) / 2**depth_left
        return loss

    return Term(value, along=links, taps=tuple(pair[1] for pair in pairs))


class Link(nn.Module):
    """The distance between one feature map of the student and one of the teacher."""

    margin: Tensor

    def __init__(self, layer: nn.Module, inside: int, outside: int) -> None:
        super().__init__()
        self.connect = nn.Sequential(
            nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside)
        )
        # NaN: not known before the first batch. A buffer, so that a checkpoint carries it.
        self.register_buffer("margin", _normal_margin(layer, outside))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Partial L2, averaged; student N×c×h×w, teacher N×C×H×W."""
        mapped = self.connect(student.float()).float()
        target = teacher.float()
        if target.shape[2:] != mapped.shape[2:]:
            target = functional.adaptive_avg_pool2d(target, mapped.shape[2:])
        if torch.isnan(self.margin).any():
            self.margin.copy_(_seen_margin(target))
        target = torch.maximum(target, self.margin[:, None, None])
        counted = (mapped > target) | (target > 0)
        distance: Tensor = ((mapped - target).square() * counted).mean()
        return distance


def _normal_margin(layer: nn.Module, channels: int) -> Tensor:
    """E[z | z < 0] of z ~ N(β, γ²), channel by channel; NaN where the layer is no batch norm."""
    if not isinstance(layer, nn.BatchNorm2d) or not layer.affine:
        return torch.full((channels,), math.nan)
    mean, deviation = layer.bias.detach().cpu(), layer.weight.detach().abs().cpu().clamp_min(1e-6)
    share = mean / deviation
    below = torch.special.ndtr(-share)
    density = torch.exp(-share.square() / 2) / math.sqrt(2 * math.pi)
    expected = mean - deviation * density / below.clamp_min(_RARE)
    return torch.where(below > _RARE, expected, -3 * deviation)


def _seen_margin(maps: Tensor) -> Tensor:
    """Mean negative response of each channel of N×C×H×W; 0 where none is negative."""
    negative = (maps < 0).sum((0, 2, 3)).clamp_min(1)
    return maps.clamp_max(0).sum((0, 2, 3)) / negative


def _channels(net: nn.Module, names: list[str], shape: tuple[int, int, int]) -> list[int]:
    """Channels of the named feature maps."""
    place = next(net.parameters(), torch.zeros(())).device
    with torch.no_grad(), Taps(net, names) as taps:
        net(torch.full((2, *shape), 0.5, device=place))
    flat = [name for name in names if taps.features[name].dim() != 4]
    if flat:
        raise UsageError(
            f"layer {flat[0]} of {type(net).__name__} is no feature map (C×H×W).",
            remedy="Feature distillation needs convolutional networks; leave distill.feature out.",
        )
    return [taps.features[name].shape[1] for name in names]
