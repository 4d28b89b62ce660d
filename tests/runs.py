"""Short training runs that tests of the loop share."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import toys
from mlflow_kdguard import training
from mlflow_kdguard.config import Loop
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.training import Batch, Fitted, fit, state_sha256

CPU = torch.device("cpu")
FAST = Loop(epochs=2, batch=32, augment="none")
LEARN = Loop(epochs=8, batch=32, augment="shift", shift=1)


def digits(n: int = 200) -> Dataset:
    x, y = toys.digits(n)
    return Dataset.of(x, y, uri=f"digits {n}", classes=10)


def entropy(net: nn.Module, batch: Batch) -> Tensor:
    logits = net(batch.x)
    batch.figures["accuracy"] = (logits.argmax(1) == batch.y).double().mean()
    return functional.cross_entropy(logits, batch.y)


def noisy(net: nn.Module, batch: Batch) -> Tensor:
    """A loss that draws from the step's generator."""
    noise = torch.rand(batch.x.shape, generator=batch.generator, device=batch.x.device)
    return functional.cross_entropy(net((batch.x + 0.1 * noise).clamp(0, 1)), batch.y)


class Dropping(nn.Module):
    """A network that reads torch's global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.body = toys.mlp()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.body(x))


def train(net: nn.Module | None = None, loss: training.Loss = noisy, **options: Any) -> str:
    """Digest of the weights after a short run."""
    net = toys.cnn() if net is None else net
    fitted(net, loss, **options)
    return state_sha256(net)


def fitted(net: nn.Module, loss: training.Loss = noisy, **options: Any) -> Fitted:
    settings: dict[str, Any] = {"loop": FAST, "seed": 0, "device": CPU, "what": "toy"}
    data = options.pop("data") if "data" in options else digits()
    settings |= options
    return fit(net, data, loss, settings.pop("loop"), **settings)
