"""Train the pairs of a specification, and know whether they are those that were committed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlflow_kdguard import data, distill
from mlflow_kdguard.adversary.madry import madry
from mlflow_kdguard.config import DistillSection, ExportSection, Loop
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.export import to_onnx
from mlflow_kdguard.files import read_bytes, sha256
from mlflow_kdguard.nets import zoo
from mlflow_kdguard.nets.architecture import Architecture
from mlflow_kdguard.training import fit

CPU = torch.device("cpu")
CLEAN = 500
"""Images at the end of the training set that a student is told are clean."""
PARITY = 1000
REFERENCE = "reference"
CAPABILITY = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""Processors with wider instructions sum in another order, and train other networks."""


@dataclass(frozen=True, slots=True)
class Networks:
    """One pair set on disk: the reference and its students by name."""

    number: int
    folder: Path

    def path(self, name: str) -> Path:
        """Where the network called `name` is."""
        return self.folder / f"pair-{self.number}" / f"{name}.onnx"

    def read(self, name: str) -> bytes:
        """The exported bytes."""
        return read_bytes(self.path(name), what=f"pair {self.number}'s {name}")


class OtherWeightsError(SystemExit):
    """Networks that are not those whose digests are committed."""


def train(spec: dict[str, Any], number: int, folder: Path) -> Networks:
    """Train what is missing of pair `number`, so that it repeats itself to the bit: with one thread
    and the instructions of CAPABILITY, which torch reads when it is imported: in its own process.
    """
    networks = Networks(number, folder)
    names = [REFERENCE, *spec["students"]]
    if not all(networks.path(name).exists() for name in names):
        subprocess.run(
            [sys.executable, "-m", __name__, str(number), str(folder.resolve())],
            input=json.dumps(spec),
            env=os.environ | CAPABILITY | {"OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
            text=True,
            check=True,
        )
    return networks


def _main() -> None:
    """Train a pair: its number and folder are the arguments, the specification is on stdin."""
    torch.set_num_threads(1)
    number, folder = int(sys.argv[1]), Path(sys.argv[2])
    spec = json.load(sys.stdin)
    spec["seeds"] = {int(key): seed for key, seed in spec["seeds"].items()}
    for name, seconds in _trained(spec, Networks(number, folder)):
        print(f"pair {number}: trained {name} in {seconds:.0f} s", flush=True)


def _trained(spec: dict[str, Any], networks: Networks) -> Iterator[tuple[str, float]]:
    images, seed = data.load(spec["train"]), spec["seeds"][networks.number]
    began = time.monotonic()
    net = teacher(spec["teacher"], images, seed)
    export(net, networks.path(REFERENCE), images)
    yield REFERENCE, time.monotonic() - began
    for name, own in spec["students"].items():
        began = time.monotonic()
        pupil = student(DistillSection(**spec["student"], **own), net, images, seed)
        export(pupil, networks.path(name), images)
        yield name, time.monotonic() - began


def teacher(plan: dict[str, Any], images: Dataset, seed: int) -> nn.Module:
    """Madry's training."""
    net = zoo.build(_architecture(plan["arch"], images), seed=seed)
    loss = madry(eps=plan["eps"], steps=plan["steps"])
    fit(net, images, loss, Loop(**plan["loop"]), seed=seed, device=CPU, what="teacher")
    return net


def student(section: DistillSection, reference: nn.Module, images: Dataset, seed: int) -> nn.Module:
    """The student, by the specification's loss."""
    pupil = zoo.build(_architecture(section.arch, images), seed=seed + 1)
    count = len(images)
    transfer, clean = images.take(range(count - CLEAN)), images.take(range(count)[-CLEAN:])
    distill.train(pupil, reference, transfer, clean, config=section, seed=seed, device=CPU)
    return pupil


def _architecture(arch: str, images: Dataset) -> Architecture:
    channels = images.shape[0]
    return Architecture(
        arch=arch, shape=images.shape, classes=images.classes,
        mean=(0.0,) * channels, std=(1.0,) * channels,
    )  # fmt: skip


def export(net: nn.Module, path: Path, images: Dataset) -> None:
    """Write the ONNX file, compared with torch on the first images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    to_onnx(
        net, path, shape=images.shape, classes=images.classes, images=images.x[:PARITY],
        config=ExportSection(), device=CPU,
    )  # fmt: skip


def check(spec: dict[str, Any], networks: Networks, *, other_machine: bool) -> dict[str, str]:
    """Digests of all networks of a pair. Raises OtherWeightsError unless they are the committed
    ones, or `other_machine` is granted: other processors round differently."""
    found = {name: sha256(networks.read(name)) for name in (REFERENCE, *spec["students"])}
    committed = spec["sha256"].get(networks.number, {})
    wrong = [name for name in found if found[name] != committed.get(name)]
    if wrong and not other_machine:
        raise OtherWeightsError(
            f"pair {networks.number}: {', '.join(wrong)} in {networks.folder} are not the networks "
            "whose sha256 is in the specification. Training repeats itself to the bit where torch "
            "has the same version and knows AVX2; give --other-machine to go on, and the "
            "results say so."
        )
    return found


if __name__ == "__main__":
    _main()
