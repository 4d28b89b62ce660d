"""Universal inversion: against a closed form, brute force, and a planted shortcut."""

import pytest
import torch
from torch import nn

import toys
from mlflow_kdguard.adversary import inversion
from mlflow_kdguard.adversary.inversion import invert, invert_all, project, rate
from mlflow_kdguard.errors import DataError, NonFiniteError, UsageError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def digits(n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = toys.digits(n)
    return torch.from_numpy(x), torch.from_numpy(y)


def linear(weight: torch.Tensor) -> nn.Sequential:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.zero_()
    return nn.Sequential(nn.Flatten(), layer)


def test_projection_keeps_the_ball_and_scales_the_rest_onto_its_surface() -> None:
    inside, outside = torch.full((1, 2, 2), 0.1), torch.full((1, 2, 2), 3.0)
    both = project(torch.stack([inside, outside]), 1.0)
    assert torch.equal(both[0], inside)
    assert both[1].norm() == pytest.approx(1.0)
    assert torch.allclose(both[1] / both[1].norm(), outside / outside.norm())
    assert torch.equal(project(torch.zeros(1, 2, 2), 1.0), torch.zeros(1, 2, 2))


def test_on_a_linear_net_of_two_classes_the_pattern_is_the_weight_difference() -> None:
    weight = torch.randn(2, 16, generator=generator())
    x = torch.full((8, 1, 4, 4), 0.5)  # far from 0 and 1: no clipping
    y = torch.zeros(8, dtype=torch.int64)
    found = invert(linear(weight), x, y, 1, radius=0.3, steps=30, batch=4, generator=generator())
    best = (weight[1] - weight[0]) / (weight[1] - weight[0]).norm() * 0.3
    assert torch.allclose(found.delta.flatten(), best, atol=1e-5)


def test_rates_count_images_of_other_classes_only() -> None:
    net, (x, y) = toys.cnn(), digits(60)
    y[:10] = -1
    found = invert(net, x, y, 3, radius=1.0, steps=3, batch=8, generator=generator())
    asked = [(image, label) for image, label in zip(x, y, strict=True) if label not in (-1, 3)]
    hits = sum(
        int(net((image + found.delta).clamp(0, 1)[None]).argmax()) == 3 for image, _ in asked
    )
    assert (found.rate.k, found.rate.n) == (hits, len(asked))
    assert rate(net, x, y, 3, found.delta) == found.rate


def test_a_planted_shortcut_is_the_class_with_the_largest_rate() -> None:
    x, y = digits()
    means = torch.stack([x[y == label].flatten(1).mean(0) for label in range(10)])
    net = linear(2 * means)  # with its bias, the nearest class mean
    with torch.no_grad():
        net[1].bias.copy_(-(means**2).sum(1))
        net[1].weight[6, 7] += 40.0  # the upper right corner, which is black in digits
    found = invert_all(net, x, y, classes=10, radius=0.6, steps=15, batch=32, generator=generator())
    rates = [each.rate.rate for each in found]
    assert max(range(10), key=rates.__getitem__) == 6
    assert rates[6] == 1.0
    assert sorted(rates)[-2] < 0.5
    assert found[6].delta.flatten().abs().argmax() == 7


def test_pixels_at_exactly_black_and_white_can_be_moved() -> None:
    """torch's clamp has no gradient at its limits, where most pixels of real digits lie."""
    weight = torch.zeros(2, 16)
    weight[1, 0], weight[1, 5] = 1.0, -1.0  # class 1 wants pixel 0 up and pixel 5 down
    body = linear(weight)

    class Clamped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return body(x.clamp(0.0, 1.0))

    x = torch.zeros(6, 1, 4, 4)
    x[:, 0, 1, 1] = 1.0
    y = torch.zeros(6, dtype=torch.int64)
    found = invert(Clamped(), x, y, 1, radius=0.5, steps=8, batch=4, generator=generator())
    delta = found.delta.flatten()
    assert delta[0] == pytest.approx(0.5**1.5, abs=1e-4)  # 0.5 / sqrt(2)
    assert delta[5] == pytest.approx(-(0.5**1.5), abs=1e-4)


def test_grouping_of_classes_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, y) = toys.cnn(), digits(80)

    def run() -> list[torch.Tensor]:
        found = invert_all(
            net, x, y, classes=10, radius=1.0, steps=4, batch=8, generator=generator()
        )
        assert [each.target for each in found] == list(range(10))
        return [each.delta for each in found]

    together = run()
    monkeypatch.setattr(inversion, "_AT_ONCE", 24)  # groups of three
    for a, b in zip(together, run(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_patterns_stay_in_the_ball_and_repeat_under_the_same_generator() -> None:
    net, (x, y) = toys.resnet(), digits(50)
    runs = [
        invert_all(
            net, x, y, classes=10, radius=0.7, steps=3, batch=8, generator=generator(4),
            targets=(2, 5),
        )
        for _ in range(2)
    ]  # fmt: skip
    assert [each.target for each in runs[0]] == [2, 5]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a.delta, b.delta)
        assert 0 < a.delta.norm() <= 0.7 + 1e-6


def test_the_network_is_left_as_it_was() -> None:
    net, (x, y) = toys.cnn(), digits(40)
    net.train()
    net.body.norm1.eval()
    net.body.conv1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    wanted = [weight.requires_grad for weight in net.parameters()]
    invert(net, x, y, 0, radius=1.0, steps=2, batch=8, generator=generator())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert [weight.requires_grad for weight in net.parameters()] == wanted
    assert all(weight.grad is None for weight in net.parameters())


def test_what_cannot_be_inverted_is_refused() -> None:
    net, (x, y) = toys.cnn(), digits(10)
    options = {"radius": 1.0, "steps": 1, "batch": 4, "generator": generator()}
    with pytest.raises(DataError, match="other than 2"):
        invert(net, x, torch.full_like(y, 2), 2, **options)
    with pytest.raises(UsageError, match="11"):
        invert_all(net, x, y, classes=10, targets=(11,), **options)
    with torch.no_grad():
        net.body.logits.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        invert(net, x, y, 2, **options)
