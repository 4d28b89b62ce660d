"""I-BAU (Zeng et al., ICLR 2022, arXiv 2110.03735): unlearning of any universal perturbation.

The copy learns to answer as labelled with and without a universal perturbation that is moved, at
every step, to where it hurts most: no class is suspected. First order: what the copy's weights do
to the worst perturbation is left out of the gradient. At a worst perturbation inside the ball that
term is zero, since both levels have one objective.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlflow_kdguard.adversary.inversion import project
from mlflow_kdguard.detox.state import State, Work
from mlflow_kdguard.detox.tuning import Tuning, open_copy, options, plain, tuned
from mlflow_kdguard.training import evaluating

NAME = "ibau"
OPTIONS = {"steps": 300.0, "lr": 0.02, "radius": 2.1, "ascents": 2.0}
_SHARE = 0.25
"""Step of the perturbation as a share of the radius."""


class _Unlearning(Tuning):
    """Fine-tuning against one universal perturbation."""

    def __init__(
        self, net: nn.Module, given: dict[str, float], shape: tuple[int, ...], device: torch.device
    ) -> None:
        super().__init__(NAME, net, plain, given)
        self.radius, self.ascents = given["radius"], int(given["ascents"])
        self.memory = {"delta": torch.zeros(shape, device=device)}
        self.loss = self._both

    def _both(self, net: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        delta = self.memory["delta"]
        if not bool(delta.any()):
            delta += 1e-3 * torch.randn(delta.shape, generator=generator).to(delta.device)
        for _ in range(self.ascents):
            with evaluating(net):
                self._ascend(net, x, y)
        moved = (x + self.memory["delta"]).clamp(0.0, 1.0)
        both = net(torch.cat([x, moved]))
        return 2.0 * functional.cross_entropy(both, torch.cat([y, y]))

    def _ascend(self, net: nn.Module, x: Tensor, y: Tensor) -> None:
        delta = self.memory["delta"].clone().requires_grad_(True)
        # A hair inside: the gradient of clamp is zero at exactly 0 and 1.
        moved = (x + delta).clamp(1e-6, 1 - 1e-6)
        (slope,) = torch.autograd.grad(functional.cross_entropy(net(moved), y), delta)
        step = _SHARE * self.radius / slope.norm().clamp_min(1e-12)
        self.memory["delta"] = project(delta.detach() + step * slope, self.radius)


def cleanse(state: State, work: Work) -> State:
    """Train the copy against the worst universal perturbation."""
    given = options(work, OPTIONS)
    copy = open_copy(state, work)
    return tuned(state, work, _Unlearning(copy, given, state.train.shape, work.device))
