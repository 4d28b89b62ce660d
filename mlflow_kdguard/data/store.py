"""Writing a data set as the NPZ file that `npz:FILE` reads back."""

import io
from pathlib import Path

import numpy as np

from mlflow_kdguard.data.dataset import Dataset
from mlflow_kdguard.files import write_bytes


def save(dataset: Dataset, path: Path) -> None:
    """Write images, labels and class count, whole or not at all; the same set, the same bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, x=dataset.x, y=dataset.y, classes=np.int64(dataset.classes))
    write_bytes(path, buffer.getvalue())
