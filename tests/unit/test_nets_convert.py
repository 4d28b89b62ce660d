"""Graphs as torch modules: what they compute is held in test_graph and the laws; here the rest."""

import copy

import numpy as np
import onnx
import pytest
import torch

import toys
from mlflow_kdguard import graph
from mlflow_kdguard.nets import convert, emit, taps

DRAW = np.random.default_rng(1)


def uneven() -> onnx.ModelProto:
    """Windows whose padding torch's own layers cannot state, and extrema of several maps."""
    nodes = [
        toys.node("Conv", ("p", "w"), "a", pads=[1, 0, 2, 1], strides=[1, 1]),
        toys.node("MaxPool", ("a",), "b", kernel_shape=[2, 2], pads=[1, 0, 0, 1]),
        toys.node("AveragePool", ("a",), "c", kernel_shape=[2, 2], pads=[0, 1, 1, 0]),
        toys.node("Max", ("a", "b", "c"), "d"),
        toys.node("Min", ("d", "half"), "e"),
        toys.node("Sub", ("e", "c"), "f"),
        toys.node("ReduceMean", ("f", "axes"), "logits", keepdims=0),
    ]
    constants = [
        toys.constant("w", DRAW.normal(size=(3, 2, 3, 2))),
        toys.constant("half", 0.5),
        toys.constant("axes", [2, 3], np.int64),
    ]
    return toys.proto(nodes, constants, shape=(2, 6, 6), classes=3)


def test_uneven_windows_survive_the_way_through_torch() -> None:
    read = graph.read(uneven().SerializeToString(), where="uneven")
    x = toys.images(5, (2, 6, 6))
    again = emit.to_bytes(convert.to_torch(read), (2, 6, 6), opset=18)
    back = graph.evaluate(graph.read(again, where="again"), x)
    np.testing.assert_allclose(back, graph.evaluate(read, x), atol=1e-6)


def test_weights_keep_their_values_names_and_shapes() -> None:
    net = toys.cnn()
    read = graph.read(emit.to_bytes(net, (1, 8, 8), opset=18), where="cnn")
    module = convert.to_torch(read)
    assert (module.input_shape, module.classes) == ((1, 8, 8), 10)
    shapes = {name.split(".")[1]: tuple(p.shape) for name, p in module.named_parameters()
              if name.endswith(("factor", "weight"))}  # fmt: skip
    kinds = {name: type(layer).__name__ for name, layer in module.layers.items()}
    # A batch norm is read as two layers: its mean is taken away, then it is scaled.
    assert [kinds[name] for name in shapes] == [
        "Scale", "Scale", "Conv2d", "Scale", "Scale", "Conv2d", "Scale", "Scale", "Linear",
    ]  # fmt: skip
    assert list(shapes.values()) == [
        (1, 1, 1), (1, 1, 1),
        (4, 1, 5, 5), (4, 1, 1), (4, 1, 1),
        (6, 4, 3, 3), (6, 1, 1), (6, 1, 1),
        (10, 24),
    ]  # fmt: skip
    weights = next(p for name, p in module.named_parameters() if tuple(p.shape) == (6, 4, 3, 3))
    assert torch.equal(weights, net.body.conv2.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conversion_draws_no_random_numbers_and_copies_deeply(dtype: torch.dtype) -> None:
    read = graph.read(toys.onnx_tiny(), where="toy")
    state = torch.get_rng_state()
    module = convert.to_torch(read, dtype=dtype)
    assert torch.equal(state, torch.get_rng_state())
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for weights in twin.parameters():
            weights.zero_()
    x = toys.images(3, (1, 2, 2))
    with torch.no_grad():
        logits = module(torch.from_numpy(x).to(dtype))
    assert logits.dtype == dtype
    np.testing.assert_allclose(logits.numpy(), graph.evaluate(read, x), atol=1e-6)


def test_training_a_converted_network_leaves_the_graph_alone() -> None:
    read = graph.read(toys.onnx_tiny(), where="toy")
    x = toys.images(3, (1, 2, 2))
    before = graph.evaluate(read, x)
    module = convert.to_torch(read, dtype=torch.float64)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.from_numpy(x).double()).square().sum().backward()
    optimiser.step()
    assert np.array_equal(graph.evaluate(read, x), before)


def test_a_mask_can_be_put_into_a_converted_network() -> None:
    read = graph.read(emit.to_bytes(toys.cnn(), (1, 8, 8), opset=18), where="cnn")
    module = convert.to_torch(read)
    (name, *_) = taps.auto(module, (1, 8, 8))
    x = torch.from_numpy(toys.images(3))
    before = module(x)
    taps.insert(module, name, convert.Fixed(torch.zeros(4, 1, 1)))
    assert not torch.allclose(module(x), before)
    again = graph.read(emit.to_bytes(module, (1, 8, 8), opset=18), where="masked")
    np.testing.assert_allclose(
        graph.evaluate(again, x.numpy()), module(x).detach().numpy(), atol=1e-6
    )
