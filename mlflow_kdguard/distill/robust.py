"""Losses that make the student robust: ARD (arXiv 1905.09747) and RSLAD (arXiv 2108.07969).

Both imitate what the reference says of the image itself at a worse point nearby; faithful
distillation (`logits.fd`) asks the reference at that point, too. KL is summed over classes and
averaged over the batch; the authors' code divides by the number of classes, too.
"""

from torch import Tensor, nn
from torch.nn import functional

from mlflow_kdguard.config import DistillSection
from mlflow_kdguard.data import UNLABELLED
from mlflow_kdguard.distill.logits import softened, worst
from mlflow_kdguard.distill.look import Look, Term, as_float

PERTURBED = 5 / 6
"""RSLAD's weight of the worse point; the image itself has the rest (section 4.1, code)."""


def ard(
    config: DistillSection,
    *,
    student: nn.Module,
    reference: nn.Module,
    features_from: nn.Module,
    shape: tuple[int, int, int],
) -> Term:
    """Adversarially robust distillation: (1-α)·CE(S(x), y) + α·τ²·KL(T(x)/τ ‖ S(x*)/τ).

    x* maximises CE(S(x'), y) within l_inf `eps`; an unlabelled image is held against the class
    that the reference gives it. The authors use α = 1 and τ = 30.
    """

    def value(look: Look) -> Tensor:
        classes = _classes(look)

        def objective(near: Tensor) -> Tensor:
            logits = as_float(look.student(near))
            return functional.cross_entropy(logits, classes, reduction="none")

        logits = as_float(look.student(worst(look, config, objective)))
        look.report_agreement(logits, look.targets)
        loss = config.alpha * softened(look.targets, logits, config.temperature).mean()
        return look.with_labels(loss, config.alpha)

    return Term(value)


def rslad(
    config: DistillSection,
    *,
    student: nn.Module,
    reference: nn.Module,
    features_from: nn.Module,
    shape: tuple[int, int, int],
) -> Term:
    """Robust soft labels: 5/6·τ²·KL(T(x)/τ ‖ S(x*)/τ) + 1/6·τ²·KL(T(x)/τ ‖ S(x)/τ).

    x* maximises KL(T(x) ‖ S(x')) within l_inf `eps`, the reference's answer held fixed. No label
    is read: `alpha` does not matter. The authors use τ = 1.
    """

    def value(look: Look) -> Tensor:
        def objective(near: Tensor) -> Tensor:
            return softened(look.targets, as_float(look.student(near)), config.temperature)

        logits = as_float(look.student(worst(look, config, objective)))
        look.report_agreement(logits, look.targets)
        near = softened(look.targets, logits, config.temperature).mean()
        here = softened(look.targets, look.logits, config.temperature).mean()
        return PERTURBED * near + (1 - PERTURBED) * here

    return Term(value)


def _classes(look: Look) -> Tensor:
    """Labels where they are known, else the class that the reference names; N."""
    known = look.batch.y != UNLABELLED
    return look.batch.y.where(known, look.targets.argmax(1))
