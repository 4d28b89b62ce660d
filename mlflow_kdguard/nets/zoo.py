"""The architectures that a name can ask for.

mlp:100,100            hidden widths
cnn:16,32,64           channels; strided convolutions, no pooling
resnet8, resnet8:4     CIFAR ResNet of depth 8; channels of the first stage (16)
wrn-16-1 … wrn-28-4    Wide ResNet of depth 6n+4 and that factor
torchvision:resnet18   any classifier of torchvision, untrained
package.module:factory the caller's own code: `factory(shape, classes) -> nn.Module`
"""

import re
from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor, nn

from mlflow_kdguard.errors import ConfigError, UsageError
from mlflow_kdguard.nets import residual
from mlflow_kdguard.nets.architecture import Architecture

KNOWN = (
    "mlp:100,100",
    "cnn:16,32,64",
    "resnet8",
    "resnet8:WIDTH",
    "wrn-DEPTH-FACTOR (wrn-16-1 … wrn-28-4)",
    "torchvision:NAME",
    "package.module:factory (with --trust-code)",
)
"""What a name may look like, for messages and help."""

_OWN = ("mlp", "cnn", "resnet8")
FAMILIES = tuple(f"{family}:" for family in (*_OWN, "torchvision"))
"""How names with a colon begin that do not stand for the caller's own code."""
_MOST_WEIGHTS = 2**28
_WIDEST = 8192
_DEEPEST = 64


class Classifier(nn.Module):
    """A network on pixels: clamps to [0,1], normalises by channel, then asks `body`.

    forward: N×C×H×W pixels -> N×K logits.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, architecture: Architecture, body: nn.Module) -> None:
        super().__init__()
        self.architecture = architecture
        self.register_buffer("mean", torch.tensor(architecture.mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(architecture.std).reshape(-1, 1, 1))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """N×C×H×W pixels -> N×K logits."""
        logits: Tensor = self.body((x.clamp(0.0, 1.0) - self.mean) / self.std)
        return logits


def build(architecture: Architecture, *, seed: int, trust_code: bool = False) -> Classifier:
    """A network with fresh weights drawn from `seed`; the global random state is left alone.

    Raises ConfigError where no such architecture exists, UsageError where it would run code that
    the caller did not allow.
    """
    maker = _maker(architecture, trust_code=trust_code)
    if ":" not in architecture.arch or architecture.arch.split(":")[0] in _OWN:
        _check_size(architecture, maker)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Seeds the CPU generator alone: torch.manual_seed would reseed CUDA's as well.
        torch.default_generator.manual_seed(seed)
        return Classifier(architecture, maker())


def _check_size(architecture: Architecture, maker: Callable[[], nn.Module]) -> None:
    """Refuse a name that asks for more weights than memory holds, before any are made."""
    with torch.device("meta"):
        count = sum(weights.numel() for weights in maker().parameters())
    if count > _MOST_WEIGHTS:
        raise _unknown(architecture.arch, f"{count} weights, more than {_MOST_WEIGHTS}")


def _maker(architecture: Architecture, *, trust_code: bool) -> Callable[[], nn.Module]:
    name, shape, classes = architecture.arch, architecture.shape, architecture.classes
    family, _, rest = name.partition(":")
    if family == "mlp":
        widths = _widths(name, rest)
        return lambda: _mlp(widths, shape, classes)
    if family == "cnn":
        channels = _widths(name, rest)
        return lambda: _cnn(channels, shape, classes)
    if family == "resnet8":
        width = _widths(name, rest)[0] if rest else 16
        return lambda: residual.resnet(8, width, shape[0], classes)
    if wide := re.fullmatch(r"wrn-(\d{1,3})-(\d{1,2})", name):
        depth, factor = int(wide[1]), int(wide[2])
        if not (10 <= depth <= 100 and (depth - 4) % 6 == 0 and factor >= 1):
            raise _unknown(name, "the depth of a Wide ResNet is 6n+4: 10, 16, 22, 28, 40")
        return lambda: residual.wide_resnet(depth, factor, shape[0], classes)
    if family == "torchvision":
        return _torchvision(name, rest, shape, classes)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        return _own_code(name, shape, classes, trust_code=trust_code)
    raise _unknown(name, "there is no such architecture")


def _unknown(name: str, why: str) -> ConfigError:
    return ConfigError(f"architecture {name!r}: {why}.", remedy=f"Known: {', '.join(KNOWN)}.")


def _widths(name: str, text: str) -> list[int]:
    if not re.fullmatch(r"\d{1,5}(,\d{1,5})*", text):
        raise _unknown(name, "widths are positive whole numbers with commas between them")
    widths = [int(part) for part in text.split(",")]
    if len(widths) > _DEEPEST or not all(1 <= width <= _WIDEST for width in widths):
        raise _unknown(name, f"at most {_DEEPEST} widths, each from 1 to {_WIDEST}")
    return widths


def _mlp(widths: list[int], shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    net = nn.Sequential()
    net.add_module("flatten", nn.Flatten())
    inside = shape[0] * shape[1] * shape[2]
    for index, width in enumerate(widths, start=1):
        net.add_module(f"linear{index}", nn.Linear(inside, width))
        net.add_module(f"relu{index}", nn.ReLU())
        inside = width
    net.add_module("logits", nn.Linear(inside, classes))
    return net


def _cnn(channels: list[int], shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    net = nn.Sequential()
    inside, height, width = shape
    for index, outside in enumerate(channels, start=1):
        kernel = 5 if index == 1 else 3
        convolution = nn.Conv2d(inside, outside, kernel, stride=2, padding=kernel // 2, bias=False)
        net.add_module(f"conv{index}", convolution)
        net.add_module(f"norm{index}", nn.BatchNorm2d(outside))
        net.add_module(f"relu{index}", nn.ReLU())
        inside, height, width = outside, (height + 1) // 2, (width + 1) // 2
    net.add_module("flatten", nn.Flatten())
    net.add_module("logits", nn.Linear(inside * height * width, classes))
    return net


class _Colour(nn.Module):
    """Copies one channel into three, as a 1×1 convolution so that it exports canonically."""

    copies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("copies", torch.ones(3, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """N×1×H×W -> N×3×H×W."""
        return nn.functional.conv2d(x, self.copies)


def _torchvision(
    name: str, builder: str, shape: tuple[int, int, int], classes: int
) -> Callable[[], nn.Module]:
    from torchvision import models

    if builder not in models.list_models(module=models):
        raise _unknown(name, "torchvision has no classifier of that name")
    if shape[0] not in (1, 3):
        raise _unknown(name, f"torchvision's networks take 1 or 3 channels, not {shape[0]}")
    # These two return a tuple while training, and warn, unless told otherwise.
    auxiliary = {"aux_logits": False, "init_weights": True}
    options = auxiliary if builder in ("googlenet", "inception_v3") else {}

    def make() -> nn.Module:
        net: nn.Module = models.get_model(builder, weights=None, num_classes=classes, **options)
        return nn.Sequential(_Colour(), net) if shape[0] == 1 else net

    return make


def _own_code(
    name: str, shape: tuple[int, int, int], classes: int, *, trust_code: bool
) -> Callable[[], nn.Module]:
    if not trust_code:
        raise UsageError(
            f"architecture {name!r} would import and run code.",
            remedy="If you trust that code, say so with --trust-code.",
        )
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise _unknown(name, f"it cannot be imported ({error})") from error

    def make() -> nn.Module:
        body = factory(shape, classes)
        if not isinstance(body, nn.Module):
            raise _unknown(name, f"it returned {type(body).__name__}, not a torch module")
        return body

    return make
