"""Losses on logits: SD (Hinton et al., arXiv 1503.02531) and FD (arXiv 2306.04431).

KL is summed over classes and averaged over the batch (the reference code of ARD and RSLAD divides
by the number of classes, too). Cross-entropy counts labelled images only.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlflow_kdguard.adversary.pgd import ascend
from mlflow_kdguard.config import DistillSection
from mlflow_kdguard.distill.look import Look, Term, as_float


def sd(
    config: DistillSection,
    *,
    student: nn.Module,
    reference: nn.Module,
    features_from: nn.Module,
    shape: tuple[int, int, int],
) -> Term:
    """Standard distillation: (1-α)·CE(S(x), y) + α·τ²·KL(T(x)/τ ‖ S(x)/τ)."""

    def value(look: Look) -> Tensor:
        look.report_agreement(look.logits, look.targets)
        loss = config.alpha * softened(look.targets, look.logits, config.temperature).mean()
        return look.with_labels(loss, config.alpha)

    return Term(value)


def fd(
    config: DistillSection,
    *,
    student: nn.Module,
    reference: nn.Module,
    features_from: nn.Module,
    shape: tuple[int, int, int],
) -> Term:
    """Faithful distillation, the objective of AdaAD (CVPR 2023):

    (1-α)·CE(S(x), y) + α·τ²·KL(T(x*)/τ ‖ S(x*)/τ) + clean_term·τ²·KL(T(x)/τ ‖ S(x)/τ), where x*
    maximises KL(T(x') ‖ S(x')) within l_inf `eps`, through both networks, in `pgd_steps` steps
    from a random start. x* is sought with the student in evaluation mode, so that only what is
    trained on moves its batch statistics.
    """

    def value(look: Look) -> Tensor:
        x = _furthest(look, config)
        with torch.no_grad():
            targets = as_float(reference(x))
        logits = as_float(look.student(x))
        look.report_agreement(logits, targets)
        loss = config.alpha * softened(targets, logits, config.temperature).mean()
        if config.clean_term > 0:
            clean = softened(look.targets, look.logits, config.temperature).mean()
            loss = loss + config.clean_term * clean
        return look.with_labels(loss, config.alpha)

    return Term(value)


def softened(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """τ²·KL(softmax(targets/τ) ‖ softmax(logits/τ)) of every row, N."""
    log_target = functional.log_softmax(targets / temperature, dim=1)
    log_student = functional.log_softmax(logits / temperature, dim=1)
    divergence = functional.kl_div(log_student, log_target, reduction="none", log_target=True)
    return divergence.sum(1) * temperature**2


def _furthest(look: Look, config: DistillSection) -> Tensor:
    """x*: where student and reference disagree most near each image of the batch."""

    def objective(near: Tensor) -> Tensor:
        targets, logits = as_float(look.reference(near)), as_float(look.student(near))
        return softened(targets, logits, config.temperature)

    return worst(look, config, objective)


def worst(look: Look, config: DistillSection, objective: Callable[[Tensor], Tensor]) -> Tensor:
    """The end of `pgd_steps` ascents of `objective` (images -> N scores) from a random start.

    The student is in evaluation mode meanwhile. Without radius or steps: the images themselves.
    """
    if config.eps == 0 or config.pgd_steps == 0:
        return look.batch.x
    look.student.eval()
    found = ascend(
        objective,
        look.batch.x,
        eps=config.eps,
        steps=config.pgd_steps,
        start="random",
        generator=look.batch.generator,
        last=True,
    )
    look.student.train()
    return found
