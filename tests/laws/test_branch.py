"""Branch and bound: every point lies in a node that bounds it, and effort only ever helps."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effort
import toygraphs
from mlflow_kdguard.certify import Ball, anytime, branch, gap, join, trees
from mlflow_kdguard.certify.branch import RATES, Search, roots_of, shares
from mlflow_kdguard.certify.budget import Budget
from mlflow_kdguard.certify.confidence import probability
from mlflow_kdguard.certify.descent import Descent
from mlflow_kdguard.certify.margins import Items
from mlflow_kdguard.certify.nodes import Nodes
from mlflow_kdguard.certify.propagate import relax
from mlflow_kdguard.certify.quick import Balls, Passes
from mlflow_kdguard.certify.setting import Setting, chunks

CPU = torch.device("cpu")
QUICK = settings(max_examples=3, deadline=None, derandomize=True)

kinds = st.sampled_from(sorted(toygraphs.KINDS))
seeds = st.integers(0, 10_000)
radii = st.sampled_from([0.05, 0.15, 0.4])


@pytest.fixture(autouse=True, scope="module")
def _few_steps():
    """Bounds hold for any effort; little of it is quick."""
    with effort.little(*effort.SEARCH):
        yield


def pair(kind: str, seed: int, scale: float = 1.0):
    """Two networks and an image."""
    student = toygraphs.KINDS["mlp" if kind == "capped" else kind]
    models = toygraphs.KINDS[kind](seed, scale=scale), student(seed + 77_777, scale=scale)
    x = np.random.default_rng(seed).uniform(-0.2, 1.2, models[0].input_shape).clip(0.0, 1.0)
    return models, x.astype(np.float32)


def relaxed_pair(kind: str, seed: int, eps: float, scale: float = 1.0):
    """Both networks around the image."""
    models, x = pair(kind, seed, scale)
    ball = Ball.around(torch.from_numpy(x)[None], eps=eps)
    return relax(join(*models, device=CPU), ball, tighten=True)


def searched(
    kind: str, seed: int, eps: float, nodes: int, scale: float = 1.0
) -> tuple[Search, torch.Tensor]:
    """A search on one image of two networks, all classes, and its upper bound."""
    with torch.no_grad():
        relaxed = relaxed_pair(kind, seed, eps, scale)
        classes = torch.arange(toygraphs.CLASSES)
        items = Items(torch.zeros_like(classes), classes)
        start = gap.directions(relaxed, items, refining=False)
        setting = Setting.of(relaxed, (relaxed.joint.student, relaxed.joint.reference))
        search = Search(setting, roots_of(setting, start), torch.zeros(1).double(), keep=True)
        return search, search.run(nodes).upper


def inside(ball: Ball, seed: int, count: int = 100) -> torch.Tensor:
    """Points of a ball's box, half of them corners."""
    share = torch.rand(
        (count, *ball.centre.shape[1:]), generator=torch.Generator().manual_seed(seed)
    )
    share[::2] = share[::2].round()
    return torch.minimum(ball.lo + share.double() * (ball.hi - ball.lo), ball.hi)


@given(kind=kinds, seed=seeds, eps=radii, scale=st.sampled_from([1.0, 1.0, 8.0, 60.0]))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_every_point_lies_in_a_leaf_that_bounds_it(kind, seed, eps, scale):
    """Children cover their parent: phases, bands, and boxes that were cut to them; also where
    margins are far beyond what exponentials can hold."""
    search, _ = searched(kind, seed, eps, 60, scale)
    assert search.leaves is not None
    nodes = search.leaves[0].joined(*search.leaves[1:])
    setting = search.setting
    joint = setting.relaxed.joint
    points = inside(setting.relaxed.ball, seed)
    z, values = Passes(joint, setting.columns, (joint.student, joint.reference)).real(points)
    student, reference = values[joint.student], values[joint.reference]
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
            none = torch.full((*held.shape[:1], 1), -2.0, dtype=torch.float64)
            bounds = nodes.bound[mine].where(held, torch.full_like(held, -2.0, dtype=float))
            most = torch.cat((bounds, none), 1).amax(1)
            assert bool((most >= gaps - 1e-9).all())


def _holds(nodes: Nodes, z: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Which nodes each point lies in: bool points×N."""
    phase = nodes.phase[None]
    held = ~((phase > 0) & (z[:, None] < 0.0)).any(2) & ~((phase < 0) & (z[:, None] > 0.0)).any(2)
    for margins, box, band in (
        (a, nodes.high, nodes.high_band), (b, nodes.low, nodes.low_band),
    ):  # fmt: skip
        m, odds = margins[:, None], -torch.logsumexp(margins, 1)[:, None]
        room = 1e-9 * (1.0 + m.abs())
        held &= ((m >= box.lo - room) & (m <= box.hi + room)).all(2)
        room = 1e-8 * (1.0 + odds.abs())
        held &= (odds >= band.lo - room) & (odds <= band.hi + room)
    return held


@given(kind=kinds, seed=seeds, eps=radii)
@QUICK
def test_more_nodes_are_never_looser(kind, seed, eps):
    """Leaves are bounded anew in float64: what float32 took for no looser is so to its digits."""
    bounds = [float(searched(kind, seed, eps, nodes)[1]) for nodes in (1, 40, 120)]
    for fewer, more in pairwise(bounds):
        assert more <= fewer + 2e-6


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
        found = anytime.bounds(relaxed, None, Budget(1_500)).upper
    assert exact <= float(found) <= exact + 0.03


@given(kind=kinds, seed=seeds, eps=radii, scale=st.sampled_from([1.0, 10.0, 100.0]))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_no_point_beats_the_bound_of_a_whole_search(kind, seed, eps, scale):
    """Everything together: trees, bands, the search; also with margins in the thousands."""
    models, x = pair(kind, seed, scale)
    exact = toygraphs.brute(*models, x.astype(float), eps, seed=seed)
    with torch.no_grad():
        found = anytime.bounds(relaxed_pair(kind, seed, eps, scale), None, Budget(80)).upper
    assert float(found) >= exact - 1e-12


@given(kind=kinds, seed=seeds, eps=radii, rounds=st.sampled_from([0, 3, 12]))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_trees_bound_what_they_ask_for(kind, seed, eps, rounds):
    """Boxes of hidden layers and of margins hold at every point, and are never looser."""
    with torch.no_grad():
        plain = relaxed_pair(kind, seed, eps)
        tight = trees.refined(plain, rounds)
        points = inside(plain.ball, seed)
        columns = Setting.of(plain, (plain.joint.student, plain.joint.reference)).columns
        joint = plain.joint
        passes = Passes(joint, columns, (joint.student, joint.reference))
        _, values = passes.real(points)
        for index, (before, after) in enumerate(zip(plain.boxes, tight.boxes, strict=True)):
            assert bool((after.lo >= before.lo).all())
            assert bool((after.hi <= before.hi).all())
            if index in values:
                room = 1e-9 * (1.0 + values[index].abs())
                assert bool((values[index] >= after.lo - room).all())
                assert bool((values[index] <= after.hi + room).all())
        items = Items(torch.zeros(3, dtype=torch.int64), torch.arange(3))
        start = gap.directions(tight, items, refining=False)
        for output, box in ((joint.student, start.student), (joint.reference, start.reference)):
            cut = trees.margins(tight, items, output, box, rounds)
            logits = values[output]
            for klass in range(3):
                others = [k for k in range(3) if k != klass]
                margins = logits[:, others] - logits[:, [klass]]
                assert bool((margins >= cut.lo[klass] - 1e-9).all())
                assert bool((margins <= cut.hi[klass] + 1e-9).all())


def test_multipliers_that_gathered_in_one_class_are_shared_out_anew():
    """Where that bounds a row better, and nowhere else; their sum stays."""
    improved = 0
    for seed in range(12):
        search, _ = searched("mlp", seed, 0.15, 1)
        nodes = search.roots
        sums = nodes.weights.sum(1, keepdim=True)
        gathered = torch.zeros_like(nodes.weights)
        gathered[:, seed % gathered.shape[1]] = 1.0
        with torch.no_grad():
            descent = Descent(search.setting, replace(nodes, weights=gathered * sums), RATES)
            before, known = descent.bound()[0], descent.weights.clone()
            held = known.expm1().sum(1)
            descent.renewed()
            after = descent.bound()[0]
        moved = (descent.weights != known).any(1)
        assert bool((after <= before).all())
        assert bool((after[moved] < before[moved]).all())
        torch.testing.assert_close(descent.weights.expm1().sum(1), held)
        improved += int(moved.sum())
    assert improved > 0


@given(
    excess=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=25),
    closed=st.sets(st.integers(0, 24)),
)
def test_nodes_go_where_a_bound_is_farthest_from_the_truth(excess, closed):
    """As many in all as every open image's WIDTH, but for rounding and what is cut at the ends."""
    is_open = torch.tensor([i not in closed for i in range(len(excess))])
    if not is_open.any():
        return
    found = shares(torch.tensor(excess, dtype=torch.float64), is_open)
    assert bool(((found >= branch.FEWEST) & (found <= branch.MOST)).all())
    mine = sorted((e, n) for e, n, o in zip(excess, found.tolist(), is_open, strict=True) if o)
    assert all(a[1] <= b[1] for a, b in pairwise(mine))
    count = int(is_open.sum())
    if all(branch.FEWEST < n < branch.MOST for _, n in mine):
        assert abs(sum(n for _, n in mine) - branch.WIDTH * count) <= count / 2


@given(count=st.integers(0, 300), size=st.integers(1, 40))
def test_parts_are_about_equal_and_leave_nothing_out(count, size):
    parts = chunks(count, size, CPU)
    assert [i for part in parts for i in part.tolist()] == list(range(count))
    assert len(parts) <= -(-count // size)
    assert all(0 < len(part) <= size for part in parts)


@given(kind=kinds, seed=seeds, eps=radii)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_derivatives_are_those_of_the_bound(kind, seed, eps):
    """Written out by hand in `quick`; here against differences of the bound itself, in float64."""
    with torch.no_grad():
        relaxed = relaxed_pair(kind, seed, eps)
        joint = relaxed.joint
        setting = Setting.of(relaxed, (joint.student, joint.reference))
        if setting.columns.width == 0:
            return
        generator = torch.Generator().manual_seed(seed)
        n, m = 4, setting.columns.width
        image = torch.zeros(n, dtype=torch.int64)
        open_ = setting.exact.open_[image]
        phase = torch.randint(-1, 2, (n, m), generator=generator).masked_fill(~open_, 0).char()
        passes = Passes(joint, setting.columns, (joint.student, joint.reference))
        balls = Balls.of(relaxed).take(image)
        exact = Balls(balls.centre.double(), balls.radius.double(), balls.length)
        passes.begin(setting.exact.take(image, phase), phase, exact)
        theta = torch.rand((n, m), generator=generator, dtype=torch.float64)
        seeds_ = {
            output: torch.randn((n, 3), generator=generator, dtype=torch.float64)
            for output in (joint.student, joint.reference)
        }
        _, point = passes.down(seeds_, theta)
        gradient, _ = passes.up(point)
        step, close = 1e-7, []
        for column in range(m):
            ends = []
            for side in (1.0, -1.0):
                moved = theta.clone()
                moved[:, column] += side * step
                ends.append(passes.down(seeds_, moved)[0])
            found = (ends[0] - ends[1]) / (2.0 * step)
            close.append((found - gradient[:, column]).abs() <= 1e-4 * (1.0 + found.abs()))
        # A difference across a kink says nothing; there are few.
        assert torch.stack(close).double().mean() > 0.97
