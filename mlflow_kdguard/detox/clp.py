"""CLP (Zheng et al., ECCV 2022, arXiv 2208.03111): channels that react too strongly are cut.

Backdoors live in channels whose largest singular value, seen from the layer's input, is an outlier.
For a convolution followed by batch norm, that of output channel c is ‖W_c‖₂·|γ_c|/√(var_c + ε),
with W_c as a matrix of inputs × kernel. Channels above mean + u·deviation of their layer are
pruned: γ = β = 0. No data is used.
"""

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn

from mlflow_kdguard.detox.keep import keep
from mlflow_kdguard.detox.state import State, Work
from mlflow_kdguard.detox.tuning import options
from mlflow_kdguard.errors import UsageError

NAME = "clp"
OPTIONS = {"u": 3.0}


def cleanse(state: State, work: Work) -> State:
    """Prune the copy's outlying channels."""
    copy = deepcopy(state.copy)
    limit, pruned, layers = options(work, OPTIONS)["u"], 0, 0
    for convolution, norm in pairs(copy):
        bound = lipschitz(convolution, norm)
        out = bound > bound.mean() + limit * bound.std()
        norm.weight.data[out] = 0.0
        norm.bias.data[out] = 0.0
        pruned, layers = pruned + int(out.sum()), layers + 1
    if not layers:
        raise UsageError(
            "clp prunes convolutions followed by batch norm, and the network has none.",
            remedy="Take clp out of detox.chain.",
        )
    met = state.judge(state.preview(copy), work.device).k >= state.least
    keep(state, work, NAME, {"": copy}, "copy")
    return state.trained(
        copy, name=NAME, outcome="kept" if met else "undone", kept_at=0, steps=0,
        device=work.device, details={"pruned": pruned, "u": limit},
    )  # fmt: skip


def pairs(net: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions and the batch norm that is registered right after each."""
    before: nn.Module | None = None
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and isinstance(before, nn.Conv2d):
            yield before, module
        if not list(module.children()):
            before = module


def lipschitz(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """Largest singular value of each output channel, seen through its normalisation: C."""
    kernels = convolution.weight.detach().double().flatten(2)
    assert norm.running_var is not None
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    largest: Tensor = torch.linalg.matrix_norm(kernels, ord=2) * scale.abs()
    return largest
