"""ANP (Wu and Wang, NeurIPS 2021, arXiv 2110.14430): channels that break first are cut.

Every channel after a batch norm gets a mask m in [0, 1], trained on clean images so that the
network is right even if each channel's factor and offset are moved by up to `eps`, against it:
α·CE(m) + (1 - α)·max CE(m + δ). Channels that such moves turn against the network end with small
masks. They are pruned in order of their masks, as many as clean validation accuracy allows: its
authors' threshold is chosen with the trigger at hand, and this one is not.
"""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlflow_kdguard.detox.keep import keep
from mlflow_kdguard.detox.loop import drive
from mlflow_kdguard.detox.state import State, Work
from mlflow_kdguard.detox.tuning import options
from mlflow_kdguard.errors import UsageError
from mlflow_kdguard.nets.taps import insert

NAME = "anp"
OPTIONS = {"steps": 600.0, "lr": 0.2, "eps": 0.4, "alpha": 0.2, "most": 0.5}


class Channels(nn.Module):
    """F' = (m + δ)·F + ξ·|F̄|: the mask, and what moves it while it is trained."""

    moved: Tensor
    offset: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.ones(count))
        self.register_buffer("moved", torch.zeros(count), persistent=False)
        self.register_buffer("offset", torch.zeros(count), persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        """N×C×H×W -> N×C×H×W."""
        shape = (1, -1, 1, 1)
        scaled = (self.mask + self.moved).view(shape) * maps
        return scaled + (self.offset * maps.detach().abs().mean((0, 2, 3))).view(shape)


class _Training:
    """SGD on the masks against one step of ascent on what moves them."""

    name = NAME

    def __init__(
        self, net: nn.Module, masks: Mapping[str, Channels], given: Mapping[str, float]
    ) -> None:
        self.steps, self.eps, self.alpha = int(given["steps"]), given["eps"], given["alpha"]
        self.module: nn.Module = nn.ModuleList(masks.values())
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            self.module.parameters(), lr=given["lr"], momentum=0.9
        )
        self.memory: dict[str, Tensor] = {}
        self._net, self._masks = net, list(masks.values())

    def advance(self, x: Tensor, y: Tensor, step: int, generator: torch.Generator) -> Tensor:
        """One step of the masks, which stay in [0, 1]."""
        moves = self._worst(x, y, generator)
        self._move(moves)
        worst = functional.cross_entropy(self._net(x), y)
        self._move([torch.zeros_like(each) for each in moves])
        loss = self.alpha * functional.cross_entropy(self._net(x), y) + (1 - self.alpha) * worst
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        with torch.no_grad():
            for each in self._masks:
                each.mask.clamp_(0.0, 1.0)
        return loss.detach()

    def _worst(self, x: Tensor, y: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Moves of factors and offsets: the sign of the slope at a random start."""
        starts = [
            (self.eps * (2 * torch.rand(len(each.mask), generator=generator) - 1)).to(x.device)
            for each in self._masks for _ in range(2)
        ]  # fmt: skip
        starts = [each.requires_grad_(True) for each in starts]
        self._move(starts)
        slopes = torch.autograd.grad(functional.cross_entropy(self._net(x), y), starts)
        return [self.eps * slope.sign() for slope in slopes]

    def _move(self, moves: list[Tensor]) -> None:
        for each, moved, offset in zip(self._masks, moves[::2], moves[1::2], strict=True):
            each.moved, each.offset = moved, offset


def cleanse(state: State, work: Work) -> State:
    """Train masks on the copy, prune by them, and leave a network of the copy's own form."""
    given = options(work, OPTIONS)
    copy = deepcopy(state.copy).eval().requires_grad_(False)
    names = [name for name, each in copy.named_modules() if isinstance(each, nn.BatchNorm2d)]
    if not names:
        raise UsageError(
            "anp prunes channels after batch norm, and the network has none.",
            remedy="Take anp out of detox.chain.",
        )
    masks = {name: Channels(copy.get_submodule(name).num_features) for name in names}  # type: ignore[arg-type]
    for name, mask in masks.items():
        insert(copy, name, mask.to(work.device))
    training = _Training(copy, masks, given)
    preview = state.preview(copy)
    drive(training, state, work, lambda: state.judge(preview, work.device))
    pruned, count = _pruned(state, work, masks, given["most"])
    keep(state, work, NAME, {"": pruned}, "copy")
    met = state.judge(state.preview(pruned), work.device).k >= state.least
    return state.trained(
        pruned, name=NAME, outcome="kept" if met else "undone",
        kept_at=training.steps if met else 0, steps=training.steps,
        device=work.device, details={"pruned": count},
    )  # fmt: skip


def _pruned(
    state: State, work: Work, masks: Mapping[str, Channels], most: float
) -> tuple[nn.Module, int]:
    """The old copy without as many channels of the smallest masks as accuracy allows: at most the
    share `most`, and none that was never pressed below one."""
    order = sorted(
        (float(value), name, channel)
        for name, mask in masks.items()
        for channel, value in enumerate(mask.mask.detach())
        if float(value) < 1.0
    )
    best, count = deepcopy(state.copy), 0
    pruned = deepcopy(state.copy)
    total = sum(len(mask.mask) for mask in masks.values())
    for number, (_, name, channel) in enumerate(order[: int(most * total)], start=1):
        norm = pruned.get_submodule(name)
        norm.weight.data[channel] = 0.0  # type: ignore[operator]
        norm.bias.data[channel] = 0.0  # type: ignore[operator]
        if state.judge(state.preview(pruned), work.device).k >= state.least:
            best, count = deepcopy(pruned), number
    return best, count
