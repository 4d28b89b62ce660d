"""Branch and bound: every point lies in a node that bounds it, and effort only ever helps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toygraphs
from mlflow_kdguard.certify import Ball, branch, gap, join
from mlflow_kdguard.certify.branch import Budget
from mlflow_kdguard.certify.confidence import probability
from mlflow_kdguard.certify.margins import Items
from mlflow_kdguard.certify.propagate import relax

CPU = torch.device("cpu")
QUICK = settings(max_examples=3, deadline=None, derandomize=True)

kinds = st.sampled_from(sorted(toygraphs.KINDS))
seeds = st.integers(0, 10_000)
radii = st.sampled_from([0.05, 0.15, 0.4])


@pytest.fixture(autouse=True, scope="module")
def _few_steps():
    """Bounds hold for any effort; little of it is quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branch, "STEPS", 3)
        patch.setattr(branch, "ROOT_STEPS", 4)
        yield


def searched(kind: str, seed: int, eps: float, nodes: int) -> tuple[branch._Search, torch.Tensor]:
    """A search on one image of two networks, all classes, and its upper bound."""
    student = toygraphs.KINDS["mlp" if kind == "capped" else kind]
    models = toygraphs.KINDS[kind](seed), student(seed + 77_777)
    x = np.random.default_rng(seed).uniform(-0.2, 1.2, models[0].input_shape).clip(0.0, 1.0)
    ball = Ball.around(torch.from_numpy(x.astype(np.float32))[None], eps=eps)
    with torch.no_grad():
        relaxed = relax(join(*models, device=CPU), ball, tighten=True)
        classes = torch.arange(toygraphs.CLASSES)
        items = Items(torch.zeros_like(classes), classes)
        start = gap.directions(relaxed, items, refining=False)
        search = branch._Search(relaxed, start, torch.zeros(1).double(), Budget(nodes))
        return search, search.run().upper


@given(kind=kinds, seed=seeds, eps=radii)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_every_point_lies_in_a_node_that_bounds_it(kind, seed, eps):
    """Children cover their parent: phases, bands, and boxes that were cut to them."""
    search, _ = searched(kind, seed, eps, nodes=60)
    nodes = search.nodes.take(torch.arange(search.used))
    ball = search.relaxed.ball
    share = torch.rand((100, *ball.centre.shape[1:]), generator=torch.Generator().manual_seed(seed))
    share[::2] = share[::2].round()
    points = torch.minimum(ball.lo + share * (ball.hi - ball.lo), ball.hi)
    z, reference, student = search.switches.at(search.relaxed.joint, points)
    for klass in range(toygraphs.CLASSES):
        margins = [
            torch.cat((out[:, :klass], out[:, klass + 1 :]), 1) - out[:, klass, None]
            for out in (student, reference)
        ]
        for student_high in (True, False):
            a, b = margins if student_high else margins[::-1]
            mine = (nodes.klass == klass) & (nodes.student_high[:, 0] == student_high)
            held = _holds(nodes.take(mine.nonzero()[:, 0]), z, a, b)
            gaps = probability(a) - probability(b)
            bounds = nodes.bound[mine].where(held, torch.full_like(held, -2.0, dtype=float))
            assert bool((bounds.amax(1) >= gaps - 1e-9).all())


def _holds(nodes: branch.Nodes, z: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Which nodes each point lies in: bool points×N."""
    phase = nodes.phase[None]
    held = ~((phase > 0) & (z[:, None] < 0.0)).any(2) & ~((phase < 0) & (z[:, None] > 0.0)).any(2)
    for margins, box, band in (
        (a, nodes.high, nodes.high_band), (b, nodes.low, nodes.low_band),
    ):  # fmt: skip
        m, odds = margins[:, None], -torch.logsumexp(margins, 1)[:, None]
        held &= ((m >= box.lo - 1e-9) & (m <= box.hi + 1e-9)).all(2)
        held &= (odds >= band.lo - 1e-8) & (odds <= band.hi + 1e-8)
    return held


@given(kind=kinds, seed=seeds, eps=radii)
@QUICK
def test_more_nodes_are_never_looser(kind, seed, eps):
    bounds = [float(searched(kind, seed, eps, nodes)[1]) for nodes in (1, 40, 120)]
    assert bounds == sorted(bounds, reverse=True)


@given(kind=kinds, seed=seeds, eps=radii)
@QUICK
def test_a_search_repeats_itself(kind, seed, eps):
    first, second = (searched(kind, seed, eps, 60) for _ in range(2))
    assert float(first[1]) == float(second[1])
    assert first[0].spent == second[0].spent


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_small_networks_are_bounded_to_within_a_few_hundredths(seed):
    """Fully split, nothing but rounding, steps of descent and the stopping gap is left."""
    models = toygraphs.mlp(seed), toygraphs.mlp(seed + 77_777)
    x = np.random.default_rng(seed).uniform(0.0, 1.0, models[0].input_shape).astype(np.float32)
    exact = toygraphs.brute(*models, x.astype(float), 0.2, seed=seed)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(branch, "STEPS", 12)
        relaxed = relax(
            join(*models, device=CPU), Ball.around(torch.from_numpy(x)[None], eps=0.2), tighten=True
        )
        found, _, _ = branch.bounds(relaxed, None, Budget(1_500))
    assert exact <= float(found) <= exact + 0.03
