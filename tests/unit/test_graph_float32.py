"""The margin of float32 inference: no evaluation in float32, in any order, is further off."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

import toys
from mlflow_kdguard import graph
from mlflow_kdguard.errors import ModelError
from mlflow_kdguard.graph import float32
from mlflow_kdguard.graph.float32 import forward, sensitivity

Floats = NDArray[np.float64]
Single = NDArray[np.float32]
LEVELS = (
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
)


def runtime(data: bytes, x: Single, level: Any) -> Floats:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0].astype(np.float64)


def softmax32(logits: Floats) -> Single:
    powers = np.exp((logits.astype(np.float32).T - logits.astype(np.float32).max(1)).T)
    return powers / powers.sum(1, keepdims=True, dtype=np.float32)


def softmax64(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def mlp(draw: np.random.Generator) -> bytes:
    sizes = [16, 40, 30, 5]
    pairs = list(pairwise(sizes))
    weights = [draw.normal(size=(out, into)) for into, out in pairs]
    biases = [draw.normal(size=out) for _, out in pairs]
    return toys.onnx_mlp(weights, biases, shape=(1, 4, 4))


def cancelling(draw: np.random.Generator) -> bytes:
    """Weights up to 2^19 whose products nearly cancel: float32 is off by whole units."""
    half = draw.normal(size=(40, 8)) * 2.0 ** draw.integers(0, 19, size=(40, 1))
    weight = np.concatenate((half, -half * (1 + draw.normal(size=half.shape) * 1e-6)), 1)
    return toys.onnx_mlp(
        [weight[:, draw.permutation(16)], draw.normal(size=(5, 40)) / 6],
        [draw.normal(size=40), draw.normal(size=5)],
        shape=(1, 4, 4),
    )


def normed(draw: np.random.Generator) -> bytes:
    """Convolution and batch norm whose mean is far from the features, which the runtime folds."""
    nodes = [
        toys.node("Conv", ("p", "w", "b"), "c", pads=[1, 1, 1, 1]),
        toys.node("BatchNormalization", ("c", "g", "beta", "mean", "var"), "n", epsilon=1e-5),
        toys.node("Relu", ("n",), "r"),
        toys.node("AveragePool", ("r",), "a", kernel_shape=[2, 2], pads=[1, 0, 0, 1]),
        toys.node("Flatten", ("a",), "f"),
        toys.node("MatMul", ("f", "m"), "logits"),
    ]
    mean, gain = draw.normal(size=6) * 2.0**14, draw.uniform(0.5, 2.0, size=6)
    constants = {
        "w": draw.normal(size=(6, 1, 3, 3)), "b": draw.normal(size=6), "g": gain,
        "beta": mean * gain, "mean": mean, "var": np.ones(6), "m": draw.normal(size=(96, 5)) / 9,
    }  # fmt: skip
    return toys.proto(nodes, constants, shape=(1, 4, 4), classes=5).SerializeToString()


def residual(draw: np.random.Generator) -> bytes:
    """Sums of branches, scales, extrema and pooling."""
    nodes = [
        toys.node("Mul", ("p", "s"), "q"),
        toys.node("Sub", ("q", "t"), "u"),
        toys.node("Conv", ("u", "w"), "c", pads=[1, 1, 1, 1]),
        toys.node("Add", ("c", "u"), "d"),
        toys.node("Relu", ("d",), "e"),
        toys.node("Conv", ("e", "v"), "h", pads=[1, 1, 1, 1]),
        toys.node("Sub", ("h", "d"), "i"),
        toys.node("Max", ("i", "c"), "j"),
        toys.node("MaxPool", ("j",), "k", kernel_shape=[2, 2], strides=[2, 2]),
        toys.node("Div", ("k", "z"), "l"),
        toys.node("Clip", ("l", "bottom", "top"), "o"),
        toys.node("Flatten", ("o",), "f"),
        toys.node("Gemm", ("f", "m", "b"), "logits", alpha=300.0, beta=0.5),
    ]
    constants = {
        "s": draw.normal(size=(1, 1, 1)) * 100, "t": draw.normal(size=(1, 1, 1)) * 100,
        "w": draw.normal(size=(1, 1, 3, 3)), "v": draw.normal(size=(1, 1, 3, 3)),
        "z": 37.0, "bottom": -4.0, "top": 5.0,
        "m": draw.normal(size=(4, 5)), "b": draw.normal(size=5),
    }  # fmt: skip
    return toys.proto(nodes, constants, shape=(1, 4, 4), classes=5).SerializeToString()


KINDS: list[Callable[[np.random.Generator], bytes]] = [mlp, cancelling, normed, residual]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("seed", range(8))
def test_onnxruntime_stays_within_the_margin(
    kind: Callable[[np.random.Generator], bytes], seed: int
) -> None:
    draw = np.random.default_rng(seed)
    data = kind(draw)
    read = graph.read(data, where="toy")
    centre, eps = draw.random((1, 1, 4, 4)), (0.02, 1.0)[seed % 2]
    lo, hi = np.clip(centre - eps, 0, 1), np.clip(centre + eps, 0, 1)
    x = (lo + draw.random((300, 1, 4, 4)) * (hi - lo)).astype(np.float32)
    lo, hi = np.minimum(lo, x.min(0)), np.maximum(hi, x.max(0))
    margin = float32.margin(read, lo, hi)
    exact = graph.evaluate(read, x.astype(np.float64))
    for level in LEVELS:
        computed = runtime(data, x, level)
        assert (np.abs(computed - exact) <= margin.logits).all()
        distance = np.abs(softmax32(computed).astype(np.float64) - softmax64(exact))
        assert (distance <= margin.confidences).all()


def test_the_margin_is_not_idle() -> None:
    """Cancelling weights: what onnxruntime loses is seen, and a thousandth would not cover it."""
    data = cancelling(np.random.default_rng(3))
    read = graph.read(data, where="toy")
    x = toys.images(300, (1, 4, 4))
    lost = np.abs(runtime(data, x, LEVELS[0]) - graph.evaluate(read, x.astype(np.float64))).max()
    margin = float32.margin(read, np.zeros((1, 4, 4)), np.ones((1, 4, 4))).logits.max()
    assert lost > 1e-3
    assert margin / 1000 < lost < margin


def orders(count: int, draw: np.random.Generator) -> Sequence[NDArray[np.int64]]:
    return [np.arange(count), np.arange(count)[::-1], draw.permutation(count)]


def summed(products: Single, order: NDArray[np.int64]) -> Single:
    total = np.zeros(products.shape[0], np.float32)
    for place in order:
        total = total + products[:, place]
    return total


def fused(weight: Single, x: Single, order: NDArray[np.int64]) -> Single:
    """Multiply-add with one rounding: a product of two float32 is exact in float64."""
    total = np.zeros(len(weight), np.float32)
    for place in order:
        exact = weight[:, place].astype(np.float64) * float(x[place]) + total
        total = exact.astype(np.float32)
    return total


def blocked(products: Single, width: int = 8) -> Single:
    parts = [summed(products[:, at : at + width], np.arange(min(width, products.shape[1] - at)))
             for at in range(0, products.shape[1], width)]  # fmt: skip
    return summed(np.stack(parts, 1), np.arange(len(parts)))


@pytest.mark.parametrize("seed", range(6))
def test_every_order_of_additions_stays_within_the_margin(seed: int) -> None:
    draw = np.random.default_rng(seed)
    weight = (draw.normal(size=(30, 100)) * 2.0 ** draw.integers(0, 12, (30, 100))).astype("f4")
    halves = (weight[:, :50], -weight[:, :50])
    weight = np.concatenate(halves, 1) if seed % 2 else np.abs(weight)
    data = toys.onnx_mlp([weight], [np.zeros(30)], shape=(1, 10, 10))
    x = draw.random((1, 10, 10), dtype=np.float32)
    margin = float32.margin(graph.read(data, where="toy"), x, x).logits[0]
    pixels = x.reshape(-1)
    exact = weight.astype(np.float64) @ pixels.astype(np.float64)
    products = weight * pixels
    found = [summed(products, order) for order in orders(100, draw)]
    found += [fused(weight, pixels, order) for order in orders(100, draw)]
    found += [blocked(products), products.sum(1, dtype=np.float32)]
    lost = np.abs(np.array(found, np.float64) - exact)
    assert (lost <= margin).all()
    assert lost.max() > 0


def test_roundings_that_all_go_one_way_come_near_the_margin() -> None:
    """1 + 2^-24 + 2^-24 + …: every sum is rounded down, so that the whole rest is lost."""
    weight = np.full((1, 1024), 2.0**-24)
    weight[0, 0] = 1.0
    data = toys.onnx_mlp([weight], [np.zeros(1)], shape=(1, 32, 32))
    margin = float32.margin(graph.read(data, where="toy"), np.ones((1, 32, 32)),
                            np.ones((1, 32, 32))).logits[0, 0]  # fmt: skip
    total = summed(weight.astype(np.float32), np.arange(1024))
    lost = weight.sum() - float(total[0])
    assert 0.9 * margin < lost <= margin


@pytest.mark.parametrize("kind", ["offset", "branch"])
def test_what_is_added_last_may_be_what_a_runtime_begins_with(kind: str) -> None:
    """A folded offset, or another branch, goes through all additions of the sum before it."""
    tail = toys.node("Add", ("s", "one" if kind == "offset" else "q"), "logits")
    nodes = [toys.node("Flatten", ("p",), "f"), toys.node("Gemm", ("f", "w"), "s", transB=1), tail]
    constants: dict[str, Any] = {"w": np.full((1, 1024), 2.0**-24)}
    if kind == "offset":
        constants["one"] = [1.0]
    else:
        nodes.insert(2, toys.node("MaxPool", ("p",), "m", kernel_shape=[32, 32]))
        nodes.insert(3, toys.node("Flatten", ("m",), "q"))
    data = toys.proto(nodes, constants, shape=(1, 32, 32), classes=1).SerializeToString()
    read, x = graph.read(data, where="toy"), np.ones((1, 32, 32))
    total = np.float32(1.0)
    for _ in range(1024):
        total = np.float32(total + np.float32(2.0**-24))
    lost = graph.evaluate(read, x[None])[0, 0] - float(total)
    assert lost == 2.0**-14
    assert lost <= float32.margin(read, x, x).logits[0, 0] < 3 * lost


def test_a_batch_norm_that_cancels_is_seen_although_its_offset_is_small() -> None:
    """beta = mean · factor: in one step, the offset is nearly zero, and its terms are 2^14."""
    data = normed(np.random.default_rng(1))
    read = graph.read(data, where="toy")
    centred, scaled = (layer for layer in read.layers if isinstance(layer, graph.Scale))
    offset = scaled.offset + scaled.factor * centred.offset
    assert np.abs(offset).max() < 1 < 2.0**10 < np.abs(scaled.offset).max()
    merged = replace(scaled, inputs=centred.inputs, offset=offset)
    kept = (merged if layer is scaled else layer for layer in read.layers if layer is not centred)
    blind = replace(read, layers=tuple(kept))
    ends = np.zeros((1, 4, 4)), np.ones((1, 4, 4))
    x = toys.images(300, (1, 4, 4))
    lost = np.abs(runtime(data, x, LEVELS[1]) - graph.evaluate(read, x.astype(np.float64)))
    assert (lost <= float32.margin(read, *ends).logits).all()
    assert lost.max() > float32.margin(blind, *ends).logits.max()


@pytest.mark.parametrize("factor", ["channel", "scalar", "norm"])
def test_constants_that_a_runtime_folds_may_vanish(factor: str) -> None:
    """2^-100 times 2^-58 is nothing in float32; times numbers of 2^99 in between it is not."""
    nodes, constants, at = [], {"f": np.full((1, 1, 1), 2.0**-58)}, "p"
    for place, power in enumerate((20, 20, 20, 20, 20, -100, 20, 20, 20)):
        nodes.append(toys.node("Conv", (at, f"w{place}"), f"c{place}"))
        constants[f"w{place}"] = np.full((1, 1, 1, 1), 2.0**power)
        at = f"c{place}"
        if power < 0:
            nodes.append(_factor(factor, at, constants))
            at = "d"
        nodes.append(toys.node("Relu", (at,), f"r{place}"))
        at = f"r{place}"
    nodes += [toys.node("Flatten", (at,), "v"), toys.node("Gemm", ("v", "m"), "logits")]
    constants["m"] = np.array([[1.0, 0.0]])
    data = toys.proto(nodes, constants, shape=(1, 1, 1), classes=2).SerializeToString()
    read, x = graph.read(data, where="toy"), np.full((1, 1, 1, 1), 0.5, dtype=np.float32)
    real = graph.evaluate(read, x.astype(np.float64))
    assert real[0, 0] == 2.0
    folded, plain = (runtime(data, x, level)[0, 0] for level in LEVELS)
    assert (folded, plain) == (0.0, 2.0)
    assert float32.margin(read, x[0], x[0]).logits[0, 0] >= 2.0


def _factor(kind: str, at: str, constants: dict[str, Any]) -> Any:
    if kind == "norm":
        constants |= {"g": [2.0**-58], "z": [0.0], "n": [0.0], "o": [1.0]}
        del constants["f"]
        return toys.node("BatchNormalization", (at, "g", "z", "n", "o"), "d", epsilon=1e-20)
    if kind == "scalar":
        constants["f"] = np.array(2.0**-58)
    return toys.node("Mul", (at, "f"), "d")


def test_margins_grow_with_the_box_and_name_every_layer() -> None:
    read = graph.read(mlp(np.random.default_rng(0)), where="toy")
    x = toys.images(3, (1, 4, 4)).astype(np.float64)
    small, large = (
        float32.margin(read, np.clip(x - eps, 0, 1), np.clip(x + eps, 0, 1)) for eps in (0.01, 0.2)
    )
    assert small.logits.shape == small.confidences.shape == (3, 5)
    assert (small.logits <= large.logits).all()
    assert (small.confidences <= large.confidences).all()
    assert [name for name, _ in small.layers] == [layer.name for layer in read.layers]
    assert dict(small.layers)["p"] == dict(small.layers)["h0"] == 0.0
    assert dict(small.layers)["logits"] == small.logits.max()


def test_a_neuron_that_is_off_carries_no_error() -> None:
    data = toys.onnx_mlp([np.ones((2, 4)), np.eye(2)], [np.full(2, -9.0), np.zeros(2)])
    found = float32.margin(graph.read(data, where="toy"), np.zeros((1, 2, 2)), np.ones((1, 2, 2)))
    errors = dict(found.layers)
    assert errors["g0"] > 0
    assert errors["h1"] == 0.0


def test_the_margin_of_a_gap_is_that_of_both_confidences() -> None:
    draw = np.random.default_rng(0)
    nets = [graph.read(kind(draw), where="toy") for kind in (mlp, residual)]
    ends = np.zeros((2, 1, 4, 4)), np.ones((2, 1, 4, 4))
    single = sum(float32.margin(net, *ends).confidences for net in nets)
    assert (float32.gap_margin(*nets, *ends) > single).all()
    np.testing.assert_allclose(float32.gap_margin(*nets, *ends), single, atol=1e-7)


def test_what_may_overflow_has_no_margin() -> None:
    """Seven layers of 2^20 exceed float32; a clip behind them would hide it."""
    nodes = [toys.node("Mul", ("p" if i == 0 else f"m{i - 1}", "k"), f"m{i}") for i in range(7)]
    nodes += [toys.node("Clip", ("m6", "low", "high"), "c"), toys.node("Flatten", ("c",), "logits")]
    model = toys.proto(nodes, {"k": 2.0**20}, classes=4)
    read = graph.read(model.SerializeToString(), where="toy")
    found = float32.margin(read, np.zeros((1, 2, 2)), np.ones((1, 2, 2)))
    assert np.isinf(found.logits).all()
    assert (found.confidences == 1.0).all()
    assert np.isinf(found.layers[-1][1])
    assert found.layers[0][1] == 0.0


def test_products_that_underflow_are_covered() -> None:
    """2^-80 · 2^-80 is zero in float32; what comes after makes it 2^-60 again."""
    nodes = [toys.node("Mul", ("p", "k"), "a"), toys.node("Mul", ("a", "k"), "b")]
    nodes += [toys.node("Mul", (f"u{i - 1}" if i else "b", "big"), f"u{i}") for i in range(5)]
    nodes += [toys.node("Flatten", ("u4",), "logits")]
    model = toys.proto(nodes, {"k": 2.0**-80, "big": 2.0**20}, classes=4)
    read = graph.read(model.SerializeToString(), where="toy")
    x = np.ones((1, 1, 2, 2), np.float32)
    lost = np.abs(runtime(model.SerializeToString(), x, LEVELS[1]) - graph.evaluate(read, x))
    assert lost.max() == 2.0**-60
    assert (lost <= float32.margin(read, x[0], x[0]).logits).all()


@pytest.mark.parametrize(
    ("lo", "hi", "words"),
    [
        (np.zeros((1, 2, 3)), np.ones((1, 2, 3)), "do not fit|does not fit"),
        (np.ones((1, 2, 2)), np.zeros((1, 2, 2)), "empty"),
        (np.full((1, 2, 2), np.nan), np.ones((1, 2, 2)), "empty"),
    ],
)
def test_boxes_that_are_none(lo: Floats, hi: Floats, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        float32.margin(graph.read(toys.onnx_tiny(), where="toy"), lo, hi)


def test_every_layer_has_a_rule() -> None:
    kinds = {kind for kind in vars(graph).values() if isinstance(kind, type)}
    known = {kind for kind in kinds if issubclass(kind, graph.Layer) and kind is not graph.Layer}
    assert known == set(forward._RULES) == set(sensitivity._RULES)
