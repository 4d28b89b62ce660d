"""Data sets by URI, with a digest; pixels are float32 in [0,1] (`docs/reference/data.md`)."""

from mlflow_kdguard.data.dataset import UNLABELLED, Dataset, concat
from mlflow_kdguard.data.open import SOURCES, load
from mlflow_kdguard.data.store import save
from mlflow_kdguard.data.uri import quote

__all__ = ["SOURCES", "UNLABELLED", "Dataset", "concat", "load", "quote", "save"]
