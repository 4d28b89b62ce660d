"""Fine-pruning (Liu et al., RAID 2018, arXiv 1805.12185): silent channels are cut, then tuned.

Channels of the last convolution that hardly fire on clean images may be the trigger's. They are
pruned in order of their mean activation, as many as `share` says, and the rest is fine-tuned;
pruned channels stay pruned.
"""

import torch
from torch import Tensor, nn

from mlflow_kdguard.detox.clp import pairs
from mlflow_kdguard.detox.state import State, Work
from mlflow_kdguard.detox.tuning import Tuning, open_copy, options, plain, tuned
from mlflow_kdguard.errors import UsageError

NAME = "fine_prune"
OPTIONS = {"steps": 300.0, "lr": 0.02, "share": 0.3}


class _Pruned(Tuning):
    """Fine-tuning that keeps some channels silent."""

    def __init__(
        self, net: nn.Module, given: dict[str, float], norm: nn.BatchNorm2d, out: Tensor
    ) -> None:
        super().__init__(NAME, net, plain, given)
        self.norm, self.out = norm, out
        self._silence()

    def _step(self, step: int) -> None:
        super()._step(step)
        self._silence()

    def _silence(self) -> None:
        self.norm.weight.data[self.out] = 0.0
        self.norm.bias.data[self.out] = 0.0


def cleanse(state: State, work: Work) -> State:
    """Prune and fine-tune the copy."""
    given, copy = options(work, OPTIONS), open_copy(state, work)
    norms = [norm for _, norm in pairs(copy)]
    if not norms:
        raise UsageError(
            "fine_prune prunes a convolution followed by batch norm, and the network has none.",
            remedy="Take fine_prune out of detox.chain.",
        )
    fired = _activation(copy, norms[-1], state, work)
    out = fired.argsort()[: int(given["share"] * len(fired))]
    details: dict[str, object] = {"pruned": len(out), "of": len(fired)}
    return tuned(state, work, _Pruned(copy, given, norms[-1], out), details)


def _activation(net: nn.Module, norm: nn.Module, state: State, work: Work) -> Tensor:
    """Mean of each channel after its ReLU, on the clean images: C."""
    sums: list[Tensor] = []

    def note(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        sums.append(output.detach().relu().double().mean((0, 2, 3)) * len(output))

    handle = norm.register_forward_hook(note)
    try:
        with torch.no_grad():
            for start in range(0, len(state.train), 512):
                net.eval()(torch.from_numpy(state.train.x[start : start + 512]).to(work.device))
    finally:
        handle.remove()
    return torch.stack(sums).sum(0) / len(state.train)
