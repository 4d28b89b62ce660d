"""Terms that make a network easy to bound: interval entropy, ReLU stability, small weights."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlflow_kdguard.config import Verifiable
from mlflow_kdguard.nets.boxes import Box


def growth(config: Verifiable, step: int, steps: int) -> float:
    """How much of radius and weight the interval terms have at a step: 0 to 1 along `ramp`."""
    start, end = (share * steps for share in config.ramp)
    return min(1.0, max(0.0, (step - start) / (end - start))) if end > start else float(step >= end)


def interval_entropy(bounds: Box, y: Tensor) -> Tensor:
    """Cross-entropy of the worst logits within the bounds, a mean over the batch (IBP, 1810.12715).

    The label's logit is at its lowest and all others at their highest.
    """
    labelled = functional.one_hot(y, bounds.low.shape[1]).bool()
    return functional.cross_entropy(torch.where(labelled, bounds.low, bounds.high), y)


def relu_stability(seen: list[Box]) -> Tensor:
    """-tanh(1 + l·u), a mean over each layer's ReLUs and over layers (Xiao et al., 1809.03008).

    `seen`: bounds of what enters each layer of ReLUs. From -1 (no ReLU changes its phase) to 1.
    """
    layers = [-torch.tanh(1.0 + box.low * box.high).mean() for box in seen]
    return torch.stack(layers).mean() if layers else torch.zeros(())


def sizes(net: nn.Module) -> Tensor:
    """Σ|w| over the weights of linear maps and convolutions, without biases."""
    return torch.stack(
        [
            module.weight.abs().sum()
            for module in net.modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        ]
    ).sum()
