"""Interval and joint bounds for training: above everything that samples find, and trained with."""

import pytest
import torch
from torch import Tensor, nn

import toygraphs
import toys
from mlflow_kdguard.errors import ModelError
from mlflow_kdguard.nets import boxes, convert
from mlflow_kdguard.nets.relaxed import margin_gaps

EPS = 0.03
ROUNDING = 1e-4
"""The bounds are taken in float32."""
GRAPHS = (toygraphs.mlp, toygraphs.cnn, toygraphs.residual, toygraphs.pooled, toygraphs.capped)


def near(x: Tensor, count: int = 200) -> Tensor:
    """Points of the ball around each image, half of them corners: count×N×C×H×W."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand((count, *x.shape), generator=generator) * 2 - 1
    noise[::2] = noise[::2].sign()
    return (x + EPS * noise).clamp(0.0, 1.0)


def answers(net: nn.Module, points: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([net(row) for row in points])


def margins(classes: int, count: int = 3) -> Tensor:
    """One image's directions ±(e_0 - e_j)."""
    eye = torch.eye(classes)
    side = eye[:1] - eye[1 : count + 1]
    return torch.cat([side, -side])


@pytest.mark.parametrize("arch", toys.ARCHES)
def test_interval_bounds_hold_every_answer_in_the_ball(arch: str) -> None:
    net, x = toys.net(arch, seed=3), torch.from_numpy(toys.images(4))
    found = answers(net, near(x))
    bounds, seen = boxes.outputs(net, x, EPS)
    assert seen
    assert (bounds.low <= found + ROUNDING).all()
    assert (bounds.high >= found - ROUNDING).all()
    point, _ = boxes.outputs(net, x, 0.0)
    torch.testing.assert_close(point.low, net(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(point.high, net(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", GRAPHS, ids=lambda make: make.__name__)
def test_every_canonical_layer_has_interval_bounds(make: toygraphs.Any) -> None:
    for seed in range(3):
        model = make(seed)
        net = convert.to_torch(model)
        x = torch.from_numpy(toys.images(3, model.input_shape, seed=seed))
        found = answers(net, near(x))
        bounds, _ = boxes.outputs(net, x, EPS)
        assert (bounds.low <= found + ROUNDING).all()
        assert (bounds.high >= found - ROUNDING).all()


def test_first_intervals_are_exact_for_a_linear_map() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU())
    x = torch.from_numpy(toys.images(2)).clamp(EPS, 1 - EPS)
    _, (box,) = boxes.outputs(net, x, EPS)
    weight = net[1].weight
    for row, low, high in zip(weight, box.low.T, box.high.T, strict=True):
        worst = x.flatten(1) + EPS * row.sign()
        torch.testing.assert_close(high, net[1](worst)[:, (weight == row).all(1)].squeeze(1))
        worst = x.flatten(1) - EPS * row.sign()
        torch.testing.assert_close(low, net[1](worst)[:, (weight == row).all(1)].squeeze(1))


def test_intervals_are_differentiable_and_refuse_what_they_do_not_know() -> None:
    net, x = toys.cnn(seed=1), torch.from_numpy(toys.images(2))
    bounds, _ = boxes.outputs(net, x, EPS)
    (bounds.high - bounds.low).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.body.conv1.parameters())
    with pytest.raises(ModelError, match="softmax"):
        boxes.outputs(nn.Sequential(nn.Flatten(), nn.Softmax(1)), x, EPS)
    with pytest.raises(ModelError, match="fixed statistics"):
        boxes.outputs(net.train(), x, EPS)


@pytest.mark.parametrize("arch", toys.ARCHES)
def test_joint_bounds_hold_every_margin_gap_in_the_ball(arch: str) -> None:
    student, reference = toys.mlp(seed=1), toys.net(arch, seed=2)
    x = torch.from_numpy(toys.images(3))
    directions = margins(10).expand(3, -1, -1)
    bounds = margin_gaps(student, reference, x, EPS, directions)
    points = near(x)
    gaps = answers(student, points) - answers(reference, points)
    found = torch.einsum("pnk,nmk->pnm", gaps, directions)
    assert (bounds >= found - 1e-3).all()
    # At radius 0 the bound is the gap itself.
    here = torch.einsum("nk,nmk->nm", student(x) - reference(x), directions)
    point = margin_gaps(student, reference, x, 0.0, directions)
    torch.testing.assert_close(point, here, rtol=1e-3, atol=1e-3)


def test_joint_bounds_are_tighter_than_intervals_apart() -> None:
    student, reference = toys.mlp(seed=1), toys.mlp(seed=2)
    x, directions = torch.from_numpy(toys.images(8)), margins(10).expand(8, -1, -1)
    joint = margin_gaps(student, reference, x, EPS, directions)
    apart = torch.zeros_like(joint)
    for net, sign in ((student, 1.0), (reference, -1.0)):
        box, _ = boxes.outputs(net, x, EPS)
        more, less = (sign * directions).clamp(min=0), (sign * directions).clamp(max=0)
        apart += (more * box.high[:, None] + less * box.low[:, None]).sum(2)
    assert (joint < apart).all()


def test_gradients_of_joint_bounds_are_their_slopes_and_reach_the_student_alone() -> None:
    student, reference = toys.mlp(seed=1).double(), toys.mlp(seed=2).double()
    x = torch.from_numpy(toys.images(4)).double()
    directions = margins(10).expand(4, -1, -1).double()

    def total() -> Tensor:
        return margin_gaps(student, reference, x, EPS, directions).sum()

    total().backward()
    assert all(parameter.grad is None for parameter in reference.parameters())
    for name in ("linear1", "linear2", "logits"):
        weight = student.body.get_submodule(name).weight
        at = (1, 2)
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[at] += step
            ends.append(float(total().detach()))
            with torch.no_grad():
                weight[at] -= step
        slope = (ends[0] - ends[1]) / 2e-5
        assert weight.grad[at].item() == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_joint_bounds_refuse_a_pooled_maximum() -> None:
    net = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 10))
    x, directions = torch.from_numpy(toys.images(2)), margins(10).expand(2, -1, -1)
    with pytest.raises(ModelError, match="joint_gap"):
        margin_gaps(toys.mlp(), net, x, EPS, directions)
