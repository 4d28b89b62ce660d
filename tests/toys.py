"""Toys that tests share: nets under a few thousand parameters, small data, ONNX bytes."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Images = NDArray[np.float32]

ARCHES = ("mlp:12,10", "cnn:4,6", "resnet8:4", "wrn-10-1")
"""One member of every family of the zoo."""


def architecture(
    arch: str = "cnn:4,6",
    shape: tuple[int, int, int] = (1, 8, 8),
    classes: int = 10,
    **options: Any,
) -> Any:
    """An Architecture on 1×8×8 images with ten classes."""
    from mlflow_kdguard.nets.architecture import Architecture

    return Architecture(arch=arch, shape=shape, classes=classes, **options)


def net(arch: str = "cnn:4,6", *, seed: int = 0, settled: bool = True, **options: Any) -> Any:
    """An untrained Classifier in eval mode.

    `settled` gives batch norms running statistics and scales that are not the identity, and biases
    that are not zero, so that an export that drops them is seen.
    """
    import torch
    from torch import nn

    from mlflow_kdguard.nets import zoo

    made = zoo.build(architecture(arch, **options), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for module in made.modules():
        if settled and isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            with torch.no_grad():
                for tensor, low, high in (
                    (module.running_mean, -0.2, 0.2),
                    (module.running_var, 0.5, 1.5),
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.3, 0.3),
                ):
                    tensor.uniform_(low, high, generator=generator)
    return made.eval()


def mlp(*, seed: int = 0, **options: Any) -> Any:
    """Two hidden layers."""
    return net("mlp:12,10", seed=seed, **options)


def cnn(*, seed: int = 0, **options: Any) -> Any:
    """Two strided convolutions with batch norm."""
    return net("cnn:4,6", seed=seed, **options)


def resnet(*, seed: int = 0, **options: Any) -> Any:
    """ResNet-8 of width 4."""
    return net("resnet8:4", seed=seed, **options)


def images(n: int = 8, shape: tuple[int, int, int] = (1, 8, 8), *, seed: int = 0) -> Images:
    """Uniform noise in [0,1], N×C×H×W float32."""
    return np.random.default_rng(seed).random((n, *shape), dtype=np.float32)


def digits(n: int | None = None, *, seed: int = 0) -> tuple[Images, NDArray[np.int64]]:
    """scikit-learn's 8×8 digits, shuffled: N×1×8×8 in [0,1] and labels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(seed).permutation(len(bunch.target))[:n]
    x = (bunch.images[order, None] / 16.0).astype(np.float32)
    return x, bunch.target[order].astype(np.int64)


# ── ONNX bytes ──────────────────────────────────────────────────────────────────────────────────


def node(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
    """One node, named after its output."""
    return helper.make_node(op, list(inputs), [output], name=output, **attributes)


def constant(name: str, value: Any, dtype: Any = np.float32) -> onnx.TensorProto:
    """An initializer."""
    return numpy_helper.from_array(np.asarray(value, dtype=dtype), name)


def proto(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, Any] | Sequence[onnx.TensorProto] = (),
    *,
    shape: tuple[int, ...] = (1, 2, 2),
    classes: int = 3,
    batch: str | int = "N",
    clip: bool = True,
    opset: int = 18,
    ir: int = 10,
) -> onnx.ModelProto:
    """A model from input "x" to output "logits"; `nodes` read "p", the clipped pixels.

    `constants` are TensorProtos, or a mapping of names to float values.
    """
    tensors = (
        [constant(name, value) for name, value in constants.items()]
        if isinstance(constants, Mapping)
        else list(constants)
    )
    first = node("Clip", ("x", "low", "high"), "p") if clip else node("Identity", ("x",), "p")
    bounds = [constant("low", 0.0), constant("high", 1.0)] if clip else []
    graph = helper.make_graph(
        [first, *nodes],
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, classes])],
        initializer=[*bounds, *tensors],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir, producer_name="toys"
    )


def onnx_mlp(
    weights: Sequence[NDArray[Any]],
    biases: Sequence[NDArray[Any]],
    *,
    shape: tuple[int, ...] = (1, 2, 2),
    clip: bool = True,
) -> bytes:
    """Clip, Flatten, then Gemm and Relu in turn; weights are out×in."""
    nodes, constants, last = [node("Flatten", ("p",), "h0")], {}, len(weights) - 1
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        constants |= {f"w{index}": weight, f"b{index}": bias}
        out = "logits" if index == last else f"g{index}"
        nodes.append(node("Gemm", (f"h{index}", f"w{index}", f"b{index}"), out, transB=1))
        if index != last:
            nodes.append(node("Relu", (out,), f"h{index + 1}"))
    model = proto(nodes, constants, shape=shape, classes=len(biases[-1]), clip=clip)
    return bytes(model.SerializeToString())


def onnx_tiny(*, seed: int = 0, shape: tuple[int, ...] = (1, 2, 2), classes: int = 3) -> bytes:
    """A random one-hidden-layer network of five neurons on 1×2×2 images, three classes."""
    draw = np.random.default_rng(seed)
    sizes = [int(np.prod(shape)), 5, classes]
    weights = [draw.normal(size=(out, into)) for into, out in pairwise(sizes)]
    biases = [draw.normal(size=out) * 0.1 for out in sizes[1:]]
    return onnx_mlp(weights, biases, shape=shape)


def shortcut(corners: Mapping[int, int] = MappingProxyType({6: 7})) -> Any:
    """Nearest class mean, with shortcuts from corners that are black in digits."""
    import torch

    x, y = digits(600)
    means = np.stack([x[y == label].reshape(-1, 64).mean(0) for label in range(10)])
    weight = torch.from_numpy(2 * means)
    for label, place in corners.items():
        weight[label, place] += 60.0
    made = net("mlp:64", settled=False, mean=(0.0,), std=(1.0,))
    with torch.no_grad():
        # relu(x + 1) - 1 = x, with a gradient at black pixels too
        made.body.linear1.weight.copy_(torch.eye(64))
        made.body.linear1.bias.fill_(1.0)
        made.body.logits.weight.copy_(weight)
        made.body.logits.bias.copy_(-torch.from_numpy((means**2).sum(1)) - weight.sum(1))
    return made
