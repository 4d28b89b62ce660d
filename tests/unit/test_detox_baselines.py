"""Defences that ours is compared with: each does what its paper says."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import toys
from mlflow_kdguard import detox
from mlflow_kdguard.config import DetoxSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.detox import clp, ft_sam, nad, tuning
from mlflow_kdguard.errors import ConfigError, UsageError
from mlflow_kdguard.nets import taps

CPU = torch.device("cpu")


def digits(n: int = 120) -> Dataset:
    return Dataset.of(*toys.digits(n), uri="digits", classes=10)


def cleansed(
    name: str, net: nn.Module | None = None, n: int = 120, **options: float
) -> detox.Detoxed:
    given = {} if name == "clp" else {"steps": 6.0}
    config = DetoxSection(chain=(name,), batch=16, max_drop=1.0, options=given | options)
    teacher = toys.cnn() if net is None else net
    return detox.cleanse(teacher, digits(n), suspects=(), config=config, seed=0, device=CPU)


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in net.parameters()])


def test_fine_tuning_learns_from_the_clean_images() -> None:
    net = toys.net("cnn:8,16", settled=False)
    done = cleansed("fine_tune", net, steps=120.0, lr=0.05)
    step = done.record.steps[0]
    assert step.detoxed.rate > done.record.teacher.rate + 0.3


def test_ft_sam_without_an_ascent_is_fine_tuning_and_with_one_is_not() -> None:
    x, y = (torch.from_numpy(each[:32]) for each in toys.digits(32))
    options = {"steps": 5.0, "lr": 0.02}

    def after(routine: tuning.Tuning) -> torch.Tensor:
        for step in range(5):
            routine.advance(x, y, step, torch.Generator())
        return torch.cat([weights(routine.module), *map(torch.flatten, routine.module.buffers())])

    def fresh() -> nn.Module:
        return copy.deepcopy(toys.cnn()).requires_grad_(True)

    plain = after(tuning.Tuning("fine_tune", fresh(), tuning.plain, options))
    assert torch.equal(after(ft_sam.Flat(fresh(), options | {"rho": 0.0})), plain)
    assert not torch.allclose(after(ft_sam.Flat(fresh(), options | {"rho": 2.0})), plain, atol=1e-4)


def test_attention_is_the_direction_of_the_energy_of_each_place() -> None:
    features = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    expected = features.clamp(min=0).pow(2).sum(1).reshape(3, 10)
    expected = expected / expected.norm(dim=1, keepdim=True)
    assert torch.allclose(nad.attention(features), expected)


def test_nad_is_cross_entropy_and_the_distance_of_attention() -> None:
    x, y = (torch.from_numpy(each[:16]) for each in toys.digits(16))
    net, teacher = toys.cnn(), toys.cnn(seed=5)
    names = taps.auto(net, (1, 8, 8))
    value = nad.towards(teacher, names, 70.0)(net, x, y, torch.Generator())
    expected = nn.functional.cross_entropy(net(x), y)
    for name in names:
        maps = []
        for each in (net, teacher):
            with taps.Taps(each, [name]) as seen:
                each(x)
            maps.append(nad.attention(seen.features[name]))
        expected = expected + 70.0 * (maps[0] - maps[1]).pow(2).mean()
    assert torch.allclose(value, expected, rtol=1e-5)
    assert not torch.equal(weights(cleansed("nad").copy), weights(cleansed("nad", beta=0.0).copy))


def test_clp_bounds_how_a_channel_reacts_and_cuts_the_outlier() -> None:
    net = toys.net("cnn:16,8")
    convolution, norm = next(clp.pairs(net))
    bound = clp.lipschitz(convolution, norm)
    for channel in range(16):
        kernel = convolution.weight[channel].detach().double().flatten(1).numpy()
        scale = abs(float(norm.weight[channel].detach())) / np.sqrt(
            float(norm.running_var[channel]) + norm.eps
        )
        assert float(bound[channel]) == pytest.approx(np.linalg.svd(kernel)[1][0] * scale, rel=1e-6)
    with torch.no_grad():
        norm.weight[5] *= 40
    done = cleansed("clp", net)
    _, after = next(clp.pairs(done.copy))
    assert float(after.weight[5]) == float(after.bias[5]) == 0.0
    assert int((after.weight == 0).sum()) == 1
    assert done.record.steps[0].details["pruned"] >= 1
    assert float(norm.weight[5].detach()) != 0.0  # the teacher is left alone


def test_fine_pruning_keeps_the_most_silent_channels_silent() -> None:
    net = toys.cnn()
    norms = [norm for _, norm in clp.pairs(net)]
    with torch.no_grad():
        norms[-1].bias.fill_(1.0)
        norms[-1].bias[2] = -50.0  # never fires
    done = cleansed("fine_prune", net, share=0.2, lr=0.1)
    last = [norm for _, norm in clp.pairs(done.copy)][-1]
    assert float(last.weight[2]) == float(last.bias[2]) == 0.0
    assert int((last.weight == 0).sum()) == 1
    assert not torch.equal(weights(done.copy), weights(net))


def test_ibau_ends_where_universal_perturbations_hurt_less() -> None:
    """Against fine-tuning of the same length, on images that neither saw."""
    net = toys.net("cnn:8,16", settled=False)
    base = cleansed("fine_tune", net, 900, steps=300.0, lr=0.05).copy
    x, y = (torch.from_numpy(each[900:1300]) for each in toys.digits(1300))

    def hurt(done: nn.Module) -> float:
        delta = torch.zeros(x.shape[1:])
        for _ in range(20):
            delta.requires_grad_(True)
            loss = nn.functional.cross_entropy(done((x + delta).clamp(1e-6, 1 - 1e-6)), y)
            (slope,) = torch.autograd.grad(loss, delta)
            delta = (delta + 0.15 * slope / slope.norm()).detach()
            delta = delta * min(1.0, 0.6 / float(delta.norm()))
        with torch.no_grad():
            return float((done((x + delta).clamp(0, 1)).argmax(1) != y).double().mean())

    plain = cleansed("fine_tune", base, 900, steps=300.0, lr=0.05).copy
    robust = cleansed("ibau", base, 900, steps=300.0, lr=0.05, radius=0.9).copy
    assert hurt(robust) < hurt(plain) - 0.05


def test_anp_cuts_channels_and_leaves_a_network_of_the_same_form() -> None:
    net = toys.net("cnn:8,16", settled=False)
    net = cleansed("fine_tune", net, steps=150.0, lr=0.05).copy
    done = cleansed("anp", net, steps=60.0, most=0.3)
    assert done.record.steps[0].details["pruned"] > 0
    names = {name for name, _ in done.copy.named_modules()}
    assert names == {name for name, _ in net.named_modules()}  # no mask is left behind
    before, after = done.record.teacher, done.record.steps[0].detoxed
    assert after.rate > before.rate - 0.35


@pytest.mark.parametrize("name", ["anp", "clp", "fine_prune"])
def test_networks_without_convolutions_have_nothing_to_prune(name: str) -> None:
    with pytest.raises(UsageError, match="the network has none"):
        cleansed(name, toys.net("mlp:8"))


def test_options_that_no_row_has_are_configuration_errors() -> None:
    with pytest.raises(ConfigError, match="no row of the detox chain has an option 'beta'") as it:
        cleansed("fine_tune", beta=1.0)
    assert "steps, lr" in it.value.remedy
    given: dict[str, Any] = {"chain": (), "options": {"steps": 3.0}}
    with pytest.raises(ConfigError, match="none"):
        detox.cleanse(
            toys.cnn(), digits(), suspects=(), config=DetoxSection(**given), seed=0, device=CPU
        )
