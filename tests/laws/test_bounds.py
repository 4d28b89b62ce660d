"""witness <= exact <= certified, for every bound and every kind of network.

"Exact" is a brute force from below that shares no code with the bounds; whatever it finds, a
certified bound must not be under it.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effort
import toygraphs
from mlflow_kdguard import extensions
from mlflow_kdguard.certify import Ball, branch, join, trees
from mlflow_kdguard.certify.milp import Solved
from mlflow_kdguard.certify.relax import crown, interval
from mlflow_kdguard.certify.witness import Effort, attained, search
from mlflow_kdguard.graph import Graph

METHODS = sorted(extensions.BUILT_IN["bound"])
OWN = [name for name in METHODS if not isinstance(extensions.load("bound", name), Solved)]
"""Bounds that ask no solver, which takes a hundred times as long (`test_solvers` has its laws)."""
CPU = torch.device("cpu")
EFFORT = (
    *effort.LINEAR, *effort.SEARCH, (trees, "FIRST_STEPS", 3), (trees, "STEPS", 2),
    (branch, "HIDDEN_ROUNDS", (1, 100)), (branch, "MARGIN_ROUNDS", (2, 100)),
)  # fmt: skip
SHIPPED = tuple((module, name, getattr(module, name)) for module, name, _ in EFFORT)
NODES = 40
QUICK = settings(max_examples=3, deadline=None, derandomize=True)
THOROUGH = settings(max_examples=12, deadline=None, derandomize=True)

kinds = st.sampled_from(sorted(toygraphs.KINDS))
seeds = st.integers(0, 10_000)
radii = st.sampled_from([0.01, 0.05, 0.15, 0.4])
scales = st.sampled_from([0.5, 1.0, 2.5])


@pytest.fixture(autouse=True, scope="module")
def _few_steps():
    """Bounds hold for any effort; little of it is quick."""
    with effort.little(*EFFORT):
        yield


@pytest.fixture(scope="class")
def _all_steps(_few_steps):
    """What ships."""
    with effort.little(*SHIPPED):
        yield


def pair(kind: str, seed: int, scale: float = 1.0) -> tuple[Graph, Graph]:
    """Reference and student of one kind; a small student where the reference is a margin cap."""
    student = toygraphs.KINDS["mlp" if kind == "capped" else kind]
    return toygraphs.KINDS[kind](seed, scale=scale), student(seed + 77_777, scale=scale)


def image(model: Graph, seed: int) -> np.ndarray:
    """A float32 image, some of whose pixels lie at the ends of the range."""
    x = np.random.default_rng(seed).uniform(-0.2, 1.2, model.input_shape).clip(0.0, 1.0)
    return x.astype(np.float32).astype(np.float64)


def upper(method: str, models: tuple[Graph, Graph], x: np.ndarray, eps: float, **asked) -> float:
    bound = extensions.load("bound", method)
    ball = Ball.around(torch.from_numpy(x)[None], eps=eps, norm=asked.get("norm", "linf"))
    klass = asked.get("klass")
    classes = None if klass is None else torch.tensor([klass])
    return float(bound(join(*models, device=CPU), ball, classes, NODES).upper[0])


def check_against_brute_force(method, kind, seed, eps, scale) -> None:
    models = pair(kind, seed, scale)
    x = np.stack([image(models[0], seed + i) for i in range(4)])
    bound = extensions.load("bound", method)
    ball = Ball.around(torch.from_numpy(x), eps=eps)
    found = bound(join(*models, device=CPU), ball, None, NODES).upper
    for one, certified in zip(x, found.tolist(), strict=True):
        assert toygraphs.brute(*models, one, eps, seed=seed) <= certified


@pytest.mark.parametrize("kind", sorted(toygraphs.KINDS))
@pytest.mark.parametrize("method", METHODS)
@given(seed=seeds, eps=radii, scale=scales)
@settings(max_examples=2, deadline=None, derandomize=True)
def test_no_bound_is_below_brute_force(method, kind, seed, eps, scale):
    check_against_brute_force(method, kind, seed, eps, scale)


@pytest.mark.slow
@pytest.mark.usefixtures("_all_steps")
@pytest.mark.parametrize("kind", sorted(toygraphs.KINDS))
@pytest.mark.parametrize("method", OWN)
@given(seed=seeds, eps=radii, scale=scales)
@THOROUGH
def test_no_bound_is_below_brute_force_on_many_networks(method, kind, seed, eps, scale):
    """With the effort that ships."""
    check_against_brute_force(method, kind, seed, eps, scale)


@pytest.mark.parametrize("method", METHODS)
@given(kind=kinds, seed=seeds, eps=radii, klass=st.integers(0, toygraphs.CLASSES - 1))
@QUICK
def test_no_bound_of_one_class_is_below_brute_force(method, kind, seed, eps, klass):
    models = pair(kind, seed)
    x = image(models[0], seed)
    exact = toygraphs.brute(*models, x, eps, seed=seed, klass=klass)
    assert exact <= upper(method, models, x, eps, klass=klass)


@pytest.mark.parametrize("method", METHODS)
@given(kind=kinds, seed=seeds, eps=st.sampled_from([0.05, 0.3, 1.0]))
@QUICK
def test_no_bound_on_an_l2_ball_is_below_brute_force(method, kind, seed, eps):
    models = pair(kind, seed)
    x = image(models[0], seed)
    exact = toygraphs.brute(*models, x, eps, seed=seed, norm="l2")
    certified = upper(method, models, x, eps, norm="l2")
    assert exact <= certified <= 1.0


@given(kind=kinds, seed=seeds, eps=radii, norm=st.sampled_from(["linf", "l2"]))
@QUICK
def test_a_witness_lies_in_its_ball_and_under_every_bound(kind, seed, eps, norm):
    models = pair(kind, seed)
    x = image(models[0], seed)
    joint = join(*models, device=CPU)
    ball = Ball.around(torch.from_numpy(x)[None], eps=eps, norm=norm)
    found = search(
        joint.cast(torch.float32, CPU), ball, None, effort=Effort(10, 3),
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    point = found[0].numpy()
    assert point.min() >= 0.0
    assert point.max() <= 1.0
    assert _length(point, x, norm) <= Fraction(eps)
    lower = attained(*models, ball, found, None)[0]
    assert lower == pytest.approx(toygraphs.gaps(*models, point[None]).max(), abs=1e-15)
    for method in METHODS:
        assert lower <= upper(method, models, x, eps, norm=norm)


def _length(point: np.ndarray, x: np.ndarray, norm: str) -> Fraction:
    """Distance in exact arithmetic (l2: an upper bound of the root)."""
    offsets = [
        abs(Fraction(float(a)) - Fraction(float(b)))
        for a, b in zip(point.flat, x.flat, strict=True)
    ]
    if norm == "linf":
        return max(offsets)
    square = sum((o * o for o in offsets), Fraction(0))
    root = Fraction(float(square) ** 0.5)
    return root * (1 + Fraction(1, 10**14))


@given(kind=kinds, seed=seeds)
@QUICK
def test_interval_bounds_grow_with_eps(kind, seed):
    models = pair(kind, seed)
    x = image(models[0], seed)
    bounds = [upper("interval", models, x, eps) for eps in (0.0, 0.01, 0.03, 0.1, 0.3)]
    assert bounds == sorted(bounds)


@given(kind=kinds, seed=seeds)
@QUICK
def test_without_a_ball_the_bound_is_the_gap_itself(kind, seed):
    models = pair(kind, seed)
    x = image(models[0], seed)
    gap = toygraphs.gaps(*models, x[None]).max()
    for method in METHODS:
        assert gap <= upper(method, models, x, 0.0) <= gap + 1e-9


@given(kind=kinds, seed=seeds, eps=radii)
@QUICK
def test_a_network_and_its_copy_have_no_gap(kind, seed, eps):
    model = toygraphs.KINDS[kind](seed)
    x = image(model, seed)
    assert toygraphs.brute(model, model, x, eps) == 0.0
    assert upper("crown", (model, model), x, eps) <= 1e-9


@given(seed=seeds, eps=radii)
@QUICK
def test_shared_layers_cancel_as_variables(seed, eps):
    """Students that differ in the last bias only: the gap is that of a known logit shift."""
    model = toygraphs.mlp(seed)
    *front, last = model.layers
    shift = np.array([0.05, 0.0, 0.0])
    moved = type(last)(last.name, last.inputs, last.shape, last.weight, last.bias + shift)
    student = toygraphs.finish(model.input_shape, (*front, moved))
    bound = upper("crown", (model, student), image(model, seed), eps)
    assert bound <= np.tanh(0.05 / 4) + 1e-9


@given(kind=kinds, seed=seeds, eps=radii, order=st.permutations(range(toygraphs.CLASSES)))
@QUICK
def test_bounds_do_not_depend_on_the_order_of_classes(kind, seed, eps, order):
    models = pair(kind, seed)
    turned = tuple(toygraphs.permuted(model, order) for model in models)
    x = image(models[0], seed)
    for method in METHODS:
        straight, other = upper(method, models, x, eps), upper(method, turned, x, eps)
        # The interval bound of a permutation matrix is the interval bound, up to rounding.
        assert other == pytest.approx(straight, abs=1e-6 if method == "interval" else 2e-2)


@given(kind=kinds, seed=seeds, eps=radii)
@QUICK
def test_crown_is_never_looser_than_intervals(kind, seed, eps):
    models = pair(kind, seed)
    x = image(models[0], seed)
    assert upper("crown", models, x, eps) <= upper("interval", models, x, eps) + 1e-12


@given(seed=seeds, eps=radii, batch=st.integers(2, 3))
@settings(max_examples=2, deadline=None, derandomize=True)
def test_images_of_a_batch_do_not_meet(seed, eps, batch):
    """An image is bounded the same alone and in company."""
    models = pair("cnn", seed)
    x = np.stack([image(models[0], seed + i) for i in range(batch)])
    joint = join(*models, device=CPU)
    for method in (interval, crown):
        together = method(joint, Ball.around(torch.from_numpy(x), eps=eps), None).upper
        alone = [
            method(joint, Ball.around(torch.from_numpy(one[None]), eps=eps), None).upper
            for one in x
        ]
        torch.testing.assert_close(together, torch.cat(alone), rtol=0.0, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
@given(seed=seeds, scale=st.sampled_from([1e2, 1e4, 1e6]))
@QUICK
def test_large_weights_do_not_outrun_the_rounding_margin(method, seed, scale):
    """On a ball of almost no radius the gap is known exactly, and floats have lost it."""
    models = toygraphs.mlp(seed, scale=scale), toygraphs.mlp(seed + 1, scale=scale)
    x = image(models[0], seed)
    exact = max(
        abs(a - b) for a, b in zip(*(_exact_confidences(model, x) for model in models), strict=True)
    )
    assert exact <= Fraction(upper(method, models, x, 1e-12))


def _exact_confidences(model: Graph, x: np.ndarray) -> list[Fraction]:
    """Softmax in rational arithmetic: exact logits, and a Taylor series for exp."""
    values = [Fraction(float(v)) for v in x.flat]
    for layer in model.layers:
        if hasattr(layer, "weight"):
            values = [
                sum((Fraction(float(w)) * v for w, v in zip(row, values, strict=True)), start)
                for row, start in zip(layer.weight, map(Fraction, layer.bias.tolist()), strict=True)
            ]
        elif type(layer).__name__ == "Relu":
            values = [max(v, Fraction(0)) for v in values]
    top = max(values)
    powers = [_exp(max(v - top, Fraction(-60))) for v in values]
    return [p / sum(powers) for p in powers]


def _exp(v: Fraction) -> Fraction:
    """exp of a number in [-60, 0], to about 1e-40, by halving the argument."""
    from mpmath import mp, mpf

    with mp.workdps(50):
        return Fraction(str(mp.exp(mpf(v.numerator) / mpf(v.denominator))))
