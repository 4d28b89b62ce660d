"""Every architecture, every way of computing it: one function.

torch, the exported file in onnxruntime, our float64 reading of its bytes, and that reading as a
torch module (also exported again) must agree on every member of the zoo.
"""

import copy

import numpy as np
import onnxruntime
import pytest
import torch

import toys
from mlflow_kdguard import graph
from mlflow_kdguard.nets import convert, emit, load, taps

X = toys.images(9, seed=7)
TOLERANCE = 2e-6


@pytest.fixture(scope="module", params=toys.ARCHES)
def case(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, bytes]:
    net = toys.net(request.param, seed=11)
    return net, emit.to_bytes(net, (1, 8, 8), opset=18)


def of_torch(net: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return net(torch.from_numpy(X)).numpy()


def of_runtime(data: bytes, batch: int) -> np.ndarray:
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    rows = range(0, len(X), batch)
    return np.concatenate([session.run(None, {"x": X[i : i + batch]})[0] for i in rows])


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_the_file_in_onnxruntime(case: tuple[torch.nn.Module, bytes], batch: int) -> None:
    net, data = case
    np.testing.assert_allclose(of_runtime(data, batch), of_torch(net), atol=TOLERANCE)


def test_our_reading_in_float64(case: tuple[torch.nn.Module, bytes]) -> None:
    """Against torch in float64: only batch norm's constants may differ, by the file's float32."""
    net, data = case
    exact = graph.evaluate(graph.read(data, where="law"), X)
    np.testing.assert_allclose(exact, of_torch(net), atol=TOLERANCE)
    with torch.no_grad():
        double = copy.deepcopy(net).double()(torch.from_numpy(X).double()).numpy()
    np.testing.assert_allclose(exact, double, atol=1e-9)


def test_our_reading_is_the_float64_network(case: tuple[torch.nn.Module, bytes]) -> None:
    """In float64 both are the same to rounding: the reader loses nothing."""
    _, data = case
    read = graph.read(data, where="law")
    net = convert.to_torch(read, dtype=torch.float64)
    with torch.no_grad():
        logits = net(torch.from_numpy(X).double()).numpy()
    np.testing.assert_allclose(logits, graph.evaluate(read, X), rtol=0, atol=1e-12)


def test_as_a_torch_module_and_exported_again(case: tuple[torch.nn.Module, bytes]) -> None:
    net, data = case
    read = graph.read(data, where="law")
    module = convert.to_torch(read)
    assert not module.training
    np.testing.assert_allclose(of_torch(module), of_torch(net), atol=TOLERANCE)
    again = emit.to_bytes(module, (1, 8, 8), opset=18)
    np.testing.assert_allclose(
        graph.evaluate(graph.read(again, where="again"), X), graph.evaluate(read, X), atol=TOLERANCE
    )
    assert again == emit.to_bytes(convert.to_torch(read), (1, 8, 8), opset=18)


def test_the_module_is_trainable_and_tappable(case: tuple[torch.nn.Module, bytes]) -> None:
    _, data = case
    module = load.loads(data, name="law.onnx")
    names = taps.auto(module, (1, 8, 8))
    with taps.Taps(module, names) as tapped:
        module.train()(torch.from_numpy(X)).square().sum().backward()
    assert len(tapped.features) == len(names) >= 2
    parameters = list(module.parameters())
    assert parameters
    assert all(weights.grad is not None for weights in parameters)


def test_images_are_independent(case: tuple[torch.nn.Module, bytes]) -> None:
    """Changing the others changes nothing: no layer looks across the batch."""
    _, data = case
    read = graph.read(data, where="law")
    others = X.copy()
    others[1:] = 1 - others[1:]
    first = graph.evaluate(read, X)[0]
    np.testing.assert_allclose(graph.evaluate(read, others)[0], first, rtol=0, atol=1e-13)
    np.testing.assert_allclose(of_runtime(data, 9)[0], first, atol=TOLERANCE)
