"""Train a classifier of handwritten digits adversarially: the teacher that the project starts from.

The backend starts this inside a nested MLflow run (MLFLOW_RUN_ID is set), so what it logs lands
there. A teacher that comes from somewhere else needs no such stage.
"""

import argparse
from pathlib import Path

import mlflow
import torch

from mlflow_kdguard import data
from mlflow_kdguard.adversary.madry import madry
from mlflow_kdguard.config import Loop
from mlflow_kdguard.nets import load, zoo
from mlflow_kdguard.nets.architecture import Architecture
from mlflow_kdguard.training import fit


def main() -> None:
    """Train, log how it ended, and write the weights with their architecture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    shown = data.load("mnist5k#train[:3500]")
    about = Architecture(
        arch="cnn:16,32,64", shape=shown.shape, classes=shown.classes, mean=(0.13,), std=(0.31,)
    )
    net = zoo.build(about, seed=0)
    fitted = fit(
        net,
        shown,
        madry(eps=0.02, steps=3),
        Loop(epochs=given.epochs, lr=0.08),
        seed=0,
        device=torch.device("cpu"),
        what="teacher",
    )
    with mlflow.start_run():
        mlflow.log_param("epochs", given.epochs)
        mlflow.log_metrics(fitted.figures)
    load.save(net, given.out)


if __name__ == "__main__":
    main()
