"""Distillation: the losses are their formulas, the reference is left alone, students learn."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import toys
from mlflow_kdguard import distill, extensions, training
from mlflow_kdguard.config import DistillSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.devices import pick
from mlflow_kdguard.distill import Look
from mlflow_kdguard.distill import logits as rows
from mlflow_kdguard.errors import ConfigError, ModelError
from mlflow_kdguard.training import Batch, fit, state_sha256
from runs import CPU, digits, entropy

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
SHAPE = (1, 8, 8)


def section(**options: Any) -> DistillSection:
    return DistillSection.model_validate({"batch": 32, "augment": "none", "epochs": 1, **options})


def look(student: nn.Module, reference: nn.Module, y: list[int], **options: Any) -> Look:
    x = torch.from_numpy(toys.images(len(y)))
    generator = torch.Generator().manual_seed(0)
    batch = Batch(x, torch.tensor(y), torch.arange(len(y)), generator, step=0, steps=1)
    return Look(student, reference, batch, **options)


def value(config: DistillSection, student: nn.Module, reference: nn.Module, y: list[int]) -> float:
    row = extensions.load("loss", config.loss)
    term = row(config, student=student, reference=reference, features_from=reference, shape=SHAPE)
    return float(term.value(look(student, reference, y)).detach())


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) / temperature)
    return np.asarray(powers / powers.sum(1, keepdims=True))


def divergence(targets: np.ndarray, logits: np.ndarray, temperature: float) -> np.ndarray:
    """KL(T ‖ S) row by row, by its definition."""
    p, q = softmax(targets, temperature), softmax(logits, temperature)
    return np.asarray((p * (np.log(p) - np.log(q))).sum(1))


def outputs(net: nn.Module, n: int) -> np.ndarray:
    return training.predict(net, toys.images(n), device=CPU)


def outputs_at(net: nn.Module, x: Tensor) -> np.ndarray:
    return training.predict(net, x.numpy(), device=CPU)


def taught(seed: int = 0, arch: str = "mlp:24") -> nn.Module:
    """A small network that knows the digits."""
    net = toys.net(arch, seed=seed, settled=False)
    loop = section(epochs=10, batch=32)
    fit(net, digits(600), entropy, loop, seed=0, device=CPU, what="toy")
    return net  # type: ignore[no-any-return]


# ── formulas ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_softened_divergence_is_its_definition(temperature: float) -> None:
    targets, logits = np.random.default_rng(0).normal(size=(2, 9, 5)).astype(np.float32) * 3
    found = rows.softened(torch.from_numpy(targets), torch.from_numpy(logits), temperature)
    expected = temperature**2 * divergence(targets, logits, temperature)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)
    assert found.min() >= 0
    assert rows.softened(torch.from_numpy(targets), torch.from_numpy(targets), 2.0).max() < 1e-6


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("y", [[3, 1, 4, 1], [3, -1, -1, 1], [-1, -1, -1, -1]])
def test_sd_is_its_formula(alpha: float, y: list[int]) -> None:
    student, reference = toys.mlp(seed=1), toys.mlp(seed=2)
    config = section(loss="sd", alpha=alpha, temperature=4.0)
    logits, targets = outputs(student, 4), outputs(reference, 4)
    entropies = [
        -math.log(softmax(logits, 1.0)[i, label]) for i, label in enumerate(y) if label >= 0
    ]
    expected = (1 - alpha) * sum(entropies) / 4 + alpha * 16 * divergence(
        targets, logits, 4.0
    ).mean()
    assert value(config, student, reference, y) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("clean_term", [0.0, 0.7])
def test_fd_without_steps_is_the_divergence_at_the_images(clean_term: float) -> None:
    student, reference = toys.mlp(seed=1), toys.mlp(seed=2)
    config = section(loss="fd", pgd_steps=0, clean_term=clean_term, alpha=0.8)
    logits, targets = outputs(student, 4), outputs(reference, 4)
    entropies = [-math.log(softmax(logits, 1.0)[0, 3])]
    gap = divergence(targets, logits, 1.0).mean()
    expected = 0.2 * sum(entropies) / 4 + (0.8 + clean_term) * gap
    assert value(config, student, reference, [3, -1, -1, -1]) == pytest.approx(expected, rel=1e-4)


def test_fd_asks_both_networks_at_one_worse_point_within_eps() -> None:
    student, asked = toys.cnn(seed=1), []

    class Asked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = toys.mlp(seed=2)

        def forward(self, x: Tensor) -> Tensor:
            asked.append(x.detach().clone())
            return self.body(x)

    config = section(loss="fd", clean_term=0, eps=0.05, pgd_steps=10)
    look_at = look(student, reference := Asked(), [-1] * 8)
    term = rows.fd(
        config, student=student, reference=reference, features_from=reference, shape=SHAPE
    )
    loss = term.value(look_at)
    x, worst = look_at.batch.x, asked[-1]
    assert len(asked) == 11  # ten gradients through the reference, and its answer at x*
    assert (worst - x).abs().max() <= 0.05 + 1e-6
    assert worst.min() >= 0
    assert worst.max() <= 1
    # Written out at that point, and larger than at the images themselves.
    here, near = (
        divergence(outputs_at(reference, at), outputs_at(student, at), 1.0) for at in (x, worst)
    )
    assert (near > here).all()
    student.train()
    assert student(worst).requires_grad
    assert float(loss.detach()) > here.mean()


@pytest.mark.parametrize(("clean_term", "passes"), [(0.0, 1), (1.0, 2)])
def test_only_images_that_are_trained_on_move_batch_statistics(
    clean_term: float, passes: int
) -> None:
    student, reference = toys.cnn(seed=1).train(), toys.cnn(seed=2)
    before = int(student.body.norm1.num_batches_tracked)
    config = section(loss="fd", clean_term=clean_term, pgd_steps=4)
    value(config, student, reference, [-1] * 8)
    assert int(student.body.norm1.num_batches_tracked) == before + passes
    assert student.training


def test_adaad_is_fd() -> None:
    assert extensions.load("loss", "adaad") is extensions.load("loss", "fd")


# ── train ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        {"loss": "sd", "temperature": 4.0, "alpha": 0.9},
        {"loss": "fd"},
        {"loss": "fd", "amp": "bfloat16"},
    ],
)
def test_a_student_learns_from_a_reference_without_labels(
    options: dict[str, Any], device: str
) -> None:
    place = pick(device)  # type: ignore[arg-type]
    reference, data = taught().train(), digits(600)
    before = state_sha256(reference)
    student = toys.net("mlp:24", seed=1, settled=False)
    config = section(epochs=10, batch=32, **options)
    done = distill.train(
        student, reference, data.unlabelled(), data.take([]), config=config, seed=0, device=place
    )
    assert done.figures["agreement"] > 0.85
    assert training.accuracy(student, data, device=place).rate > 0.85
    assert state_sha256(reference.cpu()) == before
    assert reference.training  # its mode is given back
    assert all(parameter.grad is None for parameter in reference.parameters())
    assert not student.training


@pytest.mark.slow
def test_fd_students_are_nearer_to_the_reference_under_attack_than_sd_students() -> None:
    reference, data = taught(), digits(600)
    gaps = {}
    for loss in ("sd", "fd"):
        student = toys.net("mlp:24", seed=5, settled=False)
        config = section(epochs=15, batch=32, loss=loss, eps=0.1, pgd_steps=5)
        distill.train(
            student, reference, data.unlabelled(), data.take([]), config=config, seed=0, device=CPU
        )
        probe = section(loss="fd", eps=0.1, pgd_steps=20, clean_term=0.0)
        gaps[loss] = value(probe, student.eval(), reference, [-1] * 64)
    assert gaps["fd"] < 0.7 * gaps["sd"]


def test_labels_of_the_clean_set_count_and_unlabelled_images_have_none() -> None:
    class Flat(nn.Module):
        """A reference that knows nothing."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), 10)

    data = digits(600)
    transfer, clean = data.take(range(500)).unlabelled(), data.take(range(500, 600))

    def accuracy(label_weight: float) -> float:
        student = toys.net("mlp:24", settled=False)
        config = section(epochs=8, batch=32, loss="sd", label_weight=label_weight)
        distill.train(student, Flat(), transfer, clean, config=config, seed=0, device=CPU)
        return training.accuracy(student, clean, device=CPU).rate

    assert accuracy(2.0) > 0.8
    assert accuracy(0.0) < 0.4


def test_it_is_deterministic_and_bound_to_its_reference(tmp_path: Path) -> None:
    data, path = digits(96), tmp_path / "checkpoint"
    transfer, clean = data.take(range(64)).unlabelled(), data.take(range(64, 96))

    def student(reference: int, checkpoint: Path | None = None) -> tuple[str, int]:
        net = toys.cnn(seed=3)
        done = distill.train(
            net,
            toys.cnn(seed=reference),
            transfer,
            clean,
            config=section(feature="ofd"),
            seed=0,
            device=CPU,
            checkpoint=checkpoint,
        )
        return state_sha256(net), done.resumed_at

    first = student(1)
    assert student(1, path) == first
    assert student(1, path) == (first[0], 3)  # finished: nothing is trained again
    other, resumed_at = student(2, path)
    assert resumed_at == 0
    assert other != first[0]


@pytest.mark.parametrize(
    ("broken", "options", "message"),
    [
        ("student", {"classes": 7}, "student names 7 classes and the reference 10"),
        ("reference", {"shape": (3, 8, 8)}, r"reference does not take images of shape \(1, 8, 8\)"),
        ("student", {"shape": (1, 9, 9), "arch": "mlp:5"}, "student does not take"),
    ],
)
def test_networks_that_do_not_fit_are_named(
    broken: str, options: dict[str, Any], message: str
) -> None:
    nets = {"student": toys.mlp(), "reference": toys.mlp(), broken: toys.net(**options)}
    data = digits(20)
    with pytest.raises(ModelError, match=message):
        distill.train(
            nets["student"], nets["reference"], data, data, config=section(), seed=0, device=CPU
        )


def test_an_unknown_loss_is_a_configuration_error() -> None:
    data = digits(20)
    with pytest.raises(ConfigError, match="no loss called 'magic'"):
        distill.train(
            toys.mlp(), toys.mlp(), data, data, config=section(loss="magic"), seed=0, device=CPU
        )


def test_data_sets_of_other_images_cannot_be_mixed() -> None:
    other = Dataset.of(toys.images(4, (1, 9, 9)), None, uri="larger", classes=0)
    with pytest.raises(Exception, match="larger"):
        distill.train(
            toys.mlp(), toys.mlp(), digits(4), other, config=section(), seed=0, device=CPU
        )
