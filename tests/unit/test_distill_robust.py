"""ARD and RSLAD: their formulas, their inner maximisation, their gradients."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import toys
from mlflow_kdguard import distill, extensions, training
from mlflow_kdguard.config import DistillSection
from mlflow_kdguard.distill import Look
from mlflow_kdguard.training import Batch
from runs import CPU, digits, entropy

SHAPE = (1, 8, 8)
PIXELS = toys.images(8)


class Watched(nn.Module):
    """Keeps what it is asked; counts as the network inside of it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().clone())
        found: Tensor = self.body(x)
        return found


def section(loss: str, **options: Any) -> DistillSection:
    return DistillSection.model_validate({"loss": loss, "augment": "none", **options})


def value(config: DistillSection, student: nn.Module, reference: nn.Module, y: list[int]) -> Tensor:
    """The term of `config.loss` on the first images, started from seed 0."""
    batch = Batch(
        torch.from_numpy(PIXELS[: len(y)]), torch.tensor(y), torch.arange(len(y)),
        torch.Generator().manual_seed(0), step=0, steps=1,
    )  # fmt: skip
    row = extensions.load("loss", config.loss)
    term = row(config, student=student, reference=reference, features_from=reference, shape=SHAPE)
    loss: Tensor = term.value(Look(student, reference, batch))
    return loss


def logits(net: nn.Module, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return net(x).double().numpy()


def divergence(targets: np.ndarray, found: np.ndarray, temperature: float) -> float:
    """Mean over rows of KL(softmax(targets/τ) ‖ softmax(found/τ)), by its definition."""
    powers = [np.exp(z / temperature) for z in (targets, found)]
    p, q = (power / power.sum(1, keepdims=True) for power in powers)
    return float((p * np.log(p / q)).sum(1).mean())


def entropies(found: np.ndarray, y: list[int]) -> np.ndarray:
    """−log softmax(found)[y], row by row."""
    return np.asarray(np.log(np.exp(found).sum(1)) - found[range(len(y)), y])


def test_ard_without_radius_is_the_divergence_at_the_images() -> None:
    student, reference = toys.mlp(seed=1), toys.mlp(seed=2)
    x = torch.from_numpy(PIXELS[:4])
    config = section("ard", eps=0.0, temperature=30.0)
    expected = 900 * divergence(logits(reference, x), logits(student, x), 30.0)
    assert float(value(config, student, reference, [3, 1, -1, 4]).detach()) == pytest.approx(
        expected, rel=1e-3
    )


def test_ard_asks_the_student_where_its_labels_are_least_likely_and_the_reference_at_home() -> None:
    student, reference = Watched(toys.mlp(seed=1)), Watched(toys.mlp(seed=2))
    x, y = torch.from_numpy(PIXELS), [3, 1, 4, 1, 5, 9, 2, 6]
    config = section("ard", eps=0.05, pgd_steps=10, temperature=5.0)
    loss = float(value(config, student, reference, y).detach())
    (asked,), worst = reference.asked, student.asked[-1]
    assert torch.equal(asked, x)
    assert (worst - x).abs().max() <= 0.05 + 1e-6
    found = logits(student.body, worst)
    assert (entropies(found, y) > entropies(logits(student.body, x), y)).all()
    expected = 25 * divergence(logits(reference.body, x), found, 5.0)
    assert loss == pytest.approx(expected, rel=1e-3)


def test_ard_holds_unlabelled_images_against_the_class_of_the_reference() -> None:
    student, reference = toys.mlp(seed=1), toys.mlp(seed=2)
    named = logits(reference, torch.from_numpy(PIXELS)).argmax(1).tolist()
    config = section("ard", eps=0.05)
    unlabelled = value(config, student, reference, [-1] * 8)
    assert torch.equal(unlabelled, value(config, student, reference, named))
    others = [(label + 1) % 10 for label in named]
    assert not torch.equal(unlabelled, value(config, student, reference, others))


def test_ard_weighs_labels_at_the_images_by_what_alpha_leaves() -> None:
    student, reference = toys.mlp(seed=1), toys.mlp(seed=2)
    y = [3, 1, 4, 1, 5, 9, 2, 6]
    whole, half = (
        float(value(section("ard", alpha=alpha), student, reference, y).detach())
        for alpha in (1.0, 0.5)
    )
    at_home = entropies(logits(student, torch.from_numpy(PIXELS)), y).mean()
    assert half == pytest.approx(0.5 * whole + 0.5 * at_home, rel=1e-3)


def test_rslad_is_five_sixths_of_the_worse_point_and_one_sixth_of_the_image() -> None:
    student, reference = Watched(toys.mlp(seed=1)), Watched(toys.mlp(seed=2))
    x, config = torch.from_numpy(PIXELS), section("rslad", eps=0.05, pgd_steps=10)
    loss = float(value(config, student, reference, [-1] * 8).detach())
    (asked,) = reference.asked
    assert torch.equal(asked, x)
    worst = student.asked[-2]  # the last is the image itself
    assert (worst - x).abs().max() <= 0.05 + 1e-6
    targets = logits(reference.body, x)
    near, here = (divergence(targets, logits(student.body, at), 1.0) for at in (worst, x))
    assert near > here
    assert loss == pytest.approx((5 * near + here) / 6, rel=1e-3)


@pytest.mark.parametrize("loss", ["ard", "rslad", "fd"])
def test_gradients_are_slopes_of_the_loss(loss: str) -> None:
    student, reference = toys.mlp(seed=1).double(), toys.mlp(seed=2).double()
    # At given points: where the maximum is taken moves with the weights.
    config = section(loss, eps=0.0, temperature=2.0, alpha=0.7, clean_term=0.5)
    weight = student.body.logits.weight
    (slope,) = torch.autograd.grad(value(config, student, reference, [1, 2, 3, 4]), weight)
    for at in ((0, 0), (3, 7), (9, 9)):
        ends = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                weight[at] += step
            ends.append(float(value(config, student, reference, [1, 2, 3, 4]).detach()))
            with torch.no_grad():
                weight[at] -= step
        assert slope[at].item() == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("loss", ["ard", "rslad"])
def test_only_what_is_trained_on_moves_batch_statistics(loss: str) -> None:
    student, reference = toys.cnn(seed=1).train(), toys.cnn(seed=2)
    before = int(student.body.norm1.num_batches_tracked)
    value(section(loss, pgd_steps=4), student, reference, [-1] * 8)
    assert int(student.body.norm1.num_batches_tracked) == before + {"ard": 1, "rslad": 2}[loss]
    assert student.training


@pytest.mark.parametrize("loss", ["sd", "ard", "rslad", "fd"])
def test_every_loss_teaches_without_labels(loss: str) -> None:
    reference, data = toys.net("mlp:24", seed=0, settled=False), digits(600)
    loop = section("sd", epochs=10, batch=32, label_weight=0.0)
    training.fit(reference, data, entropy, loop, seed=0, device=CPU, what="toy")
    student = toys.net("mlp:24", seed=1, settled=False)
    config = section(loss, epochs=10, batch=32, eps=0.02, label_weight=0.0)
    done = distill.train(
        student, reference, data.unlabelled(), data.take([]), config=config, seed=0, device=CPU
    )
    assert training.accuracy(student, data, device=CPU).rate > 0.85
    assert done.figures["agreement"] > 0.8


def test_cross_entropy_here_is_torchs() -> None:
    found = np.random.default_rng(0).normal(size=(4, 10))
    labels = [1, 2, 3, 4]
    expected = functional.cross_entropy(
        torch.from_numpy(found), torch.tensor(labels), reduction="none"
    )
    np.testing.assert_allclose(entropies(found, labels), expected.numpy(), rtol=1e-6)
