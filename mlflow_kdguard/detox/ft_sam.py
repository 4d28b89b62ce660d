"""FT-SAM (Zhu et al., ICCV 2023, arXiv 2304.11823): fine-tuning to a flat minimum.

Each step takes the gradient where a step of ascent of adaptive size has led: ρ·T²g/‖Tg‖ with T the
sizes of the weights, so that the large weights that backdoors live on move most.
"""

import torch
from torch import Tensor, nn

from mlflow_kdguard.detox.state import State, Work
from mlflow_kdguard.detox.tuning import Tuning, open_copy, options, plain, tuned

NAME = "ft_sam"
OPTIONS = {"steps": 300.0, "lr": 0.02, "rho": 2.0}


class Flat(Tuning):
    """SGD whose gradients come from the end of an ascent."""

    def __init__(self, net: nn.Module, given: dict[str, float]) -> None:
        super().__init__(NAME, net, plain, given)
        self.rho = given["rho"]

    def advance(self, x: Tensor, y: Tensor, step: int, generator: torch.Generator) -> Tensor:
        """Ascend, take the gradient, return, step."""
        weights = [each for each in self.module.parameters() if each.requires_grad]
        self.module.train()
        state = {name: value.clone() for name, value in self.module.named_buffers()}
        gradients = torch.autograd.grad(self.loss(self.module, x, y, generator), weights)
        scaled = [g * w.abs() for g, w in zip(gradients, weights, strict=True)]
        norm = torch.stack([each.square().sum() for each in scaled]).sum().sqrt().clamp_min(1e-12)
        moves = [self.rho * s * w.abs() / norm for s, w in zip(scaled, weights, strict=True)]
        with torch.no_grad():
            # The images are seen twice, and count once in the running statistics.
            for name, value in self.module.named_buffers():
                value.copy_(state[name])
            for weight, move in zip(weights, moves, strict=True):
                weight.add_(move)
        self.optimizer.zero_grad(set_to_none=True)
        value = self.loss(self.module, x, y, generator)
        value.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for weight, move in zip(weights, moves, strict=True):
                weight.sub_(move)
        self._step(step)
        return value.detach()


def cleanse(state: State, work: Work) -> State:
    """Train the copy on the clean images."""
    return tuned(state, work, Flat(open_copy(state, work), options(work, OPTIONS)))
