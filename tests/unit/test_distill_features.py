"""OFD: margins, partial L2, pairing, connectors."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import toys
from mlflow_kdguard import distill
from mlflow_kdguard.config import DistillSection
from mlflow_kdguard.distill import Look, Term
from mlflow_kdguard.distill.features import Link, ofd
from mlflow_kdguard.errors import UsageError
from mlflow_kdguard.training import Batch, state_sha256
from runs import CPU, digits

SHAPE = (1, 8, 8)


def section(**options: Any) -> DistillSection:
    return DistillSection.model_validate({"batch": 32, "augment": "none", "epochs": 1, **options})


def term(student: nn.Module, teacher: nn.Module, shape: tuple[int, int, int] = SHAPE) -> Term:
    return ofd(section(), student=student, reference=teacher, features_from=teacher, shape=shape)


def looked(term: Term, student: nn.Module, teacher: nn.Module, n: int = 6) -> Look:
    x = torch.from_numpy(toys.images(n))
    y = torch.full((n,), -1)
    batch = Batch(x, y, torch.arange(n), torch.Generator(), step=0, steps=1)
    return Look(student, teacher, batch, term.taps)


def passing(link: Link) -> Link:
    """The link with a connector that changes nothing."""
    link.connect = nn.Sequential()
    return link


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (-0.7, 0.5), (0.9, 1.3)])
def test_the_margin_is_the_mean_negative_response_of_the_batch_norm(
    mean: float, deviation: float
) -> None:
    layer = nn.BatchNorm2d(1)
    nn.init.constant_(layer.weight, -deviation)
    nn.init.constant_(layer.bias, mean)
    draws = np.random.default_rng(0).normal(mean, deviation, 400_000)
    assert float(Link(layer, 1, 1).margin) == pytest.approx(draws[draws < 0].mean(), rel=0.02)


def test_a_channel_that_is_hardly_ever_negative_has_a_margin_of_three_deviations() -> None:
    layer = nn.BatchNorm2d(1)
    nn.init.constant_(layer.bias, 5.0)
    assert float(Link(layer, 1, 1).margin) == -3.0


def test_without_batch_norm_the_margin_is_read_off_the_first_batch_and_kept() -> None:
    link = passing(Link(nn.Conv2d(2, 2, 1), 2, 2))
    assert torch.isnan(link.margin).all()
    maps = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    maps[:, 1] = maps[:, 1].abs()
    link(maps, maps)
    negative = maps[:, 0][maps[:, 0] < 0]
    torch.testing.assert_close(link.margin, torch.tensor([float(negative.mean()), 0.0]))
    link(maps, 9 * maps)
    assert float(link.margin[0]) == pytest.approx(float(negative.mean()))
    assert "margin" in link.state_dict()  # a checkpoint carries it


def test_the_distance_is_partial_l2() -> None:
    link = passing(Link(nn.BatchNorm2d(2), 2, 2))
    link.margin.copy_(torch.tensor([-0.5, -1.5]))
    draw = np.random.default_rng(1)
    student, teacher = draw.normal(size=(2, 3, 2, 4, 4)).astype(np.float32) * 2
    total = 0.0
    for index in np.ndindex(student.shape):
        t, s = max(teacher[index], link.margin[index[1]].item()), student[index]
        if s > t or t > 0:
            total += (t - s) ** 2
    found = float(link(torch.from_numpy(student), torch.from_numpy(teacher)))
    assert found == pytest.approx(total / student.size, rel=1e-5)
    # A student that is as negative as it likes where the teacher is silent is right.
    silent = torch.full((1, 2, 2, 2), -3.0)
    assert float(link(silent, silent + 2)) == 0.0


def test_layers_are_weighted_from_a_quarter_to_one_from_shallow_to_deep() -> None:
    student, teacher = toys.net("cnn:4,6,5"), toys.net("cnn:6,8,7", seed=1)
    made = term(student, teacher)
    assert isinstance(made.along, nn.ModuleList)
    look = looked(made, student, teacher)
    seen = []
    for link in made.along:
        hook = link.register_forward_hook(lambda _module, _inputs, out: out * 0 + 1)
        alone = [
            other.register_forward_hook(lambda _module, _inputs, out: out * 0)
            for other in made.along
            if other is not link
        ]
        seen.append(float(made.value(look).detach()))
        for handle in (hook, *alone):
            handle.remove()
    assert seen == [0.25, 0.5, 1.0]


def test_maps_are_paired_from_the_deepest_and_pooled_to_the_students_size() -> None:
    student, teacher = toys.net("cnn:4,6"), toys.net("cnn:6,8,7", seed=1)
    made = term(student, teacher)
    assert made.taps == ("body.norm1", "body.norm2")
    loss = made.value(looked(made, student, teacher))  # teacher 2×2 and 1×1, student 4×4 and 2×2
    assert math.isfinite(float(loss.detach()))
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.body.conv1.weight.grad is not None
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_connectors_are_trained_along_and_thrown_away() -> None:
    student, teacher = toys.net("cnn:4,6", settled=False), toys.net("cnn:8,12", seed=1)
    names, made = set(student.state_dict()), {}

    def keep(what: str, done: int, total: int, figures: Any) -> None:
        made[done] = figures["loss"]

    config = section(loss="ofd", epochs=12, batch=32)
    data = digits(96)
    distill.train(
        student, teacher, data, data.take([]), config=config, seed=0, device=CPU, progress=keep
    )
    assert set(student.state_dict()) == names
    first = distill.train(
        toys.net("cnn:4,6", settled=False),
        teacher,
        data,
        data.take([]),
        config=section(loss="ofd", epochs=1, batch=32),
        seed=0,
        device=CPU,
    )
    assert made[max(made)] < 0.8 * first.figures["loss"]


def test_features_may_come_from_another_network_than_the_targets() -> None:
    data, digests = digits(64), set()
    for features_from in (None, toys.resnet(seed=4), toys.cnn(seed=1)):
        student = toys.cnn(seed=3)
        distill.train(
            student,
            toys.cnn(seed=1),
            data,
            data.take([]),
            config=section(feature="ofd"),
            seed=0,
            device=CPU,
            features_from=features_from,
        )
        digests.add(state_sha256(student))
    assert len(digests) == 2


def test_a_network_without_feature_maps_is_refused() -> None:
    with pytest.raises(UsageError, match="no feature map"):
        term(toys.mlp(), toys.cnn())
