"""Solvers as oracles: whatever multipliers they name, what is recomputed from them holds.

The truth comes from elsewhere: rational arithmetic for programs, `toygraphs.brute` for networks.
"""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effort
import toygraphs
from mlflow_kdguard import extensions
from mlflow_kdguard.certify import Ball, join
from mlflow_kdguard.certify import milp as row
from mlflow_kdguard.certify.milp.pieces import integer_program, linear_program
from mlflow_kdguard.certify.milp.question import Question
from mlflow_kdguard.certify.milp.tree import Tree
from mlflow_kdguard.solvers import dual, highs
from mlflow_kdguard.solvers.adapter import Adapter, Answer, Limits
from mlflow_kdguard.solvers.model import Builder, Floats, Model
from requirements import require

SOLVERS = ("highs", "scip", "gurobi")
LIMITS = Limits(seconds=20.0)

kinds = st.sampled_from(sorted(toygraphs.KINDS))
seeds = st.integers(0, 10_000)


@pytest.fixture(autouse=True, scope="module")
def _few_steps():
    """Linear bounds hold for any effort; little of it is quick."""
    with effort.little(*effort.LINEAR):
        yield


def program(seed: int, size: float) -> tuple[Model, Floats]:
    """A random program and a point that lies in it by construction."""
    draw = np.random.default_rng(seed)
    n, m = draw.integers(1, 6), draw.integers(1, 6)
    point = draw.uniform(-1.0, 1.0, n) * size
    matrix = draw.normal(size=(m, n)) * (draw.random((m, n)) < 0.7)
    values = matrix @ point
    room = draw.random((2, m)) * size + 1e-6 * size
    lo = np.where(draw.random(m) < 0.3, -np.inf, values - room[0])
    hi = np.where(draw.random(m) < 0.3, np.inf, values + room[1])
    builder = Builder()
    columns = builder.variables(point - draw.random(n) * size, point + draw.random(n) * size)
    builder.rows(np.tile(columns, (m, 1)), matrix, lo, hi)
    return builder.model(dict(enumerate(draw.normal(size=n).tolist()))), point


@given(seed=seeds, size=st.sampled_from([1e-6, 1.0, 1e6]), wrong=st.sampled_from([0.0, 1e-9, 1.0]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_multipliers_bound_every_point(seed, size, wrong):
    """Also those with wrong signs, with digits lost, and that are no numbers; nothing that has a
    point is ever proved empty."""
    model, point = program(seed, size)
    draw = np.random.default_rng(seed + 1)
    y = highs.solve(model, LIMITS).y + wrong * draw.normal(size=model.shape[0])
    value = sum(Fraction(c) * Fraction(v) for c, v in zip(model.cost, point, strict=True))
    for given_ in (y, -y, np.where(draw.random(len(y)) < 0.5, np.nan, y), 1e200 * y, y[:-1]):
        bound = dual.upper(model, given_)
        assert bound == float("inf") or Fraction(bound) >= value
        assert not dual.empty(model, given_)


@given(seed=seeds)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_solvers_agree_and_their_multipliers_prove_what_they_say(seed):
    """SCIP turns a row of one variable into a bound of it, and names no multiplier then."""
    model, _ = program(seed, 1.0)
    names = [name for name in SOLVERS if adapter(name).installed]
    first = highs.solve(model, LIMITS).objective
    for name in names:
        answer = adapter(name).solve(model, LIMITS)
        assert answer.status == "optimal"
        assert answer.objective == pytest.approx(first, abs=1e-6)
        proved = dual.upper(model, answer.y)
        assert proved >= answer.objective - 1e-6
        if name != "scip":
            assert proved <= answer.objective + 1e-6


@pytest.mark.parametrize("name", ["highs", "gurobi"])
def test_emptiness_is_proved_by_a_ray(name):
    require(name, adapter(name).installed, f"{name} is not installed")
    builder = Builder()
    columns = builder.variables(np.zeros(2), np.ones(2))
    builder.rows(columns, np.ones(2), lo=1.5)
    builder.rows(columns, np.array([1.0, -1.0]), lo=0.75)
    model = builder.model({0: 1.0})
    answer = adapter(name).solve(model, LIMITS)
    assert answer.status == "infeasible"
    assert dual.empty(model, answer.y)


def adapter(name: str) -> Adapter:
    """A row of table "solver"."""
    found: Adapter = extensions.load("solver", name)
    return found


def honest(model: Model, limits: Limits, start: Floats) -> Answer:
    """HiGHS, in this process."""
    return highs.solve(model, limits, start)


@cache
def asked(kind: str, seed: int, eps: float = 0.15, scale: float = 1.0):
    """All questions about a random pair around an image, and the largest gap by brute force."""
    student = toygraphs.KINDS["mlp" if kind == "capped" else kind]
    models = toygraphs.KINDS[kind](seed, scale=scale), student(seed + 77_777, scale=scale)
    x = np.random.default_rng(seed).uniform(0.0, 1.0, models[0].input_shape).astype(np.float32)
    ball = Ball.around(torch.from_numpy(x)[None], eps=eps)
    with torch.no_grad():
        found = row.Questions.of(
            join(*models, device=torch.device("cpu")), ball, None, refining=False
        )
    return found, toygraphs.brute(*models, x.astype(float), eps, seed=seed)


def tree(found: row.Questions, ask: Callable[..., Answer], nodes: int, *, known: bool) -> Tree:
    """The search of the only image; `known`: with the linear bounds, or as if nothing was."""
    grown = found.tree(0, ask, found.relaxed.ball.centre.clone(), branching=True)
    grown.nodes, grown.floor = nodes, 0.0
    if not known:
        grown.bounds = [1.0] * len(grown.bounds)
        for question in grown.questions:
            question.cuts = []
    return grown


@given(kind=kinds, seed=seeds, eps=st.sampled_from([0.05, 0.15, 0.4]),
       scale=st.sampled_from([1.0, 1.0, 6.0]))  # fmt: skip
@settings(max_examples=8, deadline=None, derandomize=True)
def test_no_point_beats_the_programs(kind, seed, eps, scale):
    """The raw bounds of the programs alone: no linear bound, no cut, no minimum of several."""
    found, exact = asked(kind, seed, eps, scale)
    grown = tree(found, honest, 40, known=False)
    if all(question.fits for question in grown.questions):
        assert grown.run() >= exact - 1e-12


@pytest.mark.parametrize(("kind", "seed"), [("mlp", 2), ("cnn", 0), ("capped", 1)])
def test_a_long_search_comes_close_to_the_truth(kind, seed):
    found, exact = asked(kind, seed)
    bound = tree(found, honest, 150, known=False).run()
    assert exact <= bound <= exact * 1.05 + 0.002


@pytest.mark.parametrize("kind", ["mlp", "capped"])
def test_integer_programs_hold_the_truth_and_solvers_agree_on_them(kind):
    """Big-M switches and pieces of chords; HiGHS, SCIP and Gurobi, one question."""
    found, _ = asked(kind, 3)
    question = max(zip(found.start.upper.tolist(), range(len(found.start.upper)), strict=True))[1]
    grown = tree(found, honest, 1, known=True)
    model, _ = integer_program(grown.questions[question], grown.questions[question].root(1.0))
    assert model.integer.any()
    names = [name for name in SOLVERS if adapter(name).installed]
    loose = {name: adapter(name).solve(model.relaxed(), LIMITS) for name in names}
    relaxed = loose["highs"].objective
    for answer in loose.values():
        assert dual.upper(model.relaxed(), answer.y) == pytest.approx(relaxed, abs=1e-5)
    claims = [adapter(name).solve(model, LIMITS).objective for name in names]
    assert claims == pytest.approx([claims[0]] * len(claims), abs=2e-6)
    assert claims[0] <= relaxed + 1e-6
    assert claims[0] >= sampled(found, grown.questions[question]) - 1e-6


def sampled(found: row.Questions, question: Question) -> float:
    """The question's largest value over random points and corners of the ball."""
    ball, joint = found.relaxed.ball, found.relaxed.joint
    share = torch.rand((4000, *joint.input_shape), generator=torch.Generator().manual_seed(0))
    share[::2] = share[::2].round()
    points = ball.lo + share.double() * (ball.hi - ball.lo)
    reference, student = (torch.softmax(z, 1)[:, question.klass] for z in joint.logits(points))
    student_high = question.high is question.encoded.outputs[joint.student]
    return float((student - reference if student_high else reference - student).max())


@pytest.mark.parametrize("seed", range(3))
def test_a_margin_by_enumeration(seed):
    """Two pixels: the largest margin over all activation patterns, by an integer program, is that
    of a fine grid."""
    found, _ = asked("mlp", seed)
    question = tree(found, honest, 1, known=True).questions[0]
    joint, ball = found.relaxed.joint, found.relaxed.ball
    columns = question.encoded.outputs[joint.reference][:2]
    values = np.array([1.0, -1.0])
    exact = highs.solve(linear_program(question, columns, values, exact=True), LIMITS).objective
    loose = linear_program(question, columns, values, exact=False)
    ticks = torch.linspace(0.0, 1.0, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(ticks, ticks).view(-1, *joint.input_shape)
    logits = joint.logits(ball.lo + grid * (ball.hi - ball.lo))[0]
    best = float((logits[:, 0] - logits[:, 1]).max())
    assert best - 1e-6 <= exact <= best + 0.02
    assert dual.upper(loose, highs.solve(loose, LIMITS).y) >= exact - 1e-6


# ── Answers that are wrong ──────────────────────────────────────────────────────────────────────


def _noise(answer: Answer, scale: float) -> Floats:
    return answer.y + scale * np.random.default_rng(0).normal(size=answer.y.shape)


WRONG: dict[str, Callable[[Answer], Answer]] = {
    "too low an optimum": lambda a: replace(a, objective=a.objective - 0.5, bound=-1.0),
    "infeasible": lambda a: replace(a, status="infeasible"),
    "infeasible, and no ray": lambda a: replace(a, status="infeasible", y=np.zeros(0)),
    "multipliers of another sign": lambda a: replace(a, y=-a.y),
    "no multipliers": lambda a: replace(a, y=np.zeros_like(a.y)),
    "noise": lambda a: replace(a, y=_noise(a, 0.1)),
    "NaN": lambda a: replace(a, y=np.full_like(a.y, np.nan), x=np.full_like(a.x, np.nan)),
    "infinity": lambda a: replace(a, y=np.full_like(a.y, np.inf), x=a.x + np.inf),
    "too short": lambda a: replace(a, y=a.y[:-3], x=a.x[:-3]),
    "a point outside": lambda a: replace(a, x=a.x + 1e3),
    "a fault": lambda a: Answer("fault", message="crash"),
    "no time": lambda a: Answer("limit"),
    "a wrong basis": lambda a: replace(a, basis=np.ones_like(a.basis)),
}


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_wrong_answers_leave_the_bound_sound(kind, fault):
    found, exact = asked(kind, 2, 0.4)

    def lying(model: Model, limits: Limits, start: Floats) -> Answer:
        return WRONG[fault](highs.solve(model, limits, start))

    grown = tree(found, lying, 12, known=False)
    with np.errstate(invalid="ignore", over="ignore"):
        bound = grown.run()
    assert exact <= bound <= 1.0
    assert tree(found, lying, 12, known=True).run() <= max(found.start.upper.tolist()) + 1e-12


def test_no_time_leaves_the_linear_bound():
    found, exact = asked("cnn", 0)
    grown = tree(found, honest, 100, known=True)
    grown.until = 0.0
    assert grown.run() == max(grown.bounds) >= exact
    assert grown.spent == 0


@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_margins_beyond_any_exponential_keep_the_linear_bound(scale):
    found, exact = asked("mlp", 1, 0.4, scale)
    grown = tree(found, honest, 12, known=True)
    assert not all(question.fits for question in grown.questions)
    with np.errstate(all="raise"):
        bound = grown.run()
    assert exact <= bound <= max(grown.bounds)
