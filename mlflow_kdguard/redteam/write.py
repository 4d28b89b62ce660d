"""The attacker's files: poisoned teacher, clean control, trigger, contaminated transfer set."""

from pathlib import Path

import torch

from mlflow_kdguard import data
from mlflow_kdguard.config import RedteamSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.files import sha256_file
from mlflow_kdguard.nets import load
from mlflow_kdguard.records import Progress, silent
from mlflow_kdguard.redteam.poison import contaminate
from mlflow_kdguard.redteam.teacher import teach

TRANSFER, TRIGGER, POISONED, CONTROL = "transfer.npz", "trigger.kdt", "poisoned", "control"
WEIGHTS, ARCHITECTURE = "weights.safetensors", "architecture.json"


def write(
    section: RedteamSection,
    transfer: Dataset,
    *,
    train: Dataset | None = None,
    folder: Path,
    seed: int,
    device: torch.device,
    progress: Progress = silent,
) -> dict[str, str]:
    """Make everything under `folder`, going on where an earlier call stopped.

    Returns each file's SHA-256 by its path below `folder`. `transfer` is the clean set that gets
    `section.contamination` triggered copies; its labels are dropped. The teachers learn from
    `train`, by default from what `section.train` names.
    """
    place = folder / "training"
    made = teach(section, data=train, seed=seed, device=device, folder=place, progress=progress)
    written = [TRANSFER, TRIGGER]
    for name, net in ((POISONED, made.poisoned), (CONTROL, made.control)):
        load.save(net, folder / name)
        written += [f"{name}/{WEIGHTS}", f"{name}/{ARCHITECTURE}"]
    made.trigger.save(folder / TRIGGER)
    dirty = contaminate(transfer, made.trigger, rate=section.contamination, seed=seed)
    data.save(dirty, folder / TRANSFER)
    return {name: sha256_file(folder / name) for name in sorted(written)}
