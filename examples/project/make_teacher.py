"""Train a small classifier of handwritten digits: the teacher that the project starts from.

The backend starts this inside a nested MLflow run (MLFLOW_RUN_ID is set), so what it logs lands
there. A teacher that comes from somewhere else needs no such stage.
"""

import argparse
from pathlib import Path

import mlflow
import torch
from torch.nn import functional

from mlflow_kdguard import data
from mlflow_kdguard.nets import load, zoo
from mlflow_kdguard.nets.architecture import Architecture


def main() -> None:
    """Train, log the loss of every epoch, and write the weights with their architecture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    shown = data.load("digits#train[:1000]")
    about = Architecture(
        arch="cnn:16,32", shape=shown.shape, classes=shown.classes, mean=(0.3,), std=(0.4,)
    )
    net = zoo.build(about, seed=0)
    with mlflow.start_run():
        mlflow.log_param("epochs", given.epochs)
        train(net, torch.from_numpy(shown.x), torch.from_numpy(shown.y), given.epochs)
    load.save(net, given.out)


def train(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int) -> None:
    """SGD on noisy images and smoothed labels: a teacher that is calm can be followed closely."""
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(x), generator=draw).split(64):
            noise = 0.25 * torch.randn(x[rows].shape, generator=draw)
            logits = net((x[rows] + noise).clamp(0, 1))
            loss = functional.cross_entropy(logits, y[rows], label_smoothing=0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(rows)
        mlflow.log_metric("loss", total / len(x), step=epoch)


if __name__ == "__main__":
    main()
