"""Logits and accuracy of a network, in evaluation mode, batch by batch."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from mlflow_kdguard import devices
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.records import Rate


@contextmanager
def evaluating(*nets: nn.Module) -> Iterator[None]:
    """Within the block the nets are in evaluation mode; each submodule's mode is restored after."""
    modes = [(module, module.training) for net in nets for module in net.modules()]
    for net in nets:
        net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def predict(net: nn.Module, x: np.ndarray, *, batch: int = 512, device: torch.device) -> np.ndarray:
    """Logits of `net` on pixels: N×C×H×W in [0,1] -> float32 N×K. `net` is moved to `device`."""
    net.to(device)
    rows = []
    with evaluating(net), devices.deterministic(device), torch.inference_mode():
        for start in range(0, len(x), batch):
            images = torch.from_numpy(np.ascontiguousarray(x[start : start + batch], np.float32))
            rows.append(net(images.to(device)).float().cpu().numpy())
    return np.concatenate(rows) if rows else np.empty((0, 0), np.float32)


def accuracy(net: nn.Module, data: Dataset, *, batch: int = 512, device: torch.device) -> Rate:
    """How many labelled images of `data` the net classifies as labelled (without -1)."""
    known = np.flatnonzero(data.y >= 0)
    if not len(known):
        return Rate(k=0, n=0)
    logits = predict(net, data.x[known], batch=batch, device=device)
    return Rate(k=int((logits.argmax(1) == data.y[known]).sum()), n=len(known))
