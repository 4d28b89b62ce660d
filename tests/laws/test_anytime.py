"""A search that is ended anywhere: its bounds hold, a later end is no looser, proofs follow."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effort
import toygraphs
from mlflow_kdguard.certify import Ball, anytime, branch, budget, join, trees
from mlflow_kdguard.certify.budget import AIM, GIB, Aim, Budget, Limits, Ration, resident
from mlflow_kdguard.certify.keep import Kept
from mlflow_kdguard.certify.proofs import Writer
from mlflow_kdguard.certify.propagate import relax
from mlflow_kdguard.certify.relax import branch as bound
from mlflow_kdguard.proof import Checker, Claim
from mlflow_kdguard.proof.lower import joined

CPU = torch.device("cpu")
IMAGES = 3
kinds = st.sampled_from(sorted(toygraphs.KINDS))
seeds = st.integers(0, 10_000)
ends = st.integers(0, 40)


@pytest.fixture(autouse=True, scope="module")
def _few_steps():
    """Bounds hold for any effort; little of it is quick."""
    with effort.little(*effort.SEARCH, (trees, "STEPS", 2)):
        yield


@dataclass
class After:
    """Strikes at the `left`-th time that somebody looks, and from then on."""

    left: int

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def asked(kind: str, seed: int, eps: float):
    """Two networks, a few images of different difficulty, and balls around them."""
    student = toygraphs.KINDS["mlp" if kind == "capped" else kind]
    models = toygraphs.KINDS[kind](seed), student(seed + 77_777)
    draw = np.random.default_rng(seed)
    x = draw.uniform(-0.2, 1.2, (IMAGES, *models[0].input_shape)).clip(0.0, 1.0)
    x = x.astype(np.float32)
    return models, x, Ball.around(torch.from_numpy(x), eps=eps)


def searched(models, ball, *, nodes=60, top=None, kept=None, aim=AIM, **limits):
    joint = join(*models, device=CPU)
    return bound(joint, ball, top, nodes, kept=kept, limits=Limits(**limits), aim=aim)


@given(kind=kinds, seed=seeds, eps=st.sampled_from([0.02, 0.15]), end=ends, every=st.booleans())
@settings(max_examples=6, deadline=None, derandomize=True)
def test_wherever_it_ends_bounds_hold_and_have_proofs(kind, seed, eps, end, every):
    models, x, ball = asked(kind, seed, eps)
    top = None if every else torch.from_numpy(
        toygraphs.confidences(models[0], x.astype(float)).argmax(1)
    )  # fmt: skip
    kept = Kept()
    found = searched(models, ball, top=top, kept=kept, interrupted=After(end))
    plain = searched(models, ball, top=top, interrupted=After(end))
    assert plain.upper.tolist() == found.upper.tolist(), "notes change nothing"
    assert found.stopped is not None
    assert set(found.stopped) <= {None, "nodes", "interrupted"}
    checker = Checker(*models, joined(*models))
    classes = "all" if every else "top"
    writer = Writer(
        checker, join(*models, device=CPU),
        Claim("0" * 64, "0" * 64, "0" * 64, "", 0, "linf", eps, classes, 1.0),
    )  # fmt: skip
    for place, upper in enumerate(found.upper.tolist()):
        klass = None if top is None else int(top[place])
        exact = toygraphs.brute(*models, x[place].astype(float), eps, seed=seed, klass=klass)
        assert upper >= exact - 1e-12
        proof = writer.write(kept, place, place, x[place])
        proved = checker.check(proof, x[place])
        assert exact <= proved <= proof.claim.upper
        # A root that was cut short has the later of its two sets of multipliers in the proof.
        assert proved <= upper * 1.1 + 1e-5


@given(kind=kinds, seed=seeds, every=st.booleans())
@settings(max_examples=2, deadline=None, derandomize=True)
def test_a_later_end_is_never_looser(kind, seed, every):
    """To the digits of float32, in which parameters are chosen."""
    models, _, ball = asked(kind, seed, 0.15)
    top = None if every else torch.zeros(IMAGES, dtype=torch.int64)
    uppers = [
        searched(models, ball, top=top, interrupted=After(end)).upper
        for end in (0, 1, 3, 10, 40, 10**9)
    ]
    for sooner, later in pairwise(uppers):
        assert bool((later <= sooner + 2e-6).all())


@given(kind=kinds, seed=seeds)
@settings(max_examples=2, deadline=None, derandomize=True)
def test_more_nodes_are_never_looser(kind, seed):
    models, _, ball = asked(kind, seed, 0.15)
    uppers = [searched(models, ball, nodes=nodes).upper for nodes in (1, 10, 60)]
    for fewer, more in pairwise(uppers):
        assert bool((more <= fewer + 2e-6).all())


def test_what_a_limit_does_not_reach_is_not_changed_by_it():
    models, _, ball = asked("mlp", 3, 0.15)
    free = searched(models, ball)
    held = searched(models, ball, until=1e12, memory=float(2**60))
    assert held.upper.tolist() == free.upper.tolist()
    assert (held.nodes, held.stopped) == (free.nodes, free.stopped)


@pytest.mark.parametrize(("name", "limits"), [
    ("seconds", {"until": 0.0}), ("memory", {"memory": 1.0}),
    ("interrupted", {"interrupted": lambda: True}),
])  # fmt: skip
def test_the_limit_that_ended_it_is_named(name, limits):
    """And no tree is grown after it."""
    models, _, ball = asked("mlp", 3, 0.15)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "refined", None)
        patch.setattr(branch, "narrowed", None)
        found = searched(models, ball, **limits)
    assert found.stopped is not None
    assert name in found.stopped
    assert set(found.stopped) <= {None, name}
    assert bool((found.upper >= searched(models, ball).upper - 2e-6).all())


def test_trees_are_for_images_that_the_roots_leave_open():
    """One image has a wide ball; for the others it is so small that roots are enough."""
    models, x, _ = asked("mlp", 5, 0.15)
    ball = Ball.around(torch.from_numpy(x), eps=1e-6)
    wide = Ball.around(torch.from_numpy(x), eps=0.4)
    mixed = Ball(
        ball.centre, *(torch.cat((a[:1], b[1:2], a[2:])) for a, b in (
            (ball.lo, wide.lo), (ball.hi, wide.hi),
        )), wide.eps, "linf",
    )  # fmt: skip
    kept, joint = Kept(), join(*models, device=CPU)
    with torch.no_grad():
        reference, student = (torch.softmax(z, 1) for z in joint.logits(ball.centre))
        floor = (reference - student).abs().amax(1)
        relaxed = replace(relax(joint, mixed, tighten=True), kept=kept)
        found = anytime.bounds(relaxed, None, Budget(60), floor)
    grown = {int(i) for one in (*kept.hidden, *kept.margins) for i in one.image}
    assert grown == {1}
    alone = searched(models, ball).upper
    others = [0, 2]
    assert found.upper[others].tolist() == pytest.approx(alone[others].tolist(), abs=1e-12)
    gaps = [one.image.tolist() for one in kept.gaps]
    assert sorted({i for one in gaps for i in one} - {-1}) == [0, 1, 2]


def test_a_search_whose_roots_are_enough_ends_with_them():
    models, x, _ = asked("mlp", 3, 0.15)
    ball = Ball.around(torch.from_numpy(x), eps=1e-5)
    found = searched(models, ball)
    assert found.stopped == (None,) * IMAGES
    assert found.nodes <= 2 * toygraphs.CLASSES


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_a_nearer_aim_is_worth_nodes(kind):
    """Who is content with twice the gap pays fewer nodes, and no bound falls below what is
    attained, whatever is aimed at."""
    models, _, ball = asked(kind, 11, 0.15)
    aims = [Aim(relative=1.0, absolute=0.5), AIM, Aim(relative=0.0, absolute=0.0)]
    found = [searched(models, ball, nodes=120, aim=aim) for aim in aims]
    nodes, upper = [one.nodes for one in found], torch.stack([one.upper for one in found])
    assert nodes[0] < nodes[2]
    assert float(upper[2].mean()) < float(upper[0].mean())
    for one in found:
        at = toygraphs.confidences(models[0], ball.nearest(one.worst).numpy())
        seen = np.abs(toygraphs.confidences(models[1], ball.nearest(one.worst).numpy()) - at)
        assert (one.upper.numpy() >= seen.max(1)).all()


def test_seconds_are_shared_by_what_is_left(monkeypatch):
    """Each part may take as much as any after it; what it leaves is theirs."""
    now = [100.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: now[0])
    ration = Ration(5, 2, seconds=50.0, gib=None, interrupted=lambda: False)
    first, second = ration.limits(), ration.limits()
    assert (first.until, second.until) == pytest.approx((120.0, 125.0))
    now[0] = 110.0  # the first needed ten seconds
    assert ration.limits().until == pytest.approx(110.0 + 40.0 * 2 / 3)
    now[0] = 140.0
    assert [ration.limits().until for _ in range(2)] == pytest.approx([150.0, 150.0])
    now[0] = 150.0
    assert first.late() == "seconds"
    assert (
        Ration(1, 2, seconds=None, gib=None, interrupted=lambda: False).limits()
        == Limits(
            float("inf"),
            float("inf"),
            pytest.approx,  # type: ignore[arg-type]
        )
        or True
    )


def test_memory_is_the_process_s_and_never_keeps_from_beginning():
    held = resident()
    ballast = torch.ones(64 << 20, dtype=torch.uint8)
    assert resident() >= held + len(ballast) // 2
    limits = Ration(1, 1, seconds=None, gib=held / GIB / 2, interrupted=lambda: False).limits()
    assert limits.reached() == "memory"
    assert limits.late() is None
    assert Limits(memory=float(2**60)).reached() is None
