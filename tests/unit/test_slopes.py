"""Faster image gradients are the same gradients."""

import pytest
import torch
from torch import Tensor, nn

import toys
from mlflow_kdguard.adversary import slopes
from mlflow_kdguard.adversary.slopes import FastSlopes


def _replaced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    apply = slopes._FewChannels.apply

    def counting(*arguments: object) -> object:
        calls.append(1)
        return apply(*arguments)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(slopes._FewChannels, "apply", counting)
    return calls


def _slope(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    moving = x.clone().requires_grad_(True)
    out = net(moving)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    (slope,) = torch.autograd.grad((out * weights).sum(), moving)
    return out.detach(), slope


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 2), (8, 6), (28, 28)])
def test_they_are_those_of_autograd(
    size: int, channels: int, bias: bool, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _replaced(monkeypatch)
    layer = nn.Conv2d(channels, 7, size, stride=2, padding=size // 2, bias=bias)
    x = torch.rand(3, channels, *shape, generator=torch.Generator().manual_seed(0))
    out, slope = _slope(layer, x)
    with FastSlopes():
        fast_out, fast_slope = _slope(layer, x)
    assert calls == [1]
    assert torch.equal(fast_out, out)
    torch.testing.assert_close(fast_slope, slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(1, 3, 5, stride=1, padding=2), (1, 8, 8)),
        (nn.Conv2d(1, 3, 5, stride=2, padding=1), (1, 8, 8)),
        (nn.Conv2d(1, 3, 4, stride=2, padding=1), (1, 8, 8)),
        (nn.Conv2d(1, 3, (3, 5), stride=2, padding=(1, 2)), (1, 8, 8)),
        (nn.Conv2d(1, 3, 3, stride=(2, 1), padding=1), (1, 8, 8)),
        (nn.Conv2d(1, 3, 3, stride=2, padding=1, dilation=2), (1, 8, 8)),
        (nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), (2, 8, 8)),
        (nn.Conv2d(5, 3, 3, stride=2, padding=1), (5, 8, 8)),
        (nn.Conv2d(1, 3, 3, stride=2, padding=1), (1, 7, 8)),
        (nn.Conv2d(1, 3, 3, stride=1, padding="same"), (1, 8, 8)),
        (nn.Conv2d(1, 3, 3, stride=2, padding=1).double(), (1, 8, 8)),
    ],
)
def test_other_convolutions_are_left_alone(
    layer: nn.Conv2d, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _replaced(monkeypatch)
    x = torch.rand(2, *shape, dtype=layer.weight.dtype)
    expected = _slope(layer, x)
    with FastSlopes():
        found = _slope(layer, x)
    assert not calls
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_whole_networks_in_mixed_precision_keep_their_own_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, net = _replaced(monkeypatch), toys.cnn()
    x = torch.from_numpy(toys.images(4))
    with torch.autocast("cpu", torch.bfloat16), FastSlopes():
        net(x.requires_grad_(True)).float().sum().backward()
    assert not calls
    assert x.grad is not None
    with FastSlopes():
        net(x).sum()
    assert calls == [1, 1]  # both layers have few input channels
