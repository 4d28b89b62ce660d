"""Unlearning of the suspect classes in a copy of the teacher.

A bank of universal perturbations δ_j with ‖δ_j‖₂ <= radius (pixels) is kept; the bank rotates over
the suspects. Each step moves one of them a step towards its class, on images of other classes,
and then trains the copy to answer as labelled with and without it:

    (1 - k)·CE(D(x), y) + k·τ²·KL(P(x)/τ ‖ D(x)/τ) + CE(D(clip(x + δ_j)), y)

with τ = 2 and k = `detox.unlearn_keep`: what the raw teacher P says of clean images saves the
copy's accuracy, and some of the backdoor too, where natural images touch the trigger (decision
108).

With `detox.unlearn_part: head` only the last layers are trained, and what comes before stays the
teacher's: the reference computes it once (`nets.trunk`). A network that is not of the zoo is
trained as a whole (decision 106).

Adversarial unlearning of implicit backdoors (I-BAU, Zeng et al., arXiv:2110.03735) inspired the
form; here it is aimed at the suspect classes only, and the bank keeps a memory of old patterns.
The copy need not stay a good classifier: `margin_cap` asks it only about the suspect classes.

It is never undone for the accuracy that it costs: a copy that did not unlearn is no guard, and
nobody would see that, where a loss of accuracy is measured again at the gate. Decision 102.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlflow_kdguard.adversary.inversion import descend, slope
from mlflow_kdguard.config import DetoxSection
from mlflow_kdguard.detox.keep import keep
from mlflow_kdguard.detox.loop import drive
from mlflow_kdguard.detox.state import State, Work
from mlflow_kdguard.detox.suspects import RADIUS
from mlflow_kdguard.errors import NonFiniteError
from mlflow_kdguard.nets.trunk import trunk
from mlflow_kdguard.training.schedule import one_cycle

NAME = "unlearn"
_REDRAWN = 0.04
"""Probability that a pattern is drawn afresh before its step."""
_START = 0.3
"""Norm of a fresh pattern as a share of the radius."""
_TEMPERATURE = 2.0
"""Of the softmax whose answers are kept."""
_STEP = 0.25
"""Step of a pattern as a share of the radius."""


class _Training:
    """SGD on the copy against the bank."""

    name = NAME

    def __init__(
        self,
        net: nn.Module,
        teacher: nn.Module,
        suspects: tuple[int, ...],
        shape: tuple[int, ...],
        config: DetoxSection,
    ) -> None:
        self._teacher = teacher
        self.steps = config.unlearn_steps
        self.module = net
        self._frozen = trunk(net) if config.unlearn_part == "head" else nn.ModuleList()
        self._frozen.requires_grad_(False)
        trained = [each for each in net.parameters() if each.requires_grad]
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            trained, lr=config.unlearn_lr, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        device = next(net.parameters()).device
        self._slots = slots(config.bank, len(suspects))
        self.memory = {"bank": torch.zeros((self._slots, *shape), device=device)}
        self._suspects, self._config = suspects, config
        told = config.unlearn_radius
        self._radius = RADIUS if told == "auto" else told

    def advance(self, x: Tensor, y: Tensor, step: int, generator: torch.Generator) -> Tensor:
        """Move one pattern, then the copy."""
        delta = self._pattern(x, y, step, generator)
        self.module.train()
        self._frozen.eval()
        self.optimizer.zero_grad(set_to_none=True)
        both = torch.cat([x, (x + delta).clamp(0.0, 1.0)])
        plain, moved = self.module(both).chunk(2)
        # Half the sum of both terms: one mean over all images, where nothing is kept.
        loss = 0.5 * (self._clean(x, y, plain) + functional.cross_entropy(moved, y))
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.param_groups[0]["lr"] = one_cycle(step, self.steps, self._config.unlearn_lr)
        self.optimizer.step()
        self.module.eval()
        return loss.detach()

    def _clean(self, x: Tensor, y: Tensor, logits: Tensor) -> Tensor:
        """Labels and the raw teacher's answers, on images without a pattern."""
        keep, loss = self._config.unlearn_keep, functional.cross_entropy(logits, y)
        if keep == 0.0:
            return loss
        with torch.no_grad():
            told = (self._teacher(x) / _TEMPERATURE).log_softmax(1)
        own = (logits / _TEMPERATURE).log_softmax(1)
        apart = functional.kl_div(own, told, reduction="batchmean", log_target=True)
        return (1.0 - keep) * loss + keep * _TEMPERATURE**2 * apart

    def _pattern(self, x: Tensor, y: Tensor, step: int, generator: torch.Generator) -> Tensor:
        bank, slot = self.memory["bank"], step % self._slots
        target, radius = self._suspects[slot % len(self._suspects)], self._radius
        fresh = torch.randn(bank.shape[1:], generator=generator).to(bank.device)
        afresh = float(torch.rand((), generator=generator)) < _REDRAWN
        if step < self._slots or afresh:
            bank[slot] = fresh * (_START * radius / fresh.norm())
        others = x[y != target]
        if len(others):
            labels = torch.full((len(others),), target, device=bank.device)
            self.module.eval()
            try:
                gradient = slope(self.module, others, labels, bank[slot : slot + 1])[0]
            except NonFiniteError as error:
                raise NonFiniteError(
                    f"{NAME} diverged: not finite by step {step + 1} of {self.steps}.",
                    remedy="Lower its learning rate (detox.unlearn_lr).",
                ) from error
            bank[slot] = descend(bank[slot], gradient, step=_STEP * radius, radius=radius)
        return bank[slot].clone()


def slots(bank: int, suspects: int) -> int:
    """Patterns kept: the smallest multiple of the number of suspects that is at least `bank`."""
    return -(-bank // suspects) * suspects


def cleanse(state: State, work: Work) -> State:
    """Train the copy until universal perturbations no longer reach the suspect classes."""
    copy = deepcopy(state.copy).to(work.device).requires_grad_(True)
    training = _Training(copy, state.teacher, state.suspects, state.train.shape, work.config)
    preview = state.preview(copy)
    kept = drive(training, state, work, lambda: state.judge(preview, work.device), undo=False)
    keep(state, work, NAME, {"": copy}, "copy")
    norms = training.memory["bank"].flatten(1).norm(dim=1)
    return state.trained(
        copy,
        name=NAME,
        outcome=kept.outcome,
        kept_at=kept.at,
        steps=training.steps,
        device=work.device,
        details={"bank_norms": [round(float(norm), 6) for norm in norms]},
    )
