"""What is added to any distillation loss so that bounds on the student's gap become tight."""

import torch
from torch import Tensor
from torch.nn import functional

from mlflow_kdguard.adversary.stability import growth, relu_stability, sizes
from mlflow_kdguard.config import DistillSection
from mlflow_kdguard.distill.look import Look
from mlflow_kdguard.nets.boxes import outputs
from mlflow_kdguard.nets.relaxed import margin_gaps


def regularisers(config: DistillSection, look: Look) -> Tensor:
    """ρg·RS(S) + γg·G + λ·Σ|w|: ReLU stability, the joint gap and small weights; 0 without weights.

    G is the mean of upper bounds on ±(a_S(x') - a_T(x')) within the ball, for margins
    a = z_k - z_j of the reference's class k to `gap_pairs` other classes j drawn anew each step: if
    all were at most D, no confidence could differ by more than tanh(D/4). ρ, γ, λ are `stability`,
    `joint_gap` and `l1`; g grows along `ramp`, as does the radius (`bound_eps`, else `eps`).
    """
    student, batch = look.student, look.batch
    grown = growth(config, batch.step, batch.steps)
    radius = (config.eps if config.bound_eps is None else config.bound_eps) * grown
    value = torch.zeros((), device=batch.x.device)
    if grown > 0 and (config.stability > 0 or config.joint_gap > 0):
        student.eval()
        if config.stability > 0:
            _, seen = outputs(student, batch.x, radius)
            value = value + config.stability * grown * relu_stability(seen)
        if config.joint_gap > 0:
            sides = margins(look, config.gap_pairs)
            bounds = margin_gaps(student, look.reference, batch.x, radius, sides)
            batch.figures["gap_bound"] = bounds.detach().mean()
            value = value + config.joint_gap * grown * bounds.mean()
        student.train()
    return value + config.l1 * sizes(student) if config.l1 > 0 else value


def margins(look: Look, pairs: int) -> Tensor:
    """Directions ±(e_k - e_j), N×2·pairs×K: k the reference's class, j drawn among the others."""
    top, classes = look.targets.argmax(1), look.targets.shape[1]
    generator = look.batch.generator
    step = torch.randint(1, classes, (len(top), pairs), generator=generator, device=top.device)
    other = functional.one_hot((top[:, None] + step) % classes, classes)
    side = (functional.one_hot(top, classes)[:, None] - other).to(look.targets.dtype)
    return torch.cat([side, -side], dim=1)
