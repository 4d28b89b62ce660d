"""What a stranger may write into a proof, and networks whose numbers float64 can hardly hold."""

from dataclasses import replace
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effort
import proofs
import toygraphs
import toys
from mlflow_kdguard import graph
from mlflow_kdguard.certify import Ball, branch, join, relax
from mlflow_kdguard.certify import confidence as searched
from mlflow_kdguard.errors import CertificateError
from mlflow_kdguard.proof import Proof, boxes, confidence, trees
from mlflow_kdguard.proof.confidence import Part
from mlflow_kdguard.proof.lower import joined
from mlflow_kdguard.proof.passes import Region

LAW = settings(max_examples=300, deadline=None, derandomize=True)
POINTS = 64
SIZES = (0.3, 5.0, 600.0, 731.0, 744.5, 746.0, 1e3, 1e6)
"""Of margins: exp of some is denormal, of others nothing, or beyond float64."""


def confident(bias: float) -> graph.Graph:
    """The class 0 is exp(bias) times as likely as the class 1, whatever the image."""
    data = toys.onnx_mlp([np.zeros((1, 4)), np.zeros((2, 1))], [np.zeros(1), np.array([bias, 0.0])])
    return replace(graph.read(data, where="toy"), sha256="0" * 64)


def unsure(seed: int) -> graph.Graph:
    """Two classes that switches tell apart."""
    draw = np.random.default_rng(seed)
    weights = [draw.normal(size=(5, 4)) * 2, draw.normal(size=(5, 5)), draw.normal(size=(2, 5))]
    biases = [draw.normal(size=5) * 0.3, draw.normal(size=5) * 0.3, np.zeros(2)]
    return replace(graph.read(toys.onnx_mlp(weights, biases), where="toy"), sha256="0" * 64)


@pytest.fixture(autouse=True, scope="module")
def _little_effort():
    """Bounds hold for any effort; little of it is quick."""
    rounds = (branch, "HIDDEN_ROUNDS", (3, 100)), (branch, "MARGIN_ROUNDS", (4, 100))
    with effort.little(*effort.SEARCH, *rounds):
        yield


@pytest.mark.parametrize("bias", [700.0, 744.55, 760.0, 1e5])
def test_a_network_that_is_as_good_as_certain_has_gaps_all_the_same(bias: float) -> None:
    """Its margins' exponentials are denormal, or nothing: no part of it is empty for that."""
    models, draw = (confident(bias), unsure(5)), np.random.default_rng(0)
    x = draw.random((1, 2, 2)).astype(np.float32)
    ends = (np.clip(x + shift, 0.0, 1.0).astype(float) for shift in (-0.4, 0.4))
    points = draw.uniform(*ends, size=(500, 1, 2, 2))
    reference, student = (toygraphs.confidences(m, points)[:, 0] for m in models)
    seen = np.abs(reference - student).max()
    assert seen > 0.3
    joint = join(*models, device=torch.device("cpu"))
    ball, top = Ball.around(torch.from_numpy(x)[None], eps=0.4), torch.tensor([0])
    for method in ("crown", "branch"):
        assert float(relax.PROVABLE[method](joint, ball, top, 8).upper[0]) >= seen
        checker, proof, _ = proofs.written(models, x, 0.4, method=method, nodes=8, klass=0)
        assert checker.check(proof, x) >= seen


def parts(draw: np.random.Generator, size: float) -> tuple[Part, np.ndarray, np.ndarray]:
    """A box of margins with a band, points that lie in both, and their log-odds."""
    m = int(draw.integers(1, 8))
    middle = draw.choice([-1.0, 1.0], m) * size * draw.uniform(0.9, 1.0, m)
    width = 10.0 ** draw.uniform(-6, 1) * draw.random(m)
    points = middle + width * draw.uniform(-1.0, 1.0, (POINTS, m))
    odds = -np.logaddexp.reduce(points, axis=1)
    least, most = np.sort(draw.choice(odds, 2))
    least, most = (least, np.inf) if draw.random() < 0.3 else (least, most)
    inside = (odds >= least) & (odds <= most)
    whole = Part.of((middle - width)[None], (middle + width)[None])
    least, most = np.maximum(whole.least, least - 1e-9), np.minimum(whole.most, most + 1e-9)
    return Part(whole.lo, whole.hi, least, most), points[inside], odds[inside]


@LAW
@given(seed=st.integers(0, 10**6), size=st.sampled_from(SIZES))
def test_nothing_is_cut_away_from_margins_of_any_size(seed: int, size: float) -> None:
    part, points, odds = parts(np.random.default_rng(seed), size)
    for cut in (part.tightened(), part.tightened().tightened()):
        assert not cut.empty.any()
        assert (points >= cut.lo).all()
        assert (points <= cut.hi).all()
        assert (odds >= cut.least - 1e-9 * size).all()
        assert (odds <= cut.most + 1e-9 * size).all()
    box = searched.Margins(torch.from_numpy(part.lo), torch.from_numpy(part.hi))
    band = searched.Band(torch.from_numpy(part.least), torch.from_numpy(part.most))
    box, band = searched.tightened(box, band)
    assert bool((box.lo <= box.hi).all())
    assert bool((band.lo <= band.hi).all())
    assert (points >= box.lo.numpy()).all()
    assert (points <= box.hi.numpy()).all()


@LAW
@given(seed=st.integers(0, 10**6), size=st.sampled_from(SIZES))
def test_constants_hold_for_every_multiplier(seed: int, size: float) -> None:
    """p(a) <= λ·a + c and -p(b) - μ·b <= c within box and band, whatever a stranger writes."""
    draw = np.random.default_rng(seed)
    part, points, odds = parts(draw, size)
    m, small = points.shape[1], np.exp(-np.abs(odds))
    truth = np.where(odds > 0, 1.0, small) / (1 + small)
    steep = np.clip(10.0 ** draw.uniform(-13, 4, 1), confidence.FLATTEST, confidence.STEEPEST)
    upper, constant = confidence.upper_plane(part, draw.random((1, m)), steep)
    value = points @ upper[0] + constant + confidence.margin(part, upper)
    assert (truth <= value).all()
    weights = 10.0 ** draw.uniform(-15, 4, (1, m))
    slack = confidence.margin(part, weights)
    least = confidence.lower_constant(part, weights) + slack
    assert (-truth - points @ weights[0] <= least + slack).all()
    box = searched.Margins(torch.from_numpy(part.lo), torch.from_numpy(part.hi))
    band = searched.Band(torch.from_numpy(part.least), torch.from_numpy(part.most))
    known = searched.lower_constant(box, torch.from_numpy(weights), band).numpy()
    assert (-truth - points @ weights[0] <= known + 2 * slack).all()


@pytest.fixture(scope="module")
def made():
    """A proof with trees of every kind, its checker, and its image."""
    x = np.random.default_rng(7).random((1, 1, 2)).astype(np.float32)
    models = toygraphs.mlp(7), toygraphs.mlp(77_784)
    checker, proof, _ = proofs.written(models, x, 0.4, nodes=30)
    assert sum(len(some.node) > 0 for some in proofs.groups(proof).values()) == 3
    return checker, proof, x


def test_every_phase_of_every_leaf_is_held_against_the_splits(made) -> None:
    checker, proof, x = made
    for name, some in proofs.groups(proof).items():
        for at in range(len(some.fixed)):
            fixed = some.fixed.copy()
            fixed[at] ^= 1
            flipped = proofs.regrouped(proof, name, replace(some, fixed=fixed))
            with pytest.raises(CertificateError, match="fix something else"):
                checker.bound(flipped, x)


def test_damage_to_a_tree_is_refused_whatever_the_claim(made) -> None:
    """Splits, questions and leaves, one number at a time, under a claim that anything meets."""
    checker, proof, x = made
    proof = replace(proof, claim=replace(proof.claim, upper=1.0))
    for name, some in proofs.groups(proof).items():
        for field in ("number", "splits", "node", "column", "evaluations", "at"):
            for at in range(len(getattr(some, field))):
                for step in (-1, 1):
                    values = getattr(some, field).copy()
                    values[at] = abs(values[at] + step)
                    damaged = proofs.regrouped(proof, name, replace(some, **{field: values}))
                    if field == "at" and name == "gap":
                        continue  # A leaf of the gap may need nothing but its margins.
                    with pytest.raises(CertificateError):
                        checker.check(Proof.from_bytes(damaged.to_bytes()), x)


def test_a_leaf_that_is_evaluated_twice_is_refused(made) -> None:
    checker, proof, x = made
    some = proof.margins[0]
    twice = replace(
        some, at=np.repeat(some.at, 2), evaluations=2 * some.evaluations,
        theta=np.repeat(some.theta, 2, axis=0),
    )  # fmt: skip
    with pytest.raises(CertificateError, match="a leaf twice"):
        checker.bound(proofs.regrouped(proof, "reference", twice), x)


@pytest.mark.parametrize("kind", ["deep", "wide"])
def test_trees_that_would_fill_the_memory_are_refused(made, kind: str) -> None:
    checker, proof, x = made
    some, count = proof.gaps.trees, (5_000 if kind == "deep" else 1 << 18)
    node = np.array([2 * t if kind == "deep" else t for t in range(count)])
    huge = replace(
        some.take(np.arange(len(some.number)) == 0), splits=np.array([count]), node=node,
        column=np.full(count, checker.net.width), value=np.ones(count),
    )  # fmt: skip
    with pytest.raises(CertificateError, match="too deep"):
        checker.bound(proofs.regrouped(proof, "gap", huge), x)
    with pytest.raises(CertificateError, match="do not fit together"):
        replace(huge, splits=huge.splits * 64).checked(checker.net, 1 << 20)


def test_a_clip_that_gives_large_numbers_counts_them_among_its_sizes() -> None:
    """Rounding is proportional to what is added up, and that is not what the clip is given."""
    net = toygraphs.Net((1, 1, 2), 0)
    at = net.clip(net.affine(net.flat(net.clip()), 3), 2.0**20, np.inf)
    net.affine(at, 3)
    model = net.done()
    region = Region.around(np.full(2, 0.5), 0.1, "linf")
    lowered = joined(model, model)
    known = boxes.bounded(lowered, region, {})
    for index in lowered.columns:
        largest = np.maximum(np.abs(known.lo[index]), np.abs(known.hi[index]))
        assert (known.sizes[index] >= largest).all()


def test_a_batch_norm_whose_terms_cancel_is_bounded_as_it_is_written() -> None:
    """beta - mean · factor in float64 is off by 1e-10 here; the next layer makes 1e-4 of it."""
    mean, variance, bias = 998_911.1875, 1.5, float(np.float32(1e-5))
    with localcontext() as precise:
        precise.prec = 60
        factor = 1 / (Decimal(variance) + Decimal(bias)).sqrt()
        beta = float(np.float32(float(Decimal(mean) * factor)))
        offset = Decimal(beta) - Decimal(mean) * factor
        shift = float(np.float32(-float(offset) * 2**20))
        exact = float(offset * 2**20 + Decimal(shift))
    nodes = [
        toys.node("Mul", ("p", "tiny"), "q"),
        toys.node("BatchNormalization", ("q", "g", "b", "m", "v"), "n", epsilon=bias),
        toys.node("Flatten", ("n",), "f"), toys.node("Gemm", ("f", "w", "c"), "logits"),
    ]  # fmt: skip
    constants = {
        "tiny": np.full((1, 1, 1), 2.0**-60), "g": [1.0], "b": [beta], "m": [mean],
        "v": [variance], "w": [[2.0**20, 0.0]], "c": [shift, 0.0],
    }  # fmt: skip
    for other in (-3.0, 3.0):
        flat = {**constants, "w": [[0.0, 0.0]], "c": [other, 0.0]}
        models = tuple(
            replace(graph.read(
                toys.proto(nodes, some, shape=(1, 1, 1), classes=2).SerializeToString(), where="toy"
            ), sha256="0" * 64)
            for some in (constants, flat)
        )  # fmt: skip
        x = np.full((1, 1, 1), 0.5, dtype=np.float32)
        gap = abs(1 / (1 + np.exp(-exact)) - 1 / (1 + np.exp(-other)))
        checker, proof, upper = proofs.written(models, x, 1e-3, method="crown")
        assert min(upper, checker.check(proof, x)) >= gap


def test_the_largest_depth_is_more_than_a_search_needs() -> None:
    assert trees.LARGEST_DEPTH > 1_000
