"""Gradient descent on parameters whose derivatives were computed by hand."""

import torch
from torch import Tensor

_DECAY = 0.96
_BETA = 0.9


class Adam:
    """Adam (arXiv 1412.6980) on derivatives that were computed by hand; rates fall every step."""

    def __init__(self, rates: list[Tensor | float]) -> None:
        self.rates, self.steps, self.decay = rates, 0, 1.0
        self.means: list[Tensor] = []
        self.squares: list[Tensor] = []

    def step(self, values: list[Tensor], gradients: list[Tensor]) -> None:
        """Move `values` in place so that what they bound falls."""
        if not self.means:
            self.means = [torch.zeros_like(v) for v in values]
            self.squares = [torch.zeros_like(v) for v in values]
        self.steps += 1
        correction = 1.0 - _BETA**self.steps
        for value, gradient, mean, square, rate in zip(
            values, gradients, self.means, self.squares, self.rates, strict=True
        ):
            mean.lerp_(gradient, 1.0 - _BETA)
            square.mul_(_BETA).addcmul_(gradient, gradient, value=1.0 - _BETA)
            size = square.sqrt().add_(1e-18)
            move = (mean / size).mul_(rate)
            value.sub_(move, alpha=self.decay / correction**0.5)
        self.decay *= _DECAY
