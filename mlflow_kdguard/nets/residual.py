"""Residual networks for small images.

Each block hands its sum through a module of its own (`sum`), so that the map before the last
activation can be tapped and masked by name.
"""

from torch import Tensor, nn


def _conv(inside: int, outside: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, kernel, stride=stride, padding=kernel // 2, bias=False)


class Basic(nn.Module):
    """ReLU(x' + BN(conv(ReLU(BN(conv(x)))))) (He et al. 2015, arXiv:1512.03385, figure 2)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inside, outside, 3, stride)
        self.norm1 = nn.BatchNorm2d(outside)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(outside, outside, 3)
        self.norm2 = nn.BatchNorm2d(outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(
                _conv(inside, outside, 1, stride), nn.BatchNorm2d(outside)
            )
        self.sum = nn.Identity()
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """N×inside×H×W -> N×outside×H/stride×W/stride."""
        inner = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        summed: Tensor = self.sum(inner + self.shortcut(x))
        activated: Tensor = self.relu2(summed)
        return activated


class PreActivated(nn.Module):
    """x' + conv(ReLU(BN(conv(ReLU(BN(x)))))) (Zagoruyko & Komodakis 2016, arXiv:1605.07146)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inside)
        self.relu1 = nn.ReLU()
        self.conv1 = _conv(inside, outside, 3, stride)
        self.norm2 = nn.BatchNorm2d(outside)
        self.relu2 = nn.ReLU()
        self.conv2 = _conv(outside, outside, 3)
        self.shortcut = _conv(inside, outside, 1, stride) if inside != outside else None
        self.sum = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """N×inside×H×W -> N×outside×H/stride×W/stride; a 1×1 shortcut sees the activated input."""
        activated = self.relu1(self.norm1(x))
        inner = self.conv2(self.relu2(self.norm2(self.conv1(activated))))
        summed: Tensor = self.sum(
            inner + (x if self.shortcut is None else self.shortcut(activated))
        )
        return summed


def _stages(block: type[nn.Module], inside: int, widths: list[int], blocks: int) -> nn.Sequential:
    stages = nn.Sequential()
    for index, width in enumerate(widths):
        stage = nn.Sequential()
        for place in range(blocks):
            stage.append(block(inside, width, 2 if index and not place else 1))
            inside = width
        stages.add_module(f"stage{index + 1}", stage)
    return stages


def resnet(depth: int, width: int, channels: int, classes: int) -> nn.Sequential:
    """CIFAR ResNet of depth 6n+2 with `width`, 2·`width`, 4·`width` channels."""
    net = nn.Sequential()
    net.add_module("conv", _conv(channels, width, 3))
    net.add_module("norm", nn.BatchNorm2d(width))
    net.add_module("relu", nn.ReLU())
    net.add_module("stages", _stages(Basic, width, [width, 2 * width, 4 * width], (depth - 2) // 6))
    return _head(net, 4 * width, classes)


def wide_resnet(depth: int, factor: int, channels: int, classes: int) -> nn.Sequential:
    """Wide ResNet of depth 6n+4 with 16, 32, 64 times `factor` channels, without dropout."""
    widths = [16 * factor, 32 * factor, 64 * factor]
    net = nn.Sequential()
    net.add_module("conv", _conv(channels, 16, 3))
    net.add_module("stages", _stages(PreActivated, 16, widths, (depth - 4) // 6))
    net.add_module("norm", nn.BatchNorm2d(widths[-1]))
    net.add_module("relu", nn.ReLU())
    return _head(net, widths[-1], classes)


def _head(net: nn.Sequential, width: int, classes: int) -> nn.Sequential:
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    net.add_module("logits", nn.Linear(width, classes))
    return net
