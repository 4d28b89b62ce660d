"""Taps: the maps that a person would choose, on the zoo's networks and on others."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import toys
from mlflow_kdguard import graph
from mlflow_kdguard.errors import UsageError
from mlflow_kdguard.nets import convert, emit, taps

X = torch.from_numpy(toys.images(4))


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        ("mlp:12,10", ("body.linear1", "body.linear2")),
        ("cnn:4,6", ("body.norm1", "body.norm2")),
        ("resnet8:4", tuple(f"body.stages.stage{i}.0.sum" for i in (1, 2, 3))),
        ("wrn-10-1", ("body.stages.stage2.0.norm1", "body.stages.stage3.0.norm1", "body.norm")),
    ],
)
def test_the_zoo_is_tapped_before_its_activations(arch: str, names: tuple[str, ...]) -> None:
    net = toys.net(arch)
    assert taps.auto(net, (1, 8, 8)) == names
    with taps.Taps(net, names) as tapped:
        net(X)
    assert tuple(tapped.features) == names
    assert all(bool((feature < 0).any()) for feature in tapped.features.values())


class Shared(nn.Module):
    """One in-place ReLU called four times, and an in-place sum, as in torchvision's ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.block = Block()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.relu(self.norm(self.stem(x))))
        return self.last(self.relu(self.pool(x)).flatten(1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        out = self.conv2(x)
        out += x
        return self.relu(out)


def test_shared_and_in_place_modules() -> None:
    net = Shared().eval()
    assert taps.auto(net, (1, 8, 8)) == ("norm", "block")
    expected = net.norm(net.stem(X))
    with taps.Taps(net, ("norm", "block.conv1", "block.relu")) as tapped:
        logits = net(X)
    assert torch.equal(tapped.features["norm"], expected)
    assert torch.equal(tapped.features["block.conv1"], net.block.conv1(functional.relu(expected)))
    assert torch.equal(tapped.features["block.relu"], net.block(functional.relu(expected)))
    assert torch.equal(logits, net(X))


class Functional(nn.Module):
    """Activations without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(functional.relu(self.norm(self.conv(x))).flatten(1))


def test_functional_activations_are_tapped_before() -> None:
    assert taps.auto(Functional(), (1, 8, 8)) == ("norm",)


def test_a_network_read_from_onnx_has_the_same_taps() -> None:
    net = toys.cnn()
    read = convert.to_torch(graph.read(emit.to_bytes(net, (1, 8, 8), opset=18), where="toy"))
    names = taps.auto(read, (1, 8, 8))
    with taps.Taps(read, names) as ours, taps.Taps(net, ("body.norm1", "body.norm2")) as theirs:
        read(X)
        net(X)
    for mine, other in zip(ours.features.values(), theirs.features.values(), strict=True):
        torch.testing.assert_close(mine, other)


def test_watching_leaves_the_network_alone() -> None:
    net = toys.cnn().train()
    net.body.norm2.eval()
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    taps.auto(net, (1, 8, 8))
    assert net.training
    assert net.body.norm1.training
    assert not net.body.norm2.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in net.modules()]
    assert not any(hooks)


def test_hooks_go_even_when_the_network_fails() -> None:
    net = toys.cnn()
    with pytest.raises(RuntimeError), taps.Taps(net, ("body.norm1",)):
        net(torch.zeros(1, 3, 8, 8))
    with pytest.raises(RuntimeError):
        taps.auto(net, (3, 8, 8))
    assert not any(module._forward_hooks for module in net.modules())


def test_gradients_flow_through_taps_to_weights_and_pixels() -> None:
    net = toys.cnn()
    x = X.clone().requires_grad_()
    with taps.Taps(net, ("body.norm1",)) as tapped:
        net(x)
    tapped.features["body.norm1"].square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert net.body.conv1.weight.grad.abs().sum() > 0
    assert net.body.conv2.weight.grad is None


class Mask(nn.Module):
    """Blends each channel away by sigmoid(m)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.linspace(-1, 1, channels).reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 - torch.sigmoid(self.m))


def test_an_inserted_module_acts_survives_copies_and_exports() -> None:
    net = toys.cnn()
    plain = net(X)
    with taps.Taps(net, ("body.norm1",)) as before:
        net(X)
    mask = Mask(4)
    taps.insert(net, "body.norm1", mask)
    with taps.Taps(net, ("body.norm1",)) as after:
        masked = net(X)
    torch.testing.assert_close(after.features["body.norm1"], mask(before.features["body.norm1"]))
    assert not torch.allclose(masked, plain)
    assert "body.norm1.1.m" in net.state_dict()
    assert torch.equal(copy.deepcopy(net)(X), masked)
    read = graph.read(emit.to_bytes(net, (1, 8, 8), opset=18), where="masked")
    np.testing.assert_allclose(graph.evaluate(read, X.numpy()), masked.detach().numpy(), atol=1e-6)


def test_inserting_at_the_top_of_a_path() -> None:
    net = toys.cnn()
    doubled = 2 * net(X)
    taps.insert(net, "body", nn.Linear(10, 10, bias=False))
    with torch.no_grad():
        net.body[1].weight.copy_(2 * torch.eye(10))
    torch.testing.assert_close(net(X), doubled)


@pytest.mark.parametrize("name", ["", "body.nothing", "norm1"])
def test_unknown_layers_are_named(name: str) -> None:
    with pytest.raises(UsageError, match=r"body\.norm1"):
        taps.Taps(toys.cnn(), (name,))
    with pytest.raises(UsageError):
        taps.insert(toys.cnn(), name, nn.Identity())


def test_a_network_without_maps_or_hidden_layers_is_an_error() -> None:
    with pytest.raises(UsageError, match="tapped automatically"):
        taps.auto(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), (1, 8, 8))


def test_a_layer_that_returns_no_tensor_is_an_error() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(x)[0]

    with pytest.raises(UsageError, match="returns tuple"), taps.Taps(net := Outer(), ("pair",)):
        net(X)
