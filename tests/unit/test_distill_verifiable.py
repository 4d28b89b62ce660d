"""Terms that make bounds tight: their formulas, what they do to networks, where they come in."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import toys
from mlflow_kdguard import distill, training
from mlflow_kdguard.adversary.madry import madry
from mlflow_kdguard.adversary.stability import growth, interval_entropy, relu_stability, sizes
from mlflow_kdguard.adversary.verifiable import verifiable
from mlflow_kdguard.config import DistillSection, TeachSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.distill import Look
from mlflow_kdguard.distill.verifiable import margins, regularisers
from mlflow_kdguard.errors import DataError
from mlflow_kdguard.nets.boxes import Box, outputs
from mlflow_kdguard.nets.relaxed import margin_gaps
from mlflow_kdguard.teach import teach
from mlflow_kdguard.training import Batch, state_sha256
from runs import CPU, digits

EPS = 0.05
FULL = {"ramp": (0.0, 0.0)}


def told(**options: Any) -> TeachSection:
    given = {"eps": EPS, "epochs": 4, "batch": 32, "augment": "none", **options}
    return TeachSection.model_validate(given)


def batch(n: int = 8, step: int = 1) -> Batch:
    x, y = torch.from_numpy(toys.images(n)), torch.arange(n) % 10
    return Batch(x, y, torch.arange(n), torch.Generator().manual_seed(0), step=step, steps=10)


def taught(data: Dataset, **options: Any) -> nn.Module:
    config = told(**options)
    made = toys.architecture("mlp:24,16")
    net, _ = teach(made, data, config=config, seed=0, device=CPU)
    return net


# ── formulas ────────────────────────────────────────────────────────────────────────────────────


def test_terms_grow_along_the_ramp() -> None:
    config = told(ramp=(0.2, 0.6))
    found = [growth(config, step, 10) for step in range(10)]
    assert found == pytest.approx([0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1])
    assert [growth(told(ramp=(0.5, 0.5)), step, 10) for step in (4, 5)] == [0.0, 1.0]


def test_stability_is_its_formula_and_knows_which_relus_can_change() -> None:
    low, high = torch.tensor([[-1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    expected = -(math.tanh(1 - 3) + math.tanh(1 + 8)) / 2
    assert float(relu_stability([Box(low, high)])) == pytest.approx(expected)
    stable = Box(torch.full((2, 3), 5.0), torch.full((2, 3), 6.0))
    open_ = Box(torch.full((2, 3), -5.0), torch.full((2, 3), 6.0))
    assert float(relu_stability([stable])) == pytest.approx(-1.0)
    assert float(relu_stability([open_])) == pytest.approx(1.0)
    assert float(relu_stability([stable, open_])) == pytest.approx(0.0, abs=1e-6)


def test_interval_entropy_is_no_less_than_any_cross_entropy_in_the_ball() -> None:
    net, given = toys.mlp(seed=1), batch()
    bounds, _ = outputs(net, given.x, EPS)
    worst = float(interval_entropy(bounds, given.y).detach())
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        noise = torch.rand(given.x.shape, generator=generator) * 2 - 1
        x = (given.x + EPS * noise.sign()).clamp(0, 1)
        assert float(nn.functional.cross_entropy(net(x), given.y).detach()) <= worst
    point, _ = outputs(net, given.x, 0.0)
    here = float(nn.functional.cross_entropy(net(given.x), given.y).detach())
    assert float(interval_entropy(point, given.y).detach()) == pytest.approx(here, rel=1e-4)


def test_sizes_are_of_weights_alone() -> None:
    net = toys.cnn(seed=1)
    weights = (net.body.conv1, net.body.conv2, net.body.logits)
    expected = sum(float(module.weight.detach().abs().sum()) for module in weights)
    assert float(sizes(net).detach()) == pytest.approx(expected, rel=1e-5)


def test_a_teacher_without_terms_is_madrys() -> None:
    net = toys.mlp(seed=1)
    plain, found = (
        float(loss(net.train(), batch()).detach())
        for loss in (madry(eps=EPS, steps=3), verifiable(told(pgd_steps=3)))
    )
    assert found == plain


def test_the_teachers_loss_is_its_formula() -> None:
    net, config = toys.mlp(seed=1), told(interval=0.3, stability=0.2, l1=0.01, pgd_steps=3, **FULL)
    loss = float(verifiable(config)(net.train(), batch()).detach())
    assert net.training
    plain = float(madry(eps=EPS, steps=3)(net.train(), batch()).detach())
    bounds, seen = outputs(net.eval(), batch().x, EPS)
    terms = interval_entropy(bounds, batch().y), relu_stability(seen), sizes(net)
    entropy, stability, size = (float(term.detach()) for term in terms)
    expected = 0.7 * plain + 0.3 * entropy + 0.2 * stability + 0.01 * size
    assert loss == pytest.approx(expected, rel=1e-4)


def section(**options: Any) -> DistillSection:
    return DistillSection.model_validate({"eps": EPS, "augment": "none", **FULL, **options})


def test_the_students_regularisers_are_their_formula() -> None:
    student, reference = toys.mlp(seed=1), toys.mlp(seed=2)
    config = section(stability=0.2, joint_gap=0.1, l1=0.01, gap_pairs=3)
    found = float(regularisers(config, Look(student.train(), reference, batch())).detach())
    assert student.training
    _, seen = outputs(student.eval(), batch().x, EPS)
    sides = margins(Look(student, reference, batch()), 3)
    gaps = margin_gaps(student, reference, batch().x, EPS, sides)
    terms = relu_stability(seen), gaps.mean(), sizes(student)
    expected = sum(
        w * float(term.detach()) for w, term in zip((0.2, 0.1, 0.01), terms, strict=True)
    )
    assert found == pytest.approx(expected, rel=1e-4)
    assert float(regularisers(section(), Look(student, reference, batch()))) == 0.0


def test_margins_are_of_the_references_class_against_others_and_both_ways() -> None:
    reference = toys.mlp(seed=2)
    look = Look(toys.mlp(seed=1), reference, batch())
    sides = margins(look, 4)
    assert sides.shape == (8, 8, 10)
    torch.testing.assert_close(sides[:, :4], -sides[:, 4:])
    assert torch.equal(sides[:, :4].argmax(2), look.targets.argmax(1)[:, None].expand(-1, 4))
    assert (sides.abs().sum(2) == 2).all()
    assert (sides.sum(2) == 0).all()


# ── what they do ────────────────────────────────────────────────────────────────────────────────


def _open(net: nn.Module, x: Tensor) -> float:
    """Share of ReLUs that can change their phase within the ball, by intervals."""
    _, seen = outputs(net, x, EPS)
    return float(torch.cat([(b.low < 0) & (b.high > 0) for b in seen], 1).double().mean())


@pytest.mark.parametrize(("term", "weight"), [("interval", 0.3), ("stability", 0.3), ("l1", 1e-3)])
def test_every_term_leaves_fewer_relus_open(term: str, weight: float) -> None:
    data = digits(600)
    x = torch.from_numpy(data.x[:100])
    plain, better = (taught(data, epochs=8, **terms) for terms in ({}, {term: weight}))
    assert _open(better, x) < 0.9 * _open(plain, x)
    assert training.accuracy(better, data, device=CPU).rate > 0.7


def test_the_joint_gap_as_a_loss_makes_its_bound_smaller() -> None:
    reference, data = taught(digits(600)), digits(600)
    x = torch.from_numpy(data.x[:100])
    bounds = []
    for weight in (0.0, 0.3):
        student = toys.net("mlp:24,16", seed=1, settled=False)
        config = section(epochs=4, batch=32, loss="fd", joint_gap=weight, label_weight=0.0)
        distill.train(
            student, reference, data.unlabelled(), data.take([]), config=config, seed=0, device=CPU
        )
        empty = torch.full((100,), -1)
        given = Batch(x, empty, empty, torch.Generator().manual_seed(0), step=0, steps=1)
        sides = margins(Look(student, reference, given), 9)
        bounds.append(float(margin_gaps(student, reference, x, EPS, sides).mean().detach()))
    assert bounds[1] < 0.9 * bounds[0]


def test_teaching_is_deterministic_resumes_and_wants_labels(tmp_path: Any) -> None:
    data, config = digits(96), told(epochs=1, interval=0.1)
    made = toys.architecture("cnn:4,6")
    nets = [
        teach(made, data, config=config, seed=0, device=CPU, checkpoint=place)
        for place in (None, tmp_path / "c", tmp_path / "c")
    ]
    assert len({state_sha256(net) for net, _ in nets}) == 1
    assert [done.resumed_at for _, done in nets] == [0, 0, 3]
    other, _ = teach(made, data, config=told(epochs=1), seed=0, device=CPU)
    assert state_sha256(other) != state_sha256(nets[0][0])
    with pytest.raises(DataError, match="without labels"):
        teach(made, data.unlabelled(), config=config, seed=0, device=CPU)


# ── schedules ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.08] * 8),
        ("step", [0.08] * 4 + [0.008] * 2 + [0.0008] * 2),
        ("cosine", [0.04 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]),
        ("one-cycle", [training.one_cycle(k, 8, 0.08) for k in range(8)]),
    ],
)
def test_rates_are_what_their_schedule_says(schedule: str, expected: list[float]) -> None:
    loop = told(schedule=schedule, lr=0.08)
    np.testing.assert_allclose([training.rate(k, 8, loop) for k in range(8)], expected)


def test_a_warm_up_rises_by_equal_steps() -> None:
    loop = told(schedule="constant", warm_up=0.5, lr=0.08)
    found = [training.rate(k, 8, loop) for k in range(8)]
    np.testing.assert_allclose(found, [0.02, 0.04, 0.06, 0.08, 0.08, 0.08, 0.08, 0.08])


def test_a_ramp_that_falls_is_refused() -> None:
    with pytest.raises(ValueError, match="before it begins"):
        told(ramp=(0.5, 0.1))
