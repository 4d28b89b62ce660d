"""The margin of float32 inference, against networks whose every layer is off by all it may be.

Brute force shares no code with the analysis: it runs the graph layer by layer (`graph.apply`) and
adds errors of its own, or asks onnxruntime.
"""

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import toys
from mlflow_kdguard import graph
from mlflow_kdguard.graph import float32
from mlflow_kdguard.graph.float32.forward import Value, values
from mlflow_kdguard.graph.layers import INPUT

Floats = NDArray[np.float64]
SHAPE = (1, 4, 4)
CLASSES = 5
BATCHES = (1, 2, 64)
IMAGES = 1024
KINDS = ("mlp", "conv", "pool", "residual", "cap")
"""Layouts: layers in a row; convolution and batch norm; windows; a branch; maxima of logits."""


def network(kind: str, seed: int, scale: float = 1.0) -> bytes:
    """A random network of that layout; `scale` multiplies its weights."""
    draw = np.random.default_rng(seed)

    def normal(*shape: int) -> Floats:
        return draw.normal(size=shape) * scale

    node, width = toys.node, 16 if kind in ("mlp", "cap") else 36
    flat = [node("Flatten", ("h",), "f"), node("Gemm", ("f", "m", "b"), "logits")]
    first = [node("Conv", ("p", "w", "c"), "g", pads=[1, 1, 1, 1])]
    halved = {"kernel_shape": [2, 2], "strides": [2, 2]}
    constants = {"w": normal(9, 1, 3, 3), "c": normal(9), "m": normal(width, CLASSES) / 3}
    constants["b"] = normal(CLASSES)
    if kind in ("mlp", "cap"):
        constants |= {"w": normal(16, 16), "c": normal(16)}
        nodes = [node("Flatten", ("p",), "q"), node("Gemm", ("q", "w", "c"), "g")]
        nodes += [node("Relu", ("g",), "h"), node("Gemm", ("h", "m", "b"), "logits")]
    if kind == "cap":
        constants |= {"n": normal(16, CLASSES) / 3}
        nodes[-1] = node("Gemm", ("h", "m", "b"), "a")
        nodes += [node("MatMul", ("h", "n"), "e"), node("Max", ("a", "e"), "x1")]
        nodes += [node("Sub", ("x1", "b"), "x2"), node("Min", ("x2", "a"), "logits")]
    elif kind == "conv":
        constants |= {"gain": normal(9) + 1, "beta": normal(9), "mean": normal(9) * 4}
        constants["var"] = np.ones(9)
        stats = ("g", "gain", "beta", "mean", "var")
        nodes = [*first, node("BatchNormalization", stats, "n"), node("Relu", ("n",), "r")]
        nodes += [node("AveragePool", ("r",), "h", **halved), *flat]
    elif kind == "pool":
        nodes = [*first, node("MaxPool", ("g",), "k", **halved), node("Relu", ("k",), "h"), *flat]
    elif kind == "residual":
        constants["u"] = normal(9, 9, 3, 3) / 9
        nodes = [*first, node("Relu", ("g",), "r"), node("Conv", ("r", "u"), "v", pads=[1] * 4)]
        nodes += [node("Add", ("v", "g"), "s"), node("Relu", ("s",), "t")]
        window = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 0, 0]}
        nodes += [node("AveragePool", ("t",), "h", **window), *flat]
    return toys.proto(nodes, constants, shape=SHAPE, classes=CLASSES).SerializeToString()


def softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def box(seed: int, eps: float) -> tuple[Floats, Floats]:
    """Ends that float32 holds."""
    centre = np.random.default_rng(seed).random((1, *SHAPE))
    lo, hi = (np.clip(centre + shift, 0, 1).astype(np.float32) for shift in (-eps, eps))
    return lo.astype(np.float64), hi.astype(np.float64)


def inside(ends: tuple[Floats, Floats], count: int, seed: int) -> NDArray[np.float32]:
    """float32 images of the box, half of them at its corners."""
    draw = np.random.default_rng(seed)
    share = draw.random((count, *SHAPE))
    share[::2] = share[::2].round()
    x = (ends[0] + share * (ends[1] - ends[0])).astype(np.float32)
    return np.clip(x, ends[0].astype(np.float32), ends[1].astype(np.float32))


def disturbed(
    read: graph.Graph, known: dict[str, Value], x: Floats, draw: np.random.Generator
) -> Floats:
    """Logits of x when every value is off by what its rounding allows (but for a thousandth, which
    float64 is not missed by)."""
    found = {INPUT: x}
    for layer in read.layers:
        real = graph.apply(layer, *(found[name] for name in layer.inputs))
        sign = draw.choice([-1.0, 0.0, 1.0], size=real.shape, p=[0.45, 0.1, 0.45])
        found[layer.name] = real + 0.999 * sign * known[layer.name].local
    return found[read.output]


@given(
    kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6), eps=st.sampled_from([0.0, 0.03, 0.5]),
    scale=st.sampled_from([0.3, 1.0, 3.0, 40.0]),
)  # fmt: skip
def test_no_errors_of_the_layers_lead_beyond_the_margin(
    kind: str, seed: int, eps: float, scale: float
) -> None:
    read = graph.read(network(kind, seed, scale), where="toy")
    ends, draw = box(seed, eps), np.random.default_rng(seed)
    x = inside(ends, 64, seed).astype(np.float64)
    known = values(read, *ends, keep_forms=True)
    margin, leads = float32.margin(read, *ends), float32.lead_margin(read, *ends, 2)
    real, off = graph.evaluate(read, x), disturbed(read, known, x, draw)
    others = [k for k in range(CLASSES) if k != 2]
    change = off - real
    assert (np.abs(change) <= margin.logits).all()
    assert (np.abs(change[:, [2]] - change[:, others]) <= leads).all()
    assert (np.abs(softmax(off) - softmax(real)) <= margin.confidences).all()


@given(
    kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6), eps=st.sampled_from([0.0, 0.03, 0.5]),
    forms=st.booleans(),
)  # fmt: skip
def test_every_value_lies_in_its_range(kind: str, seed: int, eps: float, forms: bool) -> None:
    read = graph.read(network(kind, seed), where="toy")
    ends = box(seed, eps)
    known = values(read, *ends, keep_forms=forms)
    found = {INPUT: inside(ends, 64, seed).astype(np.float64)}
    for layer in read.layers:
        found[layer.name] = graph.apply(layer, *(found[name] for name in layer.inputs))
        value = known[layer.name]
        assert (found[layer.name] >= value.lo - 1e-12).all()
        assert (found[layer.name] <= value.hi + 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("seed", "scale"), [(0, 1.0), (1, 0.01), (2, 50.0)])
def test_onnxruntime_stays_within_the_margin_at_every_batch_size(
    kind: str, seed: int, scale: float
) -> None:
    data = network(kind, seed, scale)
    read, ends = graph.read(data, where="toy"), box(seed, 0.1)
    x = inside(ends, IMAGES, seed)
    margin, leads = float32.margin(read, *ends), float32.lead_margin(read, *ends, 0)
    real = graph.evaluate(read, x.astype(np.float64))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    for batch in BATCHES:
        parts = [session.run(None, {"x": x[at : at + batch]})[0] for at in range(0, IMAGES, batch)]
        off = np.concatenate(parts)
        powers = np.exp(off - off.max(1, keepdims=True))
        computed = powers / powers.sum(1, keepdims=True, dtype=np.float32)
        change = off.astype(np.float64) - real
        assert (np.abs(computed - softmax(real)) <= margin.confidences).all()
        assert (np.abs(change[:, :1] - change[:, 1:]) <= leads).all()


@pytest.mark.parametrize("kind", KINDS)
def test_going_backwards_is_what_makes_it_small(kind: str) -> None:
    """Against carrying magnitudes forwards: tanh(D / 4) of the logits' own errors."""
    shares = []
    for seed in range(8):
        read, ends = graph.read(network(kind, seed), where="toy"), box(seed, 0.03)
        found = float32.margin(read, *ends)
        largest = found.logits.max(1, keepdims=True)
        forwards = np.tanh((found.logits + largest) / 4)
        shares.append(float((found.confidences / forwards).mean()))
    assert np.mean(shares) < 0.8


def test_forms_narrow_the_ranges_behind_the_first_layer() -> None:
    read, ends = graph.read(network("mlp", 3), where="toy"), box(3, 0.1)
    near, far = (values(read, *ends, keep_forms=keep)[read.output] for keep in (True, False))
    assert (near.hi - near.lo < far.hi - far.lo).all()
