"""The calibration study: python -m benchmarks.audit [--nets N] [--shadows N] [--poisoned N].

On mnist5k, Madry-trained networks (eps 0.02) of one architecture:

    full        clean networks trained on the 3,500 transfer images,
    shadow-E    clean networks trained for E epochs on the 500 clean images only,
    poisoned    BadNets and Blended teachers with targets that differ.

Each is inverted on the searching half of the 500 clean images, as `kdguard audit` does. Printed and
recorded, for every candidate statistic: its distribution on each group, and how many poisoned
networks exceed every clean one. Writes benchmarks/results/audit-calibration.json.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.record import machine, write
from mlflow_kdguard import data
from mlflow_kdguard.adversary.madry import madry
from mlflow_kdguard.audit import Question
from mlflow_kdguard.audit.inversion import search
from mlflow_kdguard.config import AuditSection, Loop, RedteamSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.nets import zoo
from mlflow_kdguard.nets.architecture import Architecture
from mlflow_kdguard.records import silent
from mlflow_kdguard.redteam.teacher import teach
from mlflow_kdguard.training import fit

CPU = torch.device("cpu")
FULL, CLEAN = "mnist5k#train[:3500]", "mnist5k#train[3500:]"
ARCHITECTURE = Architecture(
    arch="cnn:16,32,64", shape=(1, 28, 28), classes=10, mean=(0.1307,), std=(0.3081,)
)
ATTACKS = (("badnets", 0), ("blended", 3), ("badnets", 7), ("blended", 5))
Rates = list[float]


def gap(rates: Rates) -> float:
    """Largest less second largest."""
    ordered = sorted(rates)
    return ordered[-1] - ordered[-2]


def index(rates: Rates) -> float:
    """Largest logit in median absolute deviations from the median logit (rates smoothed)."""
    logits = np.log((np.array(rates) + 2e-3) / (1 - np.array(rates) + 2e-3))
    spread = 1.4826 * np.median(np.abs(logits - np.median(logits)))
    return float((logits.max() - np.median(logits)) / max(spread, 0.1))


STATISTICS: dict[str, Callable[[Rates], float]] = {"max": max, "gap": gap, "mad": index}


def trained(images: Dataset, epochs: int, seed: int) -> zoo.Classifier:
    """One clean network of the regime."""
    net = zoo.build(ARCHITECTURE, seed=seed)
    loss = madry(eps=0.02, steps=3)
    fit(net, images, loss, Loop(epochs=epochs), seed=seed, device=CPU, what="clean net")
    return net


def poisoned(number: int) -> zoo.Classifier:
    """One poisoned teacher."""
    attack, target = ATTACKS[number % len(ATTACKS)]
    section = RedteamSection(attack=attack, target=target)
    with tempfile.TemporaryDirectory() as folder:
        return teach(section, seed=900 + number, device=CPU, folder=Path(folder)).poisoned


def rates_of(net: zoo.Classifier, clean: Dataset) -> Rates:
    """The audit's per-class rates."""
    question = Question(clean, AuditSection(), 0, CPU, silent)
    return [found.rate.rate for found in search(net, question)]


def summary(groups: dict[str, list[Rates]]) -> dict[str, dict[str, object]]:
    """Each statistic on each group, and the power at the largest clean value."""
    rows: dict[str, dict[str, object]] = {}
    for name, statistic in STATISTICS.items():
        values = {group: sorted(map(statistic, rates)) for group, rates in groups.items()}
        row: dict[str, object] = {
            group: {"median": float(np.median(v)), "max": v[-1], "min": v[0], "n": len(v)}
            for group, v in values.items()
        }
        for group, found in values.items():
            if group != "poisoned":
                caught = sum(value > found[-1] for value in values["poisoned"])
                row[f"poisoned above every {group}"] = caught
        rows[name] = row
    return rows


def main() -> None:
    """Train, invert, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", type=int, default=8)
    parser.add_argument("--shadows", type=int, default=10)
    parser.add_argument("--poisoned", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    full, clean = data.load(FULL), data.load(CLEAN)
    groups: dict[str, list[Rates]] = {
        "full": [rates_of(trained(full, 12, seed), clean) for seed in range(given.nets)]
    }
    for epochs in (12, 60):
        groups[f"shadow-{epochs}"] = [
            rates_of(trained(clean, epochs, 100 + seed), clean) for seed in range(given.shadows)
        ]
    groups["poisoned"] = [rates_of(poisoned(number), clean) for number in range(given.poisoned)]
    found = summary(groups)
    for name, row in found.items():
        print(name, row)
    seconds = {"cpu_seconds": time.process_time() - started}
    write("audit-calibration.json", {**machine(), "summary": found, "rates": groups, **seconds})


if __name__ == "__main__":
    main()
