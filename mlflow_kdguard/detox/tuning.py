"""Training of a whole copy on clean images: what fine-tuning and its relatives share.

Each such row has options of its own, under `detox.options`; their defaults stand in its OPTIONS.
"""

import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlflow_kdguard.detox.keep import keep
from mlflow_kdguard.detox.loop import drive
from mlflow_kdguard.detox.state import State, Work
from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.training.schedule import one_cycle

Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]
"""Of a network in train mode, augmented clean images, labels and a generator of the step."""


def plain(net: nn.Module, x: Tensor, y: Tensor, _: torch.Generator) -> Tensor:
    """Cross-entropy on clean images."""
    return functional.cross_entropy(net(x), y)


class Tuning:
    """SGD with Nesterov momentum and one cycle of rates, on all weights of the copy."""

    def __init__(self, name: str, net: nn.Module, loss: Loss, options: Mapping[str, float]) -> None:
        self.name, self.module, self.loss = name, net, loss
        self.steps, self.lr = int(options["steps"]), options["lr"]
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            net.parameters(), lr=self.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        self.memory: dict[str, Tensor] = {}

    def advance(self, x: Tensor, y: Tensor, step: int, generator: torch.Generator) -> Tensor:
        """One step; the network is left in evaluation mode."""
        self.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        value = self.loss(self.module, x, y, generator)
        value.backward()  # type: ignore[no-untyped-call]
        self._step(step)
        return value.detach()

    def _step(self, step: int) -> None:
        self.optimizer.param_groups[0]["lr"] = one_cycle(step, self.steps, self.lr)
        self.optimizer.step()
        self.module.eval()


def tuned(
    state: State,
    work: Work,
    routine: Tuning,
    details: dict[str, object] | None = None,
) -> State:
    """The state after the routine has trained its copy."""
    copy = routine.module
    preview = state.preview(copy)
    kept = drive(routine, state, work, lambda: state.judge(preview, work.device))
    keep(state, work, routine.name, {"": copy}, "copy")
    return state.trained(
        copy, name=routine.name, outcome=kept.outcome, kept_at=kept.at, steps=routine.steps,
        device=work.device, details=details or {},
    )  # fmt: skip


def open_copy(state: State, work: Work) -> nn.Module:
    """The copy that the chain has come to, with weights that may change."""
    return deepcopy(state.copy).to(work.device).requires_grad_(True)


def options(work: Work, known: Mapping[str, float]) -> dict[str, float]:
    """A row's options: its defaults, and what the configuration says instead."""
    return {name: work.config.options.get(name, value) for name, value in known.items()}


def check_options(rows: Mapping[str, Callable[..., Any]], given: Mapping[str, float]) -> None:
    """ConfigError for an option that no row of the chain has."""
    known: dict[str, float] = {}
    for row in rows.values():
        known |= getattr(sys.modules[row.__module__], "OPTIONS", {})
    for name in given:
        if name not in known:
            raise ConfigError(
                f"no row of the detox chain has an option {name!r}.",
                remedy=f"Their options (detox.options): {', '.join(known) or 'none'}.",
            )
