"""A student or teacher from start to weights on disk; networks to and from their graph."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from mlflow_kdguard import distill, graph
from mlflow_kdguard.config import DistillSection, ExportSection, TeachSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.export import to_onnx
from mlflow_kdguard.files import read_bytes
from mlflow_kdguard.nets import convert, load, zoo
from mlflow_kdguard.nets.architecture import Architecture
from mlflow_kdguard.records import Exported, Progress, silent
from mlflow_kdguard.teach import check_labels, teach


def train_student(
    section: DistillSection,
    towards: nn.Module,
    transfer: Dataset,
    clean: Dataset,
    *,
    folder: Path,
    seed: int,
    device: torch.device,
    progress: Progress = silent,
    features_from: nn.Module | None = None,
    trust_code: bool = False,
) -> dict[str, float]:
    """Distil a new student, resuming from its checkpoint; weights and architecture in `folder`."""
    net = zoo.build(architecture_for(section.arch, clean), seed=seed, trust_code=trust_code)
    checkpoint = folder / "checkpoint.pt"
    fitted = distill.train(
        net,
        towards,
        transfer,
        clean,
        config=section,
        seed=seed,
        device=device,
        checkpoint=checkpoint,
        progress=progress,
        features_from=features_from,
    )
    load.save(net, folder)
    checkpoint.unlink(missing_ok=True)
    return dict(fitted.figures)


def train_teacher(
    section: TeachSection,
    data: Dataset,
    *,
    folder: Path,
    seed: int,
    device: torch.device,
    progress: Progress = silent,
    trust_code: bool = False,
) -> dict[str, float]:
    """Train a new teacher, resuming from its checkpoint; weights and architecture in `folder`."""
    check_labels(data)  # unlabelled images name no classes to build a network for
    checkpoint = folder / "checkpoint.pt"
    net, fitted = teach(
        architecture_for(section.arch, data),
        data,
        config=section,
        seed=seed,
        device=device,
        checkpoint=checkpoint,
        progress=progress,
        trust_code=trust_code,
    )
    load.save(net, folder)
    checkpoint.unlink(missing_ok=True)
    return dict(fitted.figures)


def from_onnx(path: Path) -> nn.Module:
    """The torch network that computes exactly the graph in `path`."""
    return from_bytes(read_bytes(path, what="the model"), where=str(path))


def from_bytes(data: bytes, *, where: str) -> nn.Module:
    """The torch network that computes exactly the graph in `data`."""
    return convert.to_torch(graph.read(data, where=where))


def architecture_for(arch: str, clean: Dataset) -> Architecture:
    """An architecture, normalised with the set's mean and deviation."""
    pixels = clean.x
    mean = tuple(round(float(m), 4) for m in pixels.mean(axis=(0, 2, 3)))
    std = tuple(round(max(float(s), 0.01), 4) for s in pixels.std(axis=(0, 2, 3)))
    return Architecture(arch=arch, shape=clean.shape, classes=clean.classes, mean=mean, std=std)


def export_on(
    net: nn.Module,
    path: Path,
    test: Dataset,
    *,
    device: torch.device,
    section: ExportSection | None = None,
) -> Exported:
    """Export a network and compare it on the first `parity_images` images of `test`."""
    chosen = section or ExportSection()
    images = test.batch(np.arange(min(len(test), chosen.parity_images)))[0]
    return to_onnx(
        net,
        path,
        shape=test.shape,
        classes=test.classes,
        images=images,
        config=chosen,
        device=device,
    )
