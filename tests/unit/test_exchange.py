"""Queries for other solvers: the files say exactly what certify asks, and nothing else."""

import json
import re
from collections.abc import Callable
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto

import toys
from mlflow_kdguard import graph
from mlflow_kdguard.certify import Ball, exchange, join, witness
from mlflow_kdguard.certify.exchange import vnnlib as text
from mlflow_kdguard.certify.exchange.product import Form
from mlflow_kdguard.config import CertifySection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.errors import DataError, ModelError, UsageError
from mlflow_kdguard_cli.main import answer
from requirements import require

Floats = NDArray[np.float64]
SHAPE = (1, 4, 4)
K = 3
FORMS: tuple[Form, ...] = ("softmax", "margins")


def normal(*shape: int, seed: int) -> Floats:
    return np.random.default_rng(seed).normal(size=shape)


def mlp(seed: int, *, hidden: int = 8, opset: int = 18) -> bytes:
    nodes = [
        toys.node("Flatten", ("p",), "h0"),
        toys.node("Gemm", ("h0", "w0", "b0"), "g0", transB=1),
        toys.node("Relu", ("g0",), "h1"),
        toys.node("Gemm", ("h1", "w1", "b1"), "logits", transB=1),
    ]
    constants = {
        "w0": normal(hidden, 16, seed=seed), "b0": normal(hidden, seed=seed + 1),
        "w1": normal(K, hidden, seed=seed + 2), "b1": normal(K, seed=seed + 3),
    }  # fmt: skip
    return toys.proto(nodes, constants, shape=SHAPE, opset=opset).SerializeToString()


def pooled(seed: int, *, opset: int = 18) -> bytes:
    """A convolution and a mean, whose axes are an attribute up to opset 17."""
    mean = (
        toys.node("ReduceMean", ("r",), "logits", axes=[2, 3], keepdims=0)
        if opset < 18
        else toys.node("ReduceMean", ("r", "axes"), "logits", keepdims=0)
    )
    nodes = [toys.node("Conv", ("p", "w", "b"), "c"), toys.node("Relu", ("c",), "r"), mean]
    constants = [toys.constant("w", 4 * normal(K, 1, 2, 2, seed=seed)),
                 toys.constant("b", normal(K, seed=seed + 1))]  # fmt: skip
    constants += [toys.constant("axes", [2, 3], np.int64)] if opset >= 18 else []
    return toys.proto(nodes, constants, shape=SHAPE, opset=opset).SerializeToString()


def awkward(seed: int) -> bytes:
    """Names that the product gives itself, clip limits used twice, and no clip of its own input."""
    model = ModelProto.FromString(mlp(seed))
    new = {"g0": "difference", "h0": "p_reference", "h1": "confidences", "w0": "student_w0"}
    for node in model.graph.node:
        node.name = new.get(node.name, node.name)
        for names in (node.input, node.output):
            names[:] = [new.get(name, name) for name in names]
    for tensor in model.graph.initializer:
        tensor.name = new.get(tensor.name, tensor.name)
    model.graph.node.insert(3, toys.node("Clip", ("difference", "low", "high"), "again"))
    model.graph.node[4].input[0] = "again"
    return model.SerializeToString()


def run(data: bytes, x: Any, batch: int = 64) -> Floats:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    x = np.asarray(x, np.float32)
    parts = [session.run(None, {"x": x[at : at + batch]})[0] for at in range(0, len(x), batch)]
    return np.concatenate(parts).astype(np.float64)


def softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


PAIRS: dict[str, tuple[bytes, bytes]] = {
    "mlps": (mlp(0), mlp(10, hidden=5)),
    "mean": (mlp(0), pooled(20)),
    "older student": (mlp(0, opset=18), pooled(20, opset=17)),
    "older reference": (pooled(20, opset=13), mlp(0, opset=21)),
    "awkward names": (awkward(0), awkward(4)),
    "the same twice": (mlp(0), mlp(0)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("batch", [1, 2, 64])
@pytest.mark.parametrize("form", FORMS)
def test_the_product_computes_what_the_two_networks_compute(
    name: str, batch: int, form: Form
) -> None:
    reference, student = PAIRS[name]
    x = toys.images(1000, SHAPE, seed=1)
    apart = softmax(run(student, x)) - softmax(run(reference, x))
    together = run(exchange.product(reference, student, form=form), x, batch)
    assert together.shape == (1000, K)
    np.testing.assert_allclose(together, apart, rtol=0, atol=4e-6)
    assert name == "the same twice" or np.abs(apart).max() > 0.3


@pytest.mark.parametrize("form", FORMS)
def test_logits_far_apart_give_no_nan(form: Form) -> None:
    """exp(z_j - z_k) overflows at 89; the confidence is then 0, as it should be."""
    weights = [1000 * normal(K, 16, seed=seed) for seed in (1, 2)]
    nets = [toys.onnx_mlp([weight], [np.zeros(K)], shape=SHAPE) for weight in weights]
    x = toys.images(100, SHAPE)
    found = run(exchange.product(nets[0], nets[1], form=form), x)
    apart = softmax(run(nets[1], x)) - softmax(run(nets[0], x))
    assert np.ptp(run(nets[0], x), axis=1).min() > 89
    np.testing.assert_allclose(found, apart, rtol=0, atol=1e-4)


@pytest.mark.parametrize("data", [mlp(0), pooled(3), awkward(4)], ids=["mlp", "pooled", "awkward"])
def test_a_network_with_softmax_gives_its_confidences(data: bytes) -> None:
    x = toys.images(200, SHAPE)
    made = exchange.confidences(data, where="toy")
    np.testing.assert_allclose(run(made, x), softmax(run(data, x)), rtol=0, atol=2e-6)


def test_the_clip_is_left_out_with_its_limits_and_the_files_are_plain() -> None:
    reference, student = PAIRS["mlps"]
    products = [exchange.product(reference, student, form=form) for form in FORMS]
    for data in (*products, exchange.confidences(student, where="s")):
        model = ModelProto.FromString(data)
        assert "Clip" not in {node.op_type for node in model.graph.node}
        used = {name for node in model.graph.node for name in node.input}
        assert {tensor.name for tensor in model.graph.initializer} <= used
        assert [value.name for value in model.graph.input] == ["x"]
        assert len(model.graph.output) == 1
        assert not model.graph.value_info
    again = ModelProto.FromString(exchange.product(*PAIRS["awkward names"]))
    assert [node.op_type for node in again.graph.node].count("Clip") == 2
    assert exchange.product(reference, student) == exchange.product(reference, student)


def test_networks_that_do_not_fit_are_refused() -> None:
    other = toys.onnx_tiny(shape=SHAPE, classes=4)
    with pytest.raises(ModelError, match="no gap to ask about"):
        exchange.product(mlp(0), other)
    with pytest.raises(ModelError, match="the student"):
        exchange.product(mlp(0), b"\x08\x0a")


def test_a_network_that_changes_with_its_operator_set_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swapped = ModelProto.FromString(mlp(99, opset=18))
    monkeypatch.setattr("onnx.version_converter.convert_version", lambda *_: swapped)
    with pytest.raises(ModelError, match="another network in opset 18"):
        exchange.product(mlp(0, opset=17), mlp(1, opset=18))


# ── The questions, read by parsers that share no code with the writer ───────────────────────────


def tree(source: str) -> list[Any]:
    """All expressions of a file as nested lists of words."""
    plain = re.sub(r";[^\n]*", "", source)
    stack: list[list[Any]] = [[]]
    for word in re.findall(r"[()]|[^\s()]+", plain):
        if word == "(":
            stack.append([])
        elif word == ")":
            inner = stack.pop()
            stack[-1].append(inner)
        else:
            stack[-1].append(word)
    assert len(stack) == 1
    return stack[0]


def value(term: Any, given: dict[str, Fraction]) -> Fraction:
    if isinstance(term, list):
        assert term[0] == "-"
        return value(term[1], given) - value(term[2], given)
    return given[term] if term in given else Fraction(term)


def holds(formula: Any, given: dict[str, Fraction]) -> bool:
    word, *rest = formula
    if word in ("and", "or"):
        return (all if word == "and" else any)(holds(part, given) for part in rest)
    left, right = (value(term, given) for term in rest)
    return {"<=": left <= right, ">=": left >= right, "==": left == right}[word]


def satisfied(source: str, given: dict[str, Fraction]) -> bool:
    asserted = [each[1] for each in tree(source) if each[0] == "assert"]
    assert asserted
    return all(holds(formula, given) for formula in asserted)


def exactly(prefix: str, values: Any) -> dict[str, Fraction]:
    return {f"{prefix}_{i}": Fraction(float(each)) for i, each in enumerate(np.ravel(values))}


def images(count: int = 6) -> Dataset:
    x = toys.images(count, SHAPE, seed=2)
    x[:, 0, 0, 0], x[:, 0, 0, 1], x[:, 0, 3, 3] = 0.0, 1.0, 0.1
    return Dataset.of(x, np.arange(count) % K, uri="toy", classes=K)


def written(tmp_path: Path, *, eps: float = 0.1, delta: float = 0.2, **asked: Any) -> str:
    exchange.export(
        *PAIRS["mlps"], images(), [3], tmp_path, config=CertifySection(eps=eps, delta=delta),
        asked=exchange.Asked(**asked),
    )  # fmt: skip
    return (tmp_path / "image-3.v1.vnnlib").read_text()


@pytest.mark.parametrize("eps", [0.1, 1 / 255, 1e-9, 0.7])
def test_the_box_of_version_1_is_the_box_of_certify_to_the_last_bit(
    tmp_path: Path, eps: float
) -> None:
    found: dict[str, list[Any]] = {}
    for _, (relation, name, number) in (
        each for each in tree(written(tmp_path, eps=eps)) if each[0] == "assert" and
        each[1][0] != "or"
    ):  # fmt: skip
        found.setdefault(name, []).append((relation, Fraction(number)))
    ball = Ball.around(torch.from_numpy(images().x[3:4]), eps=eps)
    for i, (lo, hi) in enumerate(zip(ball.lo.flatten(), ball.hi.flatten(), strict=True)):
        assert found[f"X_{i}"] == [(">=", Fraction(lo.item())), ("<=", Fraction(hi.item()))]
        assert 0 <= Fraction(lo.item()) <= Fraction(hi.item()) <= 1
    assert len(found) == 16


def test_the_constraint_of_version_1_is_the_negated_property(tmp_path: Path) -> None:
    delta = Fraction(0.3)
    for asked, expected in (
        ({"classes": "1", "signs": ("plus",)}, [">=", "Y_1", delta]),
        ({"classes": "2", "signs": ("minus",)}, ["<=", "Y_2", -delta]),
    ):
        *_, last = tree(written(tmp_path, delta=0.3, **asked))
        relation, name, number = last[1]
        assert [relation, name, Fraction(number)] == expected
    *_, last = tree(written(tmp_path, delta=0.3))
    parts = [part[1] for part in last[1][1:] if part[0] == "and" and len(part) == 2]
    assert last[1][0] == "or"
    assert {(relation, name, Fraction(number)) for relation, name, number in parts} == {
        each for k in range(K) for each in ((">=", f"Y_{k}", delta), ("<=", f"Y_{k}", -delta))
    }
    reference, _ = PAIRS["mlps"]
    top = int(run(reference, images().x[3:4]).argmax())
    *_, last = tree(written(tmp_path, classes="top"))
    assert {part[1][1] for part in last[1][1:]} == {f"Y_{top}"}


LINE = re.compile(
    r"\(declare-const [XY]_\d+ Real\)"
    r"|\(assert \((<=|>=) [XY]_\d+ -?\d+\.\d+\)\)"
    r"|\(assert \(or (\(and \((<=|>=) Y_\d+ -?\d+\.\d+\)\))+\)\)"
)


def test_version_1_keeps_to_the_lines_that_solvers_read(tmp_path: Path) -> None:
    lines = written(tmp_path).splitlines()
    bare = [line for line in lines if not line.startswith(";")]
    assert all(LINE.fullmatch(line) for line in bare)
    assert len(bare) == 16 + K + 32 + 1
    assert all(line.isascii() for line in lines)


def attack(eps: float) -> tuple[Floats, Floats]:
    """The witness that certify's own search finds around image 3, and its differences."""
    graphs = [graph.read(data, where="toy") for data in PAIRS["mlps"]]
    ball = Ball.around(torch.from_numpy(images().x[3:4]), eps=eps)
    joint = join(*graphs, device=torch.device("cpu")).cast(torch.float32, torch.device("cpu"))
    found = witness.search(
        joint, ball, None, effort=witness.Effort(40, 5), generator=torch.Generator().manual_seed(0)
    ).numpy()
    return found, difference(found)


def difference(x: Floats) -> Floats:
    reference, student = (graph.read(data, where="toy") for data in PAIRS["mlps"])
    return softmax(graph.evaluate(student, x)) - softmax(graph.evaluate(reference, x))


def outside(x: Floats) -> Floats:
    """The same image but for one pixel, which is a hair above its upper end."""
    moved = x.copy()
    ball = Ball.around(torch.from_numpy(images().x[3:4]), eps=0.1)
    moved[0, 0, 1, 1] = np.nextafter(ball.hi[0, 0, 1, 1].item(), 2.0)
    return moved


def test_a_witness_satisfies_version_1_and_points_outside_do_not(tmp_path: Path) -> None:
    point, gap = attack(0.1)
    centre = images().x[3:4].astype(np.float64)
    top = np.abs(gap).max()
    assert top > np.abs(difference(centre)).max() + 0.02
    source = written(tmp_path, delta=float(top) - 0.01)

    def answers(x: Floats, y: Floats) -> bool:
        return satisfied(source, exactly("X", x) | exactly("Y", y))

    assert answers(point, gap)
    for name in ("product", "product-margins"):
        assert answers(point, run((tmp_path / f"{name}.onnx").read_bytes(), point))
    assert not answers(centre, difference(centre))
    assert not answers(outside(point), gap)
    assert not satisfied(
        written(tmp_path, delta=float(top) + 1e-9), exactly("X", point) | exactly("Y", gap)
    )


def test_a_witness_satisfies_version_2_and_points_outside_do_not(tmp_path: Path) -> None:
    point, gap = attack(0.1)
    written(tmp_path, delta=float(np.abs(gap).max()) - 0.01)
    source = (tmp_path / "image-3.v2.vnnlib").read_text()
    networks = {name: (tmp_path / f"{name}.onnx").read_bytes() for name in ("reference", "student")}

    def answers(x: Floats, other: Floats | None = None) -> bool:
        given: dict[str, Fraction] = {}
        for name, at in (("reference", x), ("student", x if other is None else other)):
            places = [f"{name}_x[0,{c},{h},{w}]" for c, h, w in np.ndindex(*SHAPE)]
            given |= {p: Fraction(float(v)) for p, v in zip(places, at.ravel(), strict=True)}
            shares = run(networks[name], at)[0]
            given |= {f"{name}_p[0,{k}]": Fraction(float(p)) for k, p in enumerate(shares)}
        return satisfied(source, given)

    assert answers(point)
    assert not answers(images().x[3:4].astype(np.float64))
    assert not answers(outside(point))
    assert not answers(point, np.nextafter(point, 0.5))


def test_version_2_is_parsed_by_the_vnnlib_package(tmp_path: Path) -> None:
    require("vnnlib", find_spec("vnnlib") is not None, "pip install 'mlflow-kdguard[vnnlib]'")
    import vnnlib

    written(tmp_path, delta=0.3, classes="1", signs=("minus",))
    query = vnnlib.parse_query_file(str(tmp_path / "image-3.v2.vnnlib"))
    assert [network.name for network in query.networks] == ["reference", "student"]
    for network in query.networks:
        assert [tuple(each.shape) for each in network.inputs] == [(1, *SHAPE)]
        assert [tuple(each.shape) for each in network.outputs] == [(1, K)]
    ball = Ball.around(torch.from_numpy(images().x[3:4]), eps=0.1)
    equal, bounds = set(), {}
    *boxed, last = [assertion.expr for assertion in query.assertions]
    for each in boxed:
        place = tuple(each.lhs.indices)
        if isinstance(each, vnnlib.Equal):
            equal.add((each.lhs.network_name, each.rhs.network_name, place))
            assert tuple(each.rhs.indices) == place
        else:
            kind = "lo" if isinstance(each, vnnlib.GreaterEqual) else "hi"
            bounds[each.lhs.network_name, kind, place] = Fraction(str(each.rhs))
    places = list(np.ndindex(1, *SHAPE))
    assert equal == {("reference", "student", place) for place in places}
    assert bounds == {
        (name, kind, place): Fraction(getattr(ball, kind)[place].item())
        for name in ("reference", "student") for kind in ("lo", "hi") for place in places
    }  # fmt: skip
    assert isinstance(last, vnnlib.LessEqual)
    assert Fraction(str(last.rhs)) == -Fraction(0.3)
    student, reference = last.lhs.head, last.lhs.rest[0]
    assert (student.network_name, list(student.indices)) == ("student", [0, 1])
    assert (reference.network_name, list(reference.indices)) == ("reference", [0, 1])


def test_version_2_of_all_classes_is_parsed_too(tmp_path: Path) -> None:
    require("vnnlib", find_spec("vnnlib") is not None, "pip install 'mlflow-kdguard[vnnlib]'")
    import vnnlib

    written(tmp_path)
    query = vnnlib.parse_query_file(str(tmp_path / "image-3.v2.vnnlib"))
    assert len(query.assertions[-1].expr.to_dnf()) == 2 * K


@given(st.floats(min_value=-1, max_value=1))
@example(5e-324)
@example(0.1)
@example(-0.0)
@example(1.0)
def test_numbers_are_written_exactly(number: float) -> None:
    said = text.decimal(number)
    assert Fraction(said) == Fraction(number)
    assert float(said) == number
    assert re.fullmatch(r"-?\d+\.\d+", said)


# ── Files and errors ────────────────────────────────────────────────────────────────────────────


def test_the_document_names_every_file_and_its_digest(tmp_path: Path) -> None:
    document = exchange.export(
        *PAIRS["mlps"], images(), [1, 4], tmp_path / "new", config=CertifySection()
    )
    folder = tmp_path / "new"
    assert json.loads((folder / "queries.json").read_text()) == document
    named = {"queries.json", *document["models"]}
    for query in document["queries"]:
        named |= {query["vnnlib1"]["file"], query["vnnlib2"]["file"]}
    assert {path.name for path in folder.iterdir()} == named
    assert document["reference"]["sha256"] == graph.read(PAIRS["mlps"][0], where="r").sha256
    for name, digest in document["models"].items():
        assert exchange.sha256((folder / name).read_bytes()) == digest


BAD: list[tuple[type[Exception], Callable[[Path], Any]]] = [
    (UsageError, lambda at: attempt(at, config=CertifySection(norm="l2"))),
    (UsageError, lambda at: attempt(at, asked=exchange.Asked(classes="3"))),
    (UsageError, lambda at: attempt(at, asked=exchange.Asked(classes="-1"))),
    (DataError, lambda at: attempt(at, indices=[6])),
    (DataError, lambda at: attempt(at, indices=[])),
    (DataError, lambda at: attempt(at, data=Dataset.of(
        toys.images(3), np.zeros(3, np.int64), uri="other", classes=K))),
    (ModelError, lambda at: attempt(at, student=toys.onnx_tiny(shape=SHAPE, classes=4))),
]  # fmt: skip


def attempt(
    folder: Path, *, data: Dataset | None = None, indices: tuple[int, ...] = (0,),
    student: bytes = PAIRS["mlps"][1], **more: Any,
) -> Any:  # fmt: skip
    more = {"config": CertifySection(), **more}
    return exchange.export(PAIRS["mlps"][0], student, data or images(), indices, folder, **more)


@pytest.mark.parametrize(("error", "call"), BAD)
def test_what_cannot_be_asked_is_said_before_anything_is_written(
    tmp_path: Path, error: type[Exception], call: Callable[[Path], Any]
) -> None:
    with pytest.raises(error):
        call(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_the_files_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data in zip(("r", "s"), PAIRS["mlps"], strict=True):
        (tmp_path / f"{name}.onnx").write_bytes(data)
    np.savez(tmp_path / "d.npz", x=images().x, y=images().y)
    words = ["export-query", "--teacher", f"{tmp_path}/r.onnx", "--student", f"{tmp_path}/s.onnx",
             "--data", f"npz:{tmp_path}/d.npz", "--eps", "0.1",
             "--out", f"{tmp_path}/out"]  # fmt: skip
    assert answer([*words, "--index", "3", "--index", "1", "--index", "3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [query["index"] for query in document["queries"]] == [3, 1]
    assert (tmp_path / "out" / "image-1.v2.vnnlib").is_file()
    written(tmp_path / "own")
    own = (tmp_path / "own" / "image-3.v1.vnnlib").read_text()
    assert tree(own) == tree((tmp_path / "out" / "image-3.v1.vnnlib").read_text())
    assert answer([*words, "--index", "9"]) == 2
    assert answer([*words, "--index", "3", "--delta", "0"]) == 2
    assert answer([*words, "--index", "3", "--classes", "ten"]) == 2
    assert "no class" in capsys.readouterr().err
