"""ONNX bytes as canonical layers: what bounds, the checker and the loader read."""

from mlflow_kdguard.graph.interpreter import apply, evaluate
from mlflow_kdguard.graph.layers import (
    INPUT,
    Add,
    Affine,
    Array,
    AveragePool,
    Clip,
    Conv,
    Graph,
    Layer,
    Maximum,
    MaxPool,
    Minimum,
    Relu,
    Reshape,
    Scale,
    Shape,
    Sub,
)
from mlflow_kdguard.graph.reader import clips_first, read

__all__ = [
    "INPUT",
    "Add",
    "Affine",
    "Array",
    "AveragePool",
    "Clip",
    "Conv",
    "Graph",
    "Layer",
    "MaxPool",
    "Maximum",
    "Minimum",
    "Relu",
    "Reshape",
    "Scale",
    "Shape",
    "Sub",
    "apply",
    "clips_first",
    "evaluate",
    "read",
]
