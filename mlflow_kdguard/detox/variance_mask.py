"""RobustKD's detoxification mask (arXiv:2406.03409) inside the forward pass.

At each tapped layer the features F (C×H×W) are replaced by F' before the next layer sees them:

    reference   F' = (1 - m)·F + m·p    m = cap·sigmoid(w), one value an element
    paper       F' = F + m·p            m = min(cap, 0.2)·sigmoid(w), one value a layer

p starts at the mean clean feature map. Only w and p are trained; the teacher is frozen, its batch
norm in evaluation mode. The loss is CE + λ·L_f/L_f(first step), with L_f one of the readings of
`features` summed over the layers, or left out. The paper names the goal of L_f but not its formula
or weight, nor the mask's optimiser: both presets are in part our reading.
"""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlflow_kdguard import features
from mlflow_kdguard.config import DetoxSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.detox.keep import keep
from mlflow_kdguard.detox.loop import drive
from mlflow_kdguard.detox.state import State, Work
from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.nets.taps import Taps, auto, insert

NAME = "variance_mask"
PAPER_CAP = 0.2
"""Largest scalar mask value in the paper's additive form."""
_IMAGES = 512


class Mask(nn.Module):
    """F' = factor·F + offset with trained w and p; `paper` picks the additive form."""

    def __init__(self, pattern: Tensor, *, cap: float, paper: bool) -> None:
        super().__init__()
        self.cap = min(cap, PAPER_CAP) if paper else cap
        self.paper = paper
        self.pattern = nn.Parameter(pattern.clone())
        self.weight = nn.Parameter(torch.zeros(()) if paper else torch.zeros_like(pattern))
        self.to(pattern.device)

    @property
    def share(self) -> Tensor:
        """m in [0, cap]."""
        return self.cap * torch.sigmoid(self.weight)

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """factor and offset, each of the map's shape."""
        m = self.share
        factor = torch.ones_like(self.pattern) if self.paper else 1.0 - m
        return factor, m * self.pattern

    def forward(self, maps: Tensor) -> Tensor:
        """N×C×H×W -> N×C×H×W."""
        factor, offset = self.coefficients()
        return factor * maps + offset


class Scaled(nn.Module):
    """A finished mask: F' = factor·F + offset, constants that export as they are."""

    factor: Tensor
    offset: Tensor

    def __init__(self, factor: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor.detach().clone())
        self.register_buffer("offset", offset.detach().clone())

    def forward(self, maps: Tensor) -> Tensor:
        """N×C×H×W -> N×C×H×W."""
        return self.factor * maps + self.offset


class _Training:
    """Adam on (w, p) of all masks."""

    name = NAME

    def __init__(self, net: nn.Module, masks: Mapping[str, Mask], config: DetoxSection) -> None:
        self.steps = config.mask_steps
        self.module: nn.Module = nn.ModuleList(masks.values())
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
            self.module.parameters(), lr=config.mask_lr
        )
        self.memory: dict[str, Tensor] = {}
        self._net, self._names, self._config = net, tuple(masks), config

    def advance(self, x: Tensor, y: Tensor, step: int, generator: torch.Generator) -> Tensor:
        """CE + λ·L_f/L_f(first step)."""
        self.optimizer.zero_grad(set_to_none=True)
        with Taps(self._net, self._names) as taps:
            loss = functional.cross_entropy(self._net(x), y)
        if self._config.variance != "none":
            variance = features.total(taps.features, self._config.variance)
            first = self.memory.setdefault("first", variance.detach().clone())
            self.memory["last"] = variance.detach().clone()
            ratio = variance / first.clamp_min(torch.finfo(first.dtype).tiny)
            loss = loss + self._config.variance_weight * ratio
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()


def cleanse(state: State, work: Work) -> State:
    """Mask the copy's features, train the masks on clean images, and freeze them.

    Raises UsageError for layers that the network does not have, ConfigError for none at all.
    """
    config = work.config
    if not config.layers:
        raise ConfigError("detox.layers names no layer.", remedy="Write auto, or layer names.")
    copy = deepcopy(state.copy).eval().requires_grad_(False)
    names = auto(copy, state.train.shape) if config.layers == "auto" else config.layers
    masks = masked(copy, names, state.train, config=config, device=work.device)
    training = _Training(copy, masks, config)
    preview = state.preview(copy)
    kept = drive(training, state, work, lambda: state.judge(preview, work.device))
    finish(copy, masks)
    details = _details(training, masks)
    keep(state, work, NAME, {name: copy.get_submodule(name)[1] for name in names}, "masks")  # type: ignore[index]
    return state.trained(
        copy,
        name=NAME,
        outcome=kept.outcome,
        kept_at=kept.at,
        steps=training.steps,
        device=work.device,
        details=details,
        layers=names,
    )


def masked(
    net: nn.Module,
    names: tuple[str, ...],
    data: Dataset,
    *,
    config: DetoxSection,
    device: torch.device,
) -> dict[str, Mask]:
    """Insert an untrained mask at each named layer of `net`, in place."""
    paper = config.preset == "paper"
    means = mean_maps(net, names, data, device=device)
    masks = {name: Mask(means[name], cap=config.mask_cap, paper=paper) for name in names}
    for name, mask in masks.items():
        insert(net, name, mask)
    return masks


def mean_maps(
    net: nn.Module, names: tuple[str, ...], data: Dataset, *, device: torch.device
) -> dict[str, Tensor]:
    """Mean clean feature map (C×H×W) of each layer, over all images of `data`."""
    sums: dict[str, Tensor] = {}
    net.to(device).eval()
    images = torch.from_numpy(data.x)
    with torch.no_grad(), Taps(net, names) as taps:
        for start in range(0, len(images), _IMAGES):
            net(images[start : start + _IMAGES].to(device))
            for name, maps in taps.features.items():
                added = maps.double().sum(0)
                sums[name] = sums[name] + added if name in sums else added
    return {name: (total / len(images)).float() for name, total in sums.items()}


def finish(net: nn.Module, masks: Mapping[str, Mask]) -> None:
    """Replace each trained mask in `net` by its constants, in place."""
    for name, mask in masks.items():
        parent = net.get_submodule(name)
        assert isinstance(parent, nn.Sequential)
        parent[-1] = Scaled(*mask.coefficients())


def _details(training: _Training, masks: Mapping[str, Mask]) -> dict[str, object]:
    details: dict[str, object] = {
        "mask_mean": {name: float(mask.share.detach().mean()) for name, mask in masks.items()}
    }
    if {"first", "last"} <= training.memory.keys():
        details["variance_first"] = float(training.memory["first"])
        details["variance_last"] = float(training.memory["last"])
    return details
