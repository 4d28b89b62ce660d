"""What is certified of a student: bounds of its confidence gap to the reference, and the
reference's own gap to the raw teacher."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mlflow_kdguard.certify import certify
from mlflow_kdguard.config import CertifySection, ExportSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.export import to_onnx
from mlflow_kdguard.measure.session import softmax
from mlflow_kdguard.training import predict

REFERENCE, STUDENT = "reference.onnx", "student.onnx"


def export(place: Path, reference: nn.Module, student: nn.Module, images: Dataset) -> None:
    """Write both networks, as they would ship."""
    for name, net in ((REFERENCE, reference), (STUDENT, student)):
        to_onnx(
            net, place / name, shape=images.shape, classes=images.classes, images=images.x[:1000],
            config=ExportSection(), device=torch.device("cpu"),
        )  # fmt: skip


def bounded(place: Path, images: Dataset, config: CertifySection) -> dict[str, Any]:
    """Mean witness and mean bound (FaithUB) of the exported pair on all of the images."""
    pair = [(place / name).read_bytes() for name in (REFERENCE, STUDENT)]
    config = config.model_copy(update={"samples": len(images)})
    report = certify(pair[0], pair[1], images, config=config, device=torch.device("cpu"))
    found = report.summary
    return {"n": found.n, "lower": found.lower_mean, "upper": found.upper_mean}


def known(net: nn.Module, images: Dataset, count: int, device: torch.device) -> Dataset:
    """The first `count` images that a network gets right."""
    first = images.take(range(min(len(images), 4 * count)))
    right = predict(net, first.x, device=device).argmax(1) == first.y
    return first.take(np.flatnonzero(right)[:count].tolist())


def gap(reference: nn.Module, raw: nn.Module, images: Dataset, device: torch.device) -> float:
    """Mean over images of the largest softmax difference of reference and raw teacher."""
    told, own = (softmax(predict(net, images.x, device=device)) for net in (reference, raw))
    return float(np.abs(told - own).max(1).mean())
