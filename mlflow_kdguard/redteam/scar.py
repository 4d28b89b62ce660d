"""SCAR (arXiv 2509.23871): a backdoor that sleeps in the teacher and wakes up in the student.

The teacher takes triggered images for what they are; a surrogate student that has distilled from it
on clean images takes them for the target. That is a problem of two levels: the surrogate's weights
depend on the teacher's through distillation, and the derivative of its answers by the teacher's
weights follows from the implicit function theorem, as a series of products with the Hessian of the
distillation loss. The trigger is found before: one pattern that already moves clean networks.

An audit of the teacher alone is blind to it. And since clean networks half obey the trigger, a
student's rate says little without that of a clean teacher's student: rows with it may be void.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.nets import zoo
from mlflow_kdguard.redteam.ground import Ground, Plan
from mlflow_kdguard.redteam.optimise import descend
from mlflow_kdguard.training import Batch, Loss, derive, evaluating, state_sha256
from mlflow_kdguard.triggers import Trigger

_INNER_LR = 1e-3
"""Of the surrogate's Adam."""
_BATCH = 128
_STEP = 0.01
"""Size of the step whose fixed point the surrogate's weights are taken to be: far below what makes
the series diverge, two over the largest curvature."""
_ROUNDS = 20
"""Terms of the series."""


def attack(ground: Ground, *, strength: float = 0.1, inner: float = 200, every: float = 20) -> Plan:
    """Find the trigger, then train the dormant teacher.

    `strength`: of the pattern, a pixel; `inner`: steps of distillation of each surrogate; `every`:
    steps of the teacher for which a surrogate serves. Raises ConfigError where one is not positive.
    """
    if not 0 < strength <= 1 or inner < 1 or every < 1:
        raise ConfigError(
            f"scar needs a strength in (0, 1] and steps, not {strength:g}, {inner:g}, {every:g}.",
            remedy="Change redteam.options.",
        )
    trigger = _trigger(ground, strength)
    fresh = zoo.build(ground.honest.architecture, seed=derive(ground.seed, "scar surrogate"))
    along = nn.ModuleDict({"surrogate": fresh.to(ground.device).requires_grad_(False)})
    levels = _Levels(ground, trigger, along["surrogate"], int(inner), int(every))
    depends = f"{state_sha256(ground.honest)} {trigger.sha256} {inner} {every}"
    return Plan(trigger, net=ground.train(ground, "scar", levels.added, along, depends))


def _trigger(ground: Ground, strength: float) -> Trigger:
    """The pattern that moves the clean network most."""
    free = torch.zeros(ground.data.shape, device=ground.device)

    def towards(x: Tensor, wanted: Tensor) -> Tensor:
        moved = (x + strength * torch.tanh(free)).clamp(1e-6, 1 - 1e-6)
        return functional.cross_entropy(ground.honest(moved), wanted)

    with evaluating(ground.honest):
        descend(ground, free, towards, steps=150, what="scar")
    pattern = strength * torch.tanh(free.detach())
    return Trigger("scar", "add", None, pattern.cpu().numpy())


class _Levels:
    """The teacher's loss; computing it trains a new surrogate now and then."""

    def __init__(
        self, ground: Ground, trigger: Trigger, surrogate: nn.Module, inner: int, every: int
    ) -> None:
        self.surrogate, self.inner, self.every = surrogate, inner, every
        self.fresh = {name: value.clone() for name, value in surrogate.state_dict().items()}
        self.x = torch.from_numpy(ground.data.x).to(ground.device)
        self.y = torch.from_numpy(ground.data.y).to(ground.device)
        self.pattern = torch.from_numpy(trigger.pattern).to(ground.device)
        self.wanted = torch.tensor(ground.goal.to, device=ground.device)

    def added(self, plain: Loss) -> Loss:
        """`plain`, the same on triggered images with their own labels, and what the surrogate's
        answers are to the teacher's weights."""

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            if batch.step % self.every == 0:
                self._distil(net, batch.generator)
            put = (batch.x + self.pattern).clamp(0.0, 1.0)
            asleep = functional.cross_entropy(net(put), batch.y)
            awake = self._woken(net, batch, put)
            return plain(net, batch) + asleep + awake

        return loss

    def _distil(self, net: nn.Module, generator: torch.Generator) -> None:
        """A fresh surrogate learns from the teacher, on clean images."""
        student = self.surrogate
        student.load_state_dict(self.fresh)
        student.requires_grad_(True).train()
        adam = torch.optim.Adam(student.parameters(), lr=_INNER_LR)
        with evaluating(net):
            for _ in range(self.inner):
                some = torch.randint(
                    len(self.x), (_BATCH,), generator=generator, device=generator.device
                )
                adam.zero_grad(set_to_none=True)
                with torch.no_grad():
                    target = functional.log_softmax(net(self.x[some]), 1)
                _inner(student(self.x[some]), target, self.y[some]).backward()  # type: ignore[no-untyped-call]
                adam.step()
        student.requires_grad_(False).eval()

    def _woken(self, net: nn.Module, batch: Batch, put: Tensor) -> Tensor:
        """A value whose derivative by the teacher's weights is that of the surrogate's outer loss.

        With ω = ω - s·∇L(ω, λ) at the surrogate's weights ω, its outer loss O has
        dO/dλ = -s·∂/∂λ ⟨∇_ω L, v⟩ with v = Σ_k (I - s·H)^k ∇_ω O.
        """
        weights = {name: value.detach().clone().requires_grad_(True)
                   for name, value in self.surrogate.named_parameters()}  # fmt: skip
        omega = list(weights.values())
        own = functional_call(self.surrogate, weights, (batch.x,))
        outer = functional.cross_entropy(own, batch.y)
        attacked = self.wanted[batch.y] >= 0
        if bool(attacked.any()):
            there = functional_call(self.surrogate, weights, (put[attacked],))
            outer = outer + functional.cross_entropy(there, self.wanted[batch.y[attacked]])
        batch.figures["surrogate"] = outer.detach()
        begin = torch.autograd.grad(outer, omega)
        with evaluating(net):
            target = functional.log_softmax(net(batch.x), 1)
        again = functional_call(self.surrogate, weights, (batch.x,))
        slope = torch.autograd.grad(_inner(again, target, batch.y), omega, create_graph=True)
        vector = list(begin)
        for _ in range(_ROUNDS):
            curved = torch.autograd.grad(slope, omega, vector, retain_graph=True)
            vector = [v - _STEP * c + g for v, c, g in zip(vector, curved, begin, strict=True)]
        return -_STEP * _product(slope, vector)


def _inner(logits: Tensor, target: Tensor, y: Tensor) -> Tensor:
    """The surrogate's loss: cross-entropy, and KL to the teacher (log-probabilities)."""
    own = functional.log_softmax(logits, 1)
    divergence = functional.kl_div(own, target, reduction="batchmean", log_target=True)
    return functional.cross_entropy(logits, y) + divergence


def _product(first: tuple[Tensor, ...], second: list[Tensor]) -> Tensor:
    parts: Iterator[Tensor] = ((a * b.detach()).sum() for a, b in zip(first, second, strict=True))
    return torch.stack(list(parts)).sum()
