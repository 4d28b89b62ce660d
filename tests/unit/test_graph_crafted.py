"""Files crafted to be read in two ways: each is refused, or is what onnxruntime computes.

"Is" means: 1,000 images, in batches of 1, 2 and 64, within the margin of float32 inference that
`graph.float32` computes for the file (`docs/threat-model.md`, 13).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

import toys
from crafted import CLASSES, SHAPE, Case, changed, claimed, ended, ints, node, normal, one, tensor
from mlflow_kdguard import graph
from mlflow_kdguard.errors import ModelError
from mlflow_kdguard.graph import float32

FLOAT = TensorProto.FLOAT
IMAGES = 1000
BATCHES = (1, 2, 64)
c = toys.constant


def raw(name: str, values: Any) -> Callable[[], ModelProto]:
    """The harmless network with other values in one constant."""
    return changed(lambda model: setattr(tensor(model, name), "raw_data", values.tobytes()))


def norm(variance: Any, *, opset: int = 18, gain: Any = (1.0, -2.0), **options: Any) -> Any:
    """Batch norm with these variances."""
    given = [c("g", gain), c("o", normal(2)), c("m", normal(2, seed=1)), c("v", variance)]
    return one("BatchNormalization", "p g o m v", *given, opset=opset, **options)


def flat_gemm(*constants: Any, inputs: str = "f w", **options: Any) -> Callable[[], ModelProto]:
    """Flatten and a Gemm with odd options."""
    nodes = [node("Flatten", "p", "f"), node("Gemm", inputs, transB=1, **options)]
    return lambda: ended(nodes, constants, width=6)


def folded_batch(*claim: int | str) -> Callable[[], ModelProto]:
    """A reshape by the batch size, of which the file claims to know it; the pool then sees two
    images one above the other. With one image at a time everything is as it looks."""

    def make() -> ModelProto:
        nodes = [
            node("Relu", "p", "r"), node("Shape", "r", "s"), node("Gather", "s zero", "n", axis=0),
            node("Concat", "n rest", "k", axis=0), node("Reshape", "p k", "tall"),
            node("MaxPool", "tall", "seen", kernel_shape=[2, 1], pads=[1, 0, 0, 0]),
            node("Reshape", "seen back"),
        ]  # fmt: skip
        constants = [ints("zero", 0), ints("rest", 2, -1, 4), ints("back", -1, 32)]
        model = ended(nodes, constants, width=32)
        if claim:
            claimed("r", FLOAT, claim)(model)
        return model

    return make


def with_body(op: str, inputs: str, output: str = "y") -> Callable[[], ModelProto]:
    """If, Loop or Scan: a node with a graph inside."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["p"], ["inner"])], "body", [],
        [helper.make_tensor_value_info("inner", FLOAT, ["N", *SHAPE])],
    )  # fmt: skip
    names = {"If": ["then_branch", "else_branch"]}.get(op, ["body"])
    more = {"num_scan_inputs": 1} if op == "Scan" else {}
    constants = [c("yes", True, np.bool_)] if op == "If" else [ints("yes", 1)]
    return lambda: ended(
        [node(op, inputs, output, **dict.fromkeys(names, body), **more)], constants, width=32
    )


def function(model: ModelProto) -> None:
    inner = [helper.make_node("Neg", ["a"], ["b"])]
    made = helper.make_function("own", "Relu", ["a"], ["b"], inner, [helper.make_opsetid("", 18)])
    model.functions.append(made)
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node[3].domain = "own"


def external(model: ModelProto) -> None:
    held = tensor(model, "w")
    held.ClearField("raw_data")
    held.data_location = TensorProto.EXTERNAL
    held.external_data.add(key="location", value="../weights.bin")


def sparse(model: ModelProto) -> None:
    values = helper.make_sparse_tensor(c("w", [1.0]), ints("", 5), [6, 32])
    model.graph.initializer.remove(tensor(model, "w"))
    model.graph.sparse_initializer.append(values)


def half(model: ModelProto) -> None:
    tensor(model, "w").CopyFrom(c("w", normal(6, 32), np.float16))


def shadow(model: ModelProto) -> None:
    """The weight may be replaced by whoever calls: older runtimes take it for a default."""
    model.graph.input.append(helper.make_tensor_value_info("w", FLOAT, [6, 32]))


def cycle(model: ModelProto) -> None:
    model.graph.node[1].input[0] = "y"


def backwards(model: ModelProto) -> None:
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def batch_of_one(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def text(model: ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("t", TensorProto.STRING, [1], [b"rm -rf"]))


def indices() -> ModelProto:
    model = one("MaxPool", "p", width=18, kernel_shape=[2, 2])()
    model.graph.node[1].output.append("places")
    return model


def chain(*nodes: Any, constants: Any = (), width: int = 32) -> Callable[[], ModelProto]:
    return lambda: ended(nodes, constants, width=width)


LIES = [
    Case("a batch claimed to be 1", folded_batch(1, *SHAPE), "'r' with sides"),
    Case("a batch claimed to be 64", folded_batch(64, *SHAPE), "'r' with sides"),
    Case("the batch named, as it should be", folded_batch("N", *SHAPE)),
    Case("no claim about the batch", folded_batch()),
    Case("a claimed width", changed(claimed("g", FLOAT, ["N", 7])), "'g' with sides"),
    Case("a claimed rank", changed(claimed("g", FLOAT, ["N", 6, 1])), "'g' with sides"),
    Case("one symbol for two sides", changed(claimed("g", FLOAT, ["N", "N"])), "'g' with sides"),
    Case("a claimed type", changed(claimed("g", TensorProto.DOUBLE, ["N", 6])), "than FLOAT"),
    Case("a turned weight", changed(claimed("w", FLOAT, [32, 6])), "'w' with sides"),
    Case("a claim about nothing", changed(claimed("ghost", FLOAT, ["N"])), "there is none"),
    Case("a claim without sides", changed(claimed("g", FLOAT, None))),
    Case("a batch of 1 at the door", changed(batch_of_one), "fixed at 1"),
    Case("reshape to 64 images", one("Reshape", "p k", ints("k", 64, 32)), "mix the batch"),
    Case("reshape to 2 images", one("Reshape", "p k", ints("k", 2, -1)), "mix the batch"),
    Case("reshape that empties", one("Reshape", "p k", ints("k", 0, 32), allowzero=1), "empty"),
    Case("allowzero without a zero", one("Reshape", "p k", ints("k", -1, 32), allowzero=1)),
    Case("reshape with zeros", one("Reshape", "p k", ints("k", 0, 0, -1))),
    Case("flatten at 0", one("Flatten", "p", axis=0), "mix the batch"),
    Case("flatten at 2", one("Flatten", "p", axis=2), "mix the batch"),
    Case("flatten at -1", one("Flatten", "p", axis=-1), "mix the batch"),
    Case("flatten at -3, which is 1", one("Flatten", "p", axis=-3)),
    Case("a mean over the batch", one("ReduceMean", "p k", ints("k", 0), width=32), "over pixels"),
    Case("the batch turned inwards", one("Transpose", "p", perm=[1, 0, 2, 3]), "not supported"),
    Case("a product of two images", chain(node("MatMul", "p p")), "constant"),
    Case("an expanded batch", one("Expand", "p k", ints("k", 2, 1, 1, 1)), "not supported"),
    Case("gemm of the transpose", flat_gemm(c("w", normal(6, 6)), transA=1), "transA"),
]

NUMBERS = [
    Case("alpha lifts weights of a few bits",
         flat_gemm(c("w", normal(6, 32) * np.float32(1e-43)), alpha=3e38), "swallow"),
    Case("beta as well", flat_gemm(c("w", normal(6, 32)), c("b", normal(6)), inputs="f w b",
                                   beta=-(2.0**21)), "swallow"),
    Case("alpha infinite", flat_gemm(c("w", normal(6, 32)), alpha=float("inf")), "swallow"),
    Case("alpha NaN", flat_gemm(c("w", normal(6, 32)), alpha=float("nan")), "swallow"),
    Case("alpha and beta", flat_gemm(c("w", normal(6, 32)), c("b", normal(1, 6)),
                                     inputs="f w b", alpha=-0.25, beta=3.0)),
    Case("a bias by column", flat_gemm(c("w", normal(6, 32)), c("b", normal(6, 1)),
                                       inputs="f w b"), "does not fit"),
    Case("weights NaN", raw("w", np.full((6, 32), np.nan, np.float32)), "NaN"),
    Case("one weight infinite", raw("b", np.array([0, 0, np.inf, 0, 0, 0], "f4")), "NaN"),
    Case("weights 1e38", raw("w", np.full((6, 32), 1e38, np.float32)), "swallow"),
    Case("weights denormal", raw("w", normal(6, 32) * np.float32(1e-41))),
    Case("weights that cancel", raw("w", np.tile(np.array([2.0**20, -(2.0**20)], "f4"), 96))),
    Case("up and down by 2^26", chain(node("Add", "p k", "u"), node("Sub", "u k"),
                                      constants=[c("k", 2.0**26)]), "swallow"),
    Case("up and down by 2^20", chain(node("Add", "p k", "u"), node("Sub", "u k"),
                                      constants=[c("k", 2.0**20)])),
    Case("half precision", changed(half), "float32"),
    Case("integers in between", one("Cast", "p", to=TensorProto.INT32), "not supported"),
    Case("quantised", one("QuantizeLinear", "p s", c("s", 0.1)), "not supported"),
    Case("a clip to NaN", one("Clip", "p l h", c("l", np.nan), c("h", 1.0)), "NaN"),
    Case("a clip upside down", one("Clip", "p l h", c("l", 0.8), c("h", 0.2)), "exceeds"),
    Case("a clip without a floor", one("Clip", "p - h", c("h", 0.4))),
    Case("a variance below zero", norm([1.0, -1e-3]), "variance"),
    Case("a variance of zero", norm([1.0, 0.0], epsilon=0.0), "variance"),
    Case("epsilon zero", norm([1.0, 0.3], epsilon=0.0)),
    Case("epsilon below zero", norm([1.0, 0.3], epsilon=-0.2)),
    Case("a variance of a few bits", norm([1e-44, 3e-45], epsilon=0.0, gain=[1e-20, 1e-19])),
    Case("batch norm in training", norm([1.0, 0.3], training_mode=1), "training"),
    Case("batch norm of opset 13", norm([1.0, 0.3], opset=13)),
]  # fmt: skip

WINDOWS = [
    Case("conv padded by its runtime",
         one("Conv", "p w", c("w", normal(2, 2, 3, 3)), auto_pad="SAME_LOWER"), "auto_pad"),
    Case("conv grouped, dilated, lopsided",
         one("Conv", "p w", c("w", normal(4, 1, 3, 2)), group=2, dilations=[2, 1],
             pads=[2, 0, 2, 1], strides=[1, 2], width=32)),
    Case("max pool rounded up",
         one("MaxPool", "p", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1), "ceil_mode"),
    Case("average pool rounded up",
         one("AveragePool", "p", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1), "ceil_mode"),
    Case("max pool with its places", indices, "more than one output"),
    Case("max pool, lopsided",
         one("MaxPool", "p", width=20, kernel_shape=[3, 2], pads=[1, 0, 2, 1], strides=[1, 2])),
    Case("max pool by columns",
         one("MaxPool", "p", kernel_shape=[2, 2], storage_order=1), "storage_order"),
    *(Case(f"average pool, padding {'counts' if counts else 'left out'}, opset {opset}",
           one("AveragePool", "p", width=20, opset=opset, kernel_shape=[3, 2], pads=[1, 0, 2, 1],
               strides=[1, 2], count_include_pad=counts))
      for counts in (0, 1) for opset in (13, 19, 21)),
    Case("average pool with holes",
         one("AveragePool", "p", opset=19, kernel_shape=[2, 2], dilations=[2, 2]), "dilated"),
]  # fmt: skip

STRUCTURE = [
    Case("two outputs", changed(lambda m: m.graph.output.append(
        helper.make_tensor_value_info("g", FLOAT, ["N", 6]))), "one output"),
    Case("two weights of one name", changed(
        lambda m: m.graph.initializer.append(c("w", normal(6, 32)))), "not unique"),
    Case("a weight that is an input", changed(shadow), "called 'w'"),
    Case("weights elsewhere", changed(external), "another file"),
    Case("raw and typed values", changed(
        lambda m: tensor(m, "w").float_data.extend([0.0] * 192)), "only one value field"),
    Case("sparse weights", changed(sparse), "sparse"),
    Case("text among the weights", changed(text), "neither float32 nor int64"),
    Case("a function of its own", changed(function), "local functions"),
    Case("another domain", changed(lambda m: setattr(m.graph.node[3], "domain", "com.evil")),
         "com.evil"),
    Case("If", with_body("If", "yes"), "subgraph"),
    Case("Loop", with_body("Loop", "yes - p"), "subgraph"),
    Case("Scan", with_body("Scan", "p"), "subgraph"),
    Case("a node that leads nowhere", changed(
        lambda m: m.graph.node.append(node("Relu", "g", "aside"))), "does not reach"),
    Case("nodes in a circle", changed(cycle), "topologically sorted"),
    Case("nodes backwards", changed(backwards), "topologically sorted"),
    Case("two nodes of one name", changed(
        lambda m: setattr(m.graph.node[2], "name", "flat")), "called 'flat'"),
    Case("two values of one name", changed(
        lambda m: m.graph.node.insert(3, node("Relu", "g", "g"))), "single static assignment"),
    Case("a weight left out", chain(node("Conv", "p -")), "empty string"),
    Case("opset 9", changed(lambda m: setattr(m.opset_import[0], "version", 9)), "not valid ONNX"),
    Case("opset 25", changed(lambda m: setattr(m.opset_import[0], "version", 25)), "opset"),
    Case("the opset under its other name", changed(
        lambda m: setattr(m.opset_import[0], "domain", "ai.onnx"))),
    Case("softmax inside", one("Softmax", "p"), "not supported"),
    Case("dropout in training", chain(
        node("Dropout", "p r t"), constants=[c("r", 0.5), c("t", True, np.bool_)]), "float32"),
    Case("dropout", one("Dropout", "p"), "not supported"),
    Case("noise", chain(node("RandomNormalLike", "p", "n"), node("Add", "p n")), "not supported"),
    Case("a weight by another name", chain(
        node("Identity", "k", "l"), node("Mul", "p l"), constants=[c("k", 0.7)])),
]  # fmt: skip

CASES = [*LIES, *NUMBERS, *WINDOWS, *STRUCTURE]
READ = [case for case in CASES if case.words is None]
REFUSED = [case for case in CASES if case.words is not None]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_it_is_refused_for_what_it_is(case: Case) -> None:
    with pytest.raises(ModelError) as caught:
        graph.read(case.make().SerializeToString(), where="crafted.onnx")
    assert case.words is not None
    assert case.words in caught.value.message
    assert caught.value.message.startswith("crafted.onnx: ")


@pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
def test_it_is_read_and_agrees_with_onnxruntime(case: Case) -> None:
    data = case.make().SerializeToString()
    assert disagreement(data) <= 1.0


def disagreement(data: bytes) -> float:
    """Largest distance between runtime and reading, as a share of the margin, at any batch size."""
    read = graph.read(data, where="crafted.onnx")
    x = images()
    expected = graph.evaluate(read, x.astype(np.float64))
    found = float32.margin(read, x.min(0), x.max(0))
    leads = float32.lead_margin(read, x.min(0), x.max(0), 0)
    margins = found.logits, found.confidences, leads
    assert all((margin > 0).all() and np.isfinite(margin).all() for margin in margins)
    worst = 0.0
    for batch in BATCHES:
        computed = logits(data, x, batch)
        assert computed.shape == (IMAGES, CLASSES)
        for seen, real, margin in zip(told(computed), told(expected), margins, strict=True):
            worst = max(worst, float((np.abs(seen - real) / margin).max()))
    return worst


def told(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Logits, confidences, and how far class 0 leads each other one."""
    powers = np.exp(values - values.max(1, keepdims=True))
    return values, powers / powers.sum(1, keepdims=True), values[:, :1] - values[:, 1:]


def images() -> NDArray[np.float32]:
    """Pixels in [0,1], and at every tenth image far outside, which the first clip cuts off."""
    x = toys.images(IMAGES, SHAPE, seed=5)
    x[::10] = x[::10] * 310 - 10
    return x


def logits(data: bytes, x: NDArray[np.float32], batch: int) -> NDArray[np.float64]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    parts = [session.run(None, {"x": x[at : at + batch]})[0] for at in range(0, len(x), batch)]
    return np.concatenate(parts).astype(np.float64)


def test_there_are_enough_of_them() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= 30
    assert len(READ) >= 15


def test_the_claimed_batch_is_a_real_attack() -> None:
    """What the refused file does in the runtime: one image at a time it is the honest network,
    two at a time it is another. So the comparison above would have seen it."""
    honest, forged = (folded_batch(*claim)().SerializeToString() for claim in ((), (1, *SHAPE)))
    x = images()
    assert disagreement(honest) <= 1.0
    np.testing.assert_array_equal(logits(forged, x, 1), logits(honest, x, 1))
    for batch in (2, 64):
        assert np.abs(logits(forged, x, batch) - logits(honest, x, batch)).max() > 0.1


def test_lifted_weights_are_a_real_attack() -> None:
    """float32 holds 1e-43 with six bits: the product with a pixel is off by a percent."""
    tiny = (normal(6, 32) * np.float32(1e-43)).astype(np.float32)
    data = flat_gemm(c("w", tiny), alpha=3e38)().SerializeToString()
    x = images()
    hidden = np.clip(x, 0, 1).reshape(len(x), -1) @ (tiny.astype(np.float64) * 3e38).T
    end = ended([], width=6)
    weight, bias = (np.frombuffer(tensor(end, name).raw_data, "f4") for name in ("w_end", "b_end"))
    exact = hidden @ weight.reshape(CLASSES, 6).T + bias
    relative = np.abs(logits(data, x, 64) - exact) / np.abs(exact - bias).max()
    assert relative.max() > 2.0**-12
