"""What two networks begin with is computed once, and changes no bit of what they say."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

import toys
from mlflow_kdguard import detox
from mlflow_kdguard.config import DetoxSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.nets import emit
from mlflow_kdguard.nets.trunk import Fork, trunk

CPU = torch.device("cpu")
WEIGHTS = nn.Conv2d, nn.Linear


def pixels(n: int = 24) -> torch.Tensor:
    return torch.from_numpy(toys.images(n))


def weighty(net: nn.Module) -> int:
    return sum(isinstance(each, WEIGHTS) for each in net.modules())


def with_another_head(net: nn.Module, *, seed: int = 3) -> nn.Module:
    """The same trunk, and fresh numbers behind it."""
    copy, generator = deepcopy(net), torch.Generator().manual_seed(seed)
    kept = {id(weights) for weights in trunk(copy).parameters()}
    with torch.no_grad():
        for weights in copy.parameters():
            if id(weights) not in kept:
                weights.add_(torch.randn(weights.shape, generator=generator) * 0.1)
    return copy


@pytest.mark.parametrize("arch", toys.ARCHES)
def test_a_fork_says_what_both_networks_say_bit_for_bit(arch: str) -> None:
    net = toys.net(arch)
    for other in (with_another_head(net), toys.net(arch, seed=8), net):
        left, right = Fork(net, other)(pixels())
        assert torch.equal(left, net(pixels()))
        assert torch.equal(right, other(pixels()))


@pytest.mark.parametrize("arch", toys.ARCHES)
def test_a_common_trunk_is_computed_once(arch: str) -> None:
    net = toys.net(arch)
    shared, once = weighty(trunk(net)), weighty(net)
    assert 0 < shared < once - 1  # the logits and what comes right before them are head
    assert weighty(Fork(net, with_another_head(net))) == 2 * once - shared
    assert weighty(Fork(net, toys.net(arch, seed=8))) == 2 * once
    assert weighty(Fork(net, net)) == once


def test_another_first_unit_shares_nothing() -> None:
    """Equal units behind a different one see different features."""
    net = toys.cnn()
    other = deepcopy(net)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-6
    assert weighty(Fork(net, other)) == 2 * weighty(net)


def test_another_statistic_shares_nothing() -> None:
    net = toys.cnn()
    other = deepcopy(net)
    next(each for each in other.modules() if isinstance(each, nn.BatchNorm2d)).running_mean += 1e-3
    left, right = Fork(net, other)(pixels())
    assert torch.equal(left, net(pixels()))
    assert torch.equal(right, other(pixels()))


def test_other_pixels_share_nothing() -> None:
    net = toys.cnn()
    other = deepcopy(net)
    other.mean += 0.1
    left, right = Fork(net, other)(pixels())
    assert torch.equal(left, net(pixels()))
    assert torch.equal(right, other(pixels()))


def test_a_module_that_stands_twice_in_a_row_is_computed_twice() -> None:
    """The caller's own network may use one activation in many places."""
    net, relu = toys.mlp(), nn.ReLU()
    net.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), relu, nn.Linear(9, 9), relu,
                             nn.Linear(9, 10))  # fmt: skip
    left, right = Fork(net, other := with_another_head(net))(pixels())
    assert torch.equal(left, net(pixels()))
    assert torch.equal(right, other(pixels()))
    assert len(trunk(net)) == 3


class Twice(nn.Sequential):
    """A row whose forward is another."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(super().forward(x).repeat_interleave(7, 1)[:, :64])


def test_a_row_with_a_forward_of_its_own_is_no_row_of_units() -> None:
    net = toys.mlp()
    net.body = Twice(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 10))
    assert len(trunk(net)) == 0
    left, _ = Fork(net, deepcopy(net))(pixels())
    assert torch.equal(left, net(pixels()))


def test_of_networks_that_are_no_row_of_units_nothing_is_shared() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 10))
    assert len(trunk(net)) == 0
    left, right = Fork(net, deepcopy(net))(pixels())
    assert torch.equal(left, right)


@pytest.mark.parametrize("arch", toys.ARCHES)
def test_unlearning_leaves_the_trunk_to_the_teacher(arch: str, tmp_path: Path) -> None:
    """With its statistics; and the file that ships holds it once."""
    data = Dataset.of(*toys.digits(120), uri="digits", classes=10)
    net, sizes = toys.net(arch), []
    for part in ("head", "all"):
        config = DetoxSection(chain=("unlearn", "margin_swap"), unlearn_steps=4, batch=16,
                              unlearn_part=part, max_drop=1.0)  # fmt: skip
        done = detox.cleanse(net, data, suspects=(1,), config=config, seed=0, device=CPU)
        pairs = zip(trunk(net).state_dict().values(), trunk(done.copy).state_dict().values(),
                    strict=True)  # fmt: skip
        assert all(torch.equal(own, its) for own, its in pairs) is (part == "head")
        assert not torch.equal(net(pixels()), done.copy(pixels()))
        sizes.append(len(emit.to_bytes(done.reference, (1, 8, 8), opset=18)))
    assert sizes[0] < sizes[1]


def test_a_preview_follows_the_copy_that_is_being_trained() -> None:
    """Before the first step teacher and copy are equal, and must not be taken for one."""
    from mlflow_kdguard.detox import margin_swap

    net, copy = toys.cnn(), toys.cnn()
    preview = margin_swap.combine(net, copy, (2,), 10)
    before = preview(pixels()).clone()
    with torch.no_grad():
        next(copy.parameters()).add_(1.0)
    assert not torch.equal(preview(pixels()), before)
