"""onnxruntime against its margin: python -m benchmarks.soundness.rounding --cases 300 --seed 0.

Random networks of layers that a runtime folds and re-orders, with constants of extreme scales,
cancelling and denormal ones, and biases of 2^20. At batch sizes 1, 2 and 64, with all of
onnxruntime's rewriting and with none, no logit and no confidence may be further from the real
function than `graph.float32` says. Prints the largest share of the margin that was met, by kind of
network, and how many margins were infinite; exit code 1 where one was left.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.record import machine, write
from mlflow_kdguard import graph
from mlflow_kdguard.errors import ModelError
from mlflow_kdguard.graph import float32

Floats = NDArray[np.float64]
SHAPE, CLASSES, BATCHES, IMAGES = (2, 4, 4), 3, (1, 2, 64), 64
LEVELS = (
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
)
SCALES = ("plain", "extreme", "cancelling", "denormal", "biased", "wide", "folded")
STEPS = ("conv", "mul", "norm", "relu", "pool", "add", "branch", "max")


class _Making:
    """Nodes one after the other; `scale` says what constants look like."""

    def __init__(self, scale: str, draw: np.random.Generator) -> None:
        self.scale, self.draw = scale, draw
        self.nodes = [self._node("Clip", ("x", "low", "high"), "p")]
        self.constants: dict[str, Any] = {"low": 0.0, "high": 1.0}
        self.at, self.shape = "p", SHAPE

    @staticmethod
    def _node(op: str, inputs: Sequence[str], output: str, **options: Any) -> onnx.NodeProto:
        return helper.make_node(op, list(inputs), [output], name=output, **options)

    def add(self, op: str, *given: Any, **options: Any) -> None:
        """One node on the value so far, with constants or names of other values."""
        name, inputs = f"v{len(self.nodes)}", [self.at]
        for place, value in enumerate(given):
            inputs.append(value if isinstance(value, str) else f"{name}.{place}")
            if not isinstance(value, str):
                self.constants[inputs[-1]] = value
        self.nodes.append(self._node(op, inputs, name, **options))
        self.at = name

    def numbers(self, *shape: int) -> Floats:
        """Constants of the kind that was asked for, at most 2^20."""
        values = self.draw.normal(size=shape)
        if self.scale == "extreme":
            values = values * 2.0 ** self.draw.integers(-110, 19)
        elif self.scale == "cancelling":
            values = values * 2.0 ** self.draw.integers(
                0, 18, size=(shape[0], *[1] * (len(shape) - 1))
            )
            flat = values.reshape(shape[0], -1)
            half = flat.shape[1] // 2
            flat[:, half : 2 * half] = -flat[:, :half] * (1 + 1e-7)
        elif self.scale == "denormal":
            values = np.where(self.draw.random(shape) < 0.5, values * 1e-41, values * 2.0**10)
        return np.clip(values, -(2.0**20), 2.0**20)

    def offsets(self, size: int) -> Floats:
        factor = 2.0**18 if self.scale == "biased" else 1.0
        return np.clip(self.draw.normal(size=size) * factor, -(2.0**20), 2.0**20)

    def step(self, kind: str) -> None:
        """One layer of some kind, of the same shape."""
        channels = self.shape[0]
        wide = (channels, 1, 1)
        if kind == "conv":
            self.add("Conv", self.numbers(channels, channels, 3, 3), self.offsets(channels),
                     pads=[1] * 4)  # fmt: skip
        elif kind == "mul":
            self.add("Mul", self.numbers(*(wide if self.draw.random() < 0.5 else (1, 1, 1))))
        elif kind == "norm":
            variance = np.abs(self.numbers(channels)) + 1e-30
            self.add("BatchNormalization", self.numbers(channels), self.offsets(channels),
                     self.offsets(channels), variance, epsilon=1e-12)  # fmt: skip
        elif kind in ("relu", "pool"):
            options = {} if kind == "relu" else {"kernel_shape": [3, 3], "pads": [1] * 4}
            self.add({"relu": "Relu", "pool": "AveragePool"}[kind], **options)
        elif kind == "add":
            self.add("Add", self.offsets(channels).reshape(wide))
        else:
            before = self.at
            self.step("conv")
            self.add("Max" if kind == "max" else "Add", before)

    def done(self) -> bytes:
        """The network, with a linear layer or two behind a flattening."""
        self.add("Flatten")
        sizes = [int(np.prod(self.shape)), 2048 if self.scale == "wide" else 8, CLASSES]
        for into, out in pairwise(sizes):
            self.add("MatMul", self.numbers(into, out))
            self.add("Add", self.offsets(out))
            self.add("Relu")
        self.nodes.pop()
        self.nodes[-1].output[0] = "logits"
        given = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape])
            for name, shape in (("x", SHAPE), ("logits", (CLASSES,)))
        ]
        held = [numpy_helper.from_array(np.asarray(v, np.float32), k)
                for k, v in self.constants.items()]  # fmt: skip
        made = helper.make_graph(self.nodes, "hostile", given[:1], given[1:], held)
        opset = [helper.make_opsetid("", 18)]
        return helper.make_model(made, opset_imports=opset, ir_version=10).SerializeToString()


def network(scale: str, draw: np.random.Generator) -> bytes:
    """A random network of 3 to 8 layers."""
    making = _Making(scale, draw)
    if scale == "folded":
        return _folded(making)
    for _ in range(int(draw.integers(3, 9))):
        making.step(str(draw.choice(STEPS)))
    return making.done()


def _folded(making: _Making) -> bytes:
    """Numbers stay within float32; products of constants that a runtime folds do not."""
    draw, channels, level = making.draw, SHAPE[0], 0

    def grown(power: int) -> None:
        kernel = 0.1 + draw.random((channels, channels, 1, 1))
        making.add("Conv", kernel * 2.0**power)

    down = [int(draw.integers(20, 110)) for _ in range(2)]
    while level < 90:
        grown(17)
        making.step("relu")
        level += 17
    grown(-down[0])
    factor, zero = 2.0 ** -down[1] * (0.5 + draw.random(channels)), np.zeros(channels)
    if draw.random() < 0.5:
        making.add("Mul", factor.reshape(channels, 1, 1))
    else:
        making.add("BatchNormalization", factor, zero, zero, zero + 1.0, epsilon=1e-20)
    level -= sum(down)
    making.step("relu")
    while level < -8:
        grown(17)
        making.step("relu")
        level += 17
    return making.done()


def met(data: bytes, draw: np.random.Generator) -> float | None:
    """The largest share of its margin that onnxruntime is off by; None where that is infinite."""
    read = graph.read(data, where="the network")
    centre, eps = draw.random((1, *SHAPE)), float(draw.choice([0.0, 0.01, 0.3]))
    lo, hi = (np.clip(centre + e, 0, 1).astype(np.float32).astype(float) for e in (-eps, eps))
    share = draw.random((IMAGES, *SHAPE))
    share[::2] = share[::2].round()
    x = np.clip(lo + share * (hi - lo), lo, hi).astype(np.float32)
    margin = float32.margin(read, lo, hi)
    if not np.isfinite(margin.logits).all():
        return None
    real, worst = graph.evaluate(read, x.astype(np.float64)), 0.0
    for level in LEVELS:
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.graph_optimization_level = 3, level
        run = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run
        for batch in BATCHES:
            parts = [run(None, {"x": x[at : at + batch]})[0] for at in range(0, IMAGES, batch)]
            found = np.concatenate(parts).astype(np.float64)
            off = np.abs(found - real) / np.maximum(margin.logits, 1e-300)
            soft = np.abs(_softmax(found) - _softmax(real)) / margin.confidences
            worst = max(worst, *(float(np.nan_to_num(v, nan=np.inf).max()) for v in (off, soft)))
    return worst


def _softmax(z: Floats) -> Floats:
    powers = np.exp(z - z.max(1, keepdims=True))
    shares: Floats = powers / powers.sum(1, keepdims=True)
    return shares


def main() -> None:
    """Draw networks, compare, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = {s: {"networks": 0, "refused": 0, "infinite": 0, "largest share": 0.0} for s in SCALES}
    for case in range(given.cases):
        scale, draw = SCALES[case % len(SCALES)], np.random.default_rng((given.seed, case))
        row = found[scale]
        row["networks"] += 1
        try:
            share = met(network(scale, draw), draw)
        except ModelError:
            row["refused"] += 1
            continue
        if share is None:
            row["infinite"] += 1
            continue
        row["largest share"] = max(row["largest share"], share)
        if share > 1.0:
            print(f"LEFT ITS MARGIN: case {case} ({scale}), {share:.3g} times", flush=True)
    for scale, row in found.items():
        print(f"{scale:12}", row)
    print(f"wrote {write('rounding.json', {**machine(), 'asked': vars(given), **found})}")
    sys.exit(any(row["largest share"] > 1.0 for row in found.values()))


if __name__ == "__main__":
    main()
