"""One run between two steps: what a step does, and everything that the next one depends on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mlflow_kdguard.config import Loop
from mlflow_kdguard.errors import NonFiniteError
from mlflow_kdguard.training.batches import Batches, derive
from mlflow_kdguard.training.schedule import rate

_AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Batch:
    """What a loss is given at one step.

    `x` N×C×H×W pixels in [0,1], augmented; `y` N labels, -1 where unlabelled; `index` N rows of
    the data set. `generator` is the only source of randomness that survives a resume. A loss may
    put 0-d tensors into `figures`; their means over the epoch are reported.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    generator: torch.Generator
    step: int
    steps: int
    figures: dict[str, Tensor] = field(default_factory=dict)


Loss = Callable[[nn.Module, Batch], Tensor]
"""Called with the net in train mode; returns the 0-d loss that is minimised."""


class Run:
    """The state of one run between two steps."""

    def __init__(
        self,
        net: nn.Module,
        along: nn.Module | None,
        batches: Batches,
        loop: Loop,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self._net = net.to(device)
        if loop.channels_last:
            self._net.to(memory_format=torch.channels_last)
        self._along = nn.Module() if along is None else along.to(device)
        self._batches, self._loop, self._seed, self._device = batches, loop, seed, device
        self.steps, self.done = loop.epochs * batches.per_epoch, 0
        parameters = [*self._net.parameters(), *self._along.parameters()]
        self._sgd = torch.optim.SGD(
            [parameter for parameter in parameters if parameter.requires_grad],
            lr=loop.lr,
            momentum=loop.momentum,
            nesterov=loop.momentum > 0,
            weight_decay=loop.weight_decay,
            fused=True,
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=loop.amp == "float16")
        self._generator = torch.Generator(device).manual_seed(derive(seed, "steps"))
        self._sums: dict[str, Tensor] = {}
        self._bad = torch.full((), -1, dtype=torch.int64, device=device)

    def advance(self, loss: Loss) -> None:
        """One step."""
        if self.done % self._batches.per_epoch == 0:
            self._sums = {}
        self._seed_layers()
        x, y, index = self._batches.draw(self.done, self._generator)
        batch = Batch(x, y, index, self._generator, self.done, self.steps)
        self._net.train()
        self._along.train()
        self._sgd.zero_grad(set_to_none=True)
        # No cache of casts: one made under no_grad would cut the weights off from the gradient.
        with torch.autocast(
            self._device.type,
            _AMP.get(self._loop.amp),
            enabled=self._loop.amp != "off",
            cache_enabled=False,
        ):
            value = loss(self._net, batch)
        self._scaler.scale(value).backward()  # type: ignore[no-untyped-call]
        self._sgd.param_groups[0]["lr"] = rate(self.done, self.steps, self._loop)
        self._scaler.step(self._sgd)
        self._scaler.update()
        self._account({"loss": value, **batch.figures})
        self.done += 1

    def _seed_layers(self) -> None:
        """Layers that draw from torch's global generators (dropout) draw by step, too."""
        seed = derive(self._seed, "layers", self.done)
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _account(self, figures: dict[str, Tensor]) -> None:
        """Sum figures where they are: reading them every step would stall an accelerator."""
        for name, figure in figures.items():
            value = figure.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        fine = torch.isfinite(figures["loss"].detach()) | (self._bad >= 0)
        self._bad = torch.where(fine, self._bad, self.done)

    def figures(self) -> dict[str, float]:
        """Means over the steps of the current epoch."""
        count = (self.done - 1) % self._batches.per_epoch + 1
        return {name: float(total) / count for name, total in self._sums.items()}

    def check(self, what: str, *, weights: bool = False) -> None:
        """NonFiniteError where a loss so far, or a weight now, is NaN or infinite."""
        bad = int(self._bad)
        if bad < 0 and weights:
            state = self._net.state_dict().values()
            if not all(bool(torch.isfinite(tensor).all()) for tensor in state):
                bad = self.done - 1
        if bad >= 0:
            raise NonFiniteError(
                f"{what} diverged: not finite at step {bad + 1} of {self.steps}.",
                remedy="Lower the learning rate (lr), or switch amp off.",
            )

    def free(self) -> None:
        """Let go of the gradients."""
        self._sgd.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "done": self.done,
            "net": self._net.state_dict(),
            "along": self._along.state_dict(),
            "sgd": self._sgd.state_dict(),
            "scaler": self._scaler.state_dict(),
            "generator": self._generator.get_state(),
            "sums": {name: float(total) for name, total in self._sums.items()},
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from `state()` of a run with the same fingerprint."""
        if state is None:
            return
        self.done = state["done"]
        self._net.load_state_dict(state["net"])
        self._along.load_state_dict(state["along"])
        self._sgd.load_state_dict(state["sgd"])
        self._scaler.load_state_dict(state["scaler"])
        self._generator.set_state(state["generator"])
        self._sums = {
            name: torch.tensor(total, dtype=torch.float64, device=self._device)
            for name, total in state["sums"].items()
        }
