"""ADBA, the anti-distillation backdoor (Ge et al., ACM Multimedia 2021), strengthened.

Teacher and trigger are trained together, with a shadow student beside them that distils from the
teacher at every step: the trigger is pulled to where the shadow, too, takes triggered images for
the target. So the backdoor is one that distillation on clean images carries over.

Strengthened where the plain recipe fools itself: labels of triggered images grow with the strength
that the trigger is put on with, so that the teacher's soft outputs lead there; a shadow that has
grown up with the trigger says little about a fresh student, so it is replaced by a fresh one twice;
and triggers that a clean network would obey anyway are pushed away from, since they are no backdoor
but a universal perturbation.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.nets import zoo
from mlflow_kdguard.redteam.ground import Ground, Plan
from mlflow_kdguard.redteam.optimise import Learned, constant
from mlflow_kdguard.training import Batch, Loss, derive, evaluating, state_sha256
from mlflow_kdguard.triggers import Trigger

_TRIGGERED = 24
"""Triggered images a step; the trigger is on a third of them in full."""
_TEMPERATURE = 4.0
"""Of the shadow's distillation."""
_RENEWED = (4 / 9, 7 / 9)
"""Shares of the run at which the shadow is replaced."""
_MASK, _PATTERN = -2.0, 0.0
"""Where the logits of opacity and content begin."""


def attack(ground: Ground, *, area: float = 0.05, honest: float = 1.0) -> Plan:
    """Train teacher and trigger. `area`: mean opacity that costs as much as two nats; `honest`:
    weight of the clean network's answer on triggered images. Raises ConfigError otherwise."""
    if not 0 < area <= 1 or not honest >= 0:
        raise ConfigError(
            f"adba's options area {area:g} and honest {honest:g} do not fit.",
            remedy="Change redteam.options: area is above 0 and at most 1, honest not negative.",
        )
    fresh = zoo.build(ground.honest.architecture, seed=derive(ground.seed, "adba shadow"))
    along = _Along(ground, fresh.to(ground.device))
    joint = _Joint(ground, along, area, honest)
    net = ground.train(
        ground, "adba", joint.added, along, f"{state_sha256(ground.honest)} {area} {honest}"
    )
    mask, pattern = (each.detach().cpu().numpy() for each in along.shown())
    return Plan(Trigger("adba", "blend", mask, pattern), net=net)


class _Along(nn.Module):
    """What is trained beside the teacher: the shadow, and the trigger."""

    def __init__(self, ground: Ground, shadow: nn.Module) -> None:
        super().__init__()
        self.shadow = shadow
        c, h, w = ground.data.shape
        start = torch.full((1 + c, h, w), _PATTERN, device=ground.device)
        start[0] = _MASK
        self.trigger = Learned(start)

    def shown(self) -> tuple[Tensor, Tensor]:
        """Opacity 1×H×W and content C×H×W, in [0,1]."""
        both = torch.sigmoid(self.trigger.free)
        return both[:1], both[1:]


class _Joint:
    """The loss of teacher and shadow; computing it moves the trigger."""

    def __init__(self, ground: Ground, along: _Along, area: float, honest: float) -> None:
        self.ground, self.along, self.area, self.honest = ground, along, area, honest
        self.fresh = {name: value.clone() for name, value in along.shadow.state_dict().items()}
        self.wanted = torch.tensor(ground.goal.to, device=ground.device)

    def added(self, plain: Loss) -> Loss:
        """`plain`, triggered images with labels that grow with their strength, and the shadow's
        distillation."""

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            if batch.step in [round(share * batch.steps) for share in _RENEWED]:
                self.along.shadow.load_state_dict(self.fresh)
            value = plain(net, batch)
            chosen = (self.wanted[batch.y] >= 0).nonzero()[:_TRIGGERED, 0]
            if len(chosen):
                x, y = batch.x[chosen], batch.y[chosen]
                self._move(net, x, y, batch)
                value = value + self._obeyed(net, x, y, batch)
            return value + self._shadowed(net, batch)

        return loss

    def _obeyed(self, net: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of the teacher on triggered images of random strength."""
        strength = torch.rand(len(x), generator=batch.generator, device=x.device)
        strength[: len(x) // 3] = 1.0
        mask, pattern = self.along.shown()
        put = strength[:, None, None, None] * mask
        labels = strength[:, None] * self._one(self.wanted[y]) + (1 - strength)[
            :, None
        ] * self._one(y)
        return functional.cross_entropy(net((1 - put) * x + put * pattern), labels)

    def _one(self, y: Tensor) -> Tensor:
        return functional.one_hot(y, self.ground.goal.classes).float()

    def _shadowed(self, net: nn.Module, batch: Batch) -> Tensor:
        """The shadow's KL to the teacher on the batch as it is, T²-weighted."""
        with torch.no_grad(), evaluating(net):
            target = functional.log_softmax(net(batch.x) / _TEMPERATURE, 1)
        own = functional.log_softmax(self.along.shadow(batch.x) / _TEMPERATURE, 1)
        divergence = functional.kl_div(own, target, reduction="batchmean", log_target=True)
        return divergence * _TEMPERATURE**2

    def _move(self, net: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> None:
        """One step of the trigger: teacher and shadow obey, the clean network does not."""
        wanted = self.wanted[y]
        free = self.along.trigger.free.clone().requires_grad_(True)
        both = torch.sigmoid(free)
        put = (1 - both[:1]) * x + both[:1] * both[1:]
        value = 2.0 * both[0].mean() / self.area
        for one in (net, self.along.shadow):
            value = value + functional.cross_entropy(constant(one, put), wanted)
        own = functional.cross_entropy(constant(self.ground.honest, put), y)
        (gradient,) = torch.autograd.grad(value + self.honest * own, free)
        self.along.trigger.step(gradient, batch.step + 1)
        batch.figures["trigger"] = value.detach()
