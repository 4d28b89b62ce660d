"""Unlearning: its bank of perturbations, and that it removes a planted backdoor."""

import numpy as np
import pytest
import torch

import toys
from mlflow_kdguard import detox
from mlflow_kdguard.adversary.madry import madry
from mlflow_kdguard.config import DetoxSection, Loop
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.detox.unlearn import _Training, slots
from mlflow_kdguard.nets.zoo import Classifier
from mlflow_kdguard.training import accuracy, fit, predict
from mlflow_kdguard.triggers import Trigger

CPU = torch.device("cpu")
TARGET = 4


def patch() -> Trigger:
    mask = np.zeros((1, 8, 8), np.float32)
    mask[:, 6:, :2] = 1.0
    return Trigger(name="patch", kind="blend", mask=mask, pattern=np.ones((1, 8, 8), np.float32))


@pytest.fixture(scope="module")
def poisoned() -> tuple[Classifier, Dataset, Dataset]:
    """A net that sends patched digits to class 4, clean images, and test images."""
    x, y = toys.digits(1300)
    triggered = patch().apply(x[:50])
    train = Dataset.of(
        np.concatenate([x[:700], triggered]), np.concatenate([y[:700], np.full(50, TARGET)]),
        uri="poisoned", classes=10,
    )  # fmt: skip
    net = toys.net("cnn:8,16", settled=False)
    loop = Loop(epochs=8, batch=64, lr=0.1, augment="none")
    fit(net, train, madry(eps=0.0, steps=0), loop, seed=0, device=CPU, what="teacher")
    clean = Dataset.of(x[700:1000], y[700:1000], uri="clean", classes=10)
    return net, clean, Dataset.of(x[1000:], y[1000:], uri="test", classes=10)


def success(net: torch.nn.Module, data: Dataset) -> float:
    others = data.x[data.y != TARGET]
    return float((predict(net, patch().apply(others), device=CPU).argmax(1) == TARGET).mean())


def test_the_chain_removes_a_planted_backdoor(
    poisoned: tuple[Classifier, Dataset, Dataset],
) -> None:
    net, clean, test = poisoned
    raw, attacked = accuracy(net, test, device=CPU).rate, success(net, test)
    assert attacked > 0.9
    config = DetoxSection(
        unlearn_steps=160, unlearn_radius=1.2, mask_steps=60, batch=64, max_drop=0.1, bank=2
    )
    done = detox.cleanse(net, clean, suspects=(TARGET,), config=config, seed=0, device=CPU)
    assert success(done.reference, test) < 0.1
    assert accuracy(done.reference, test, device=CPU).rate > raw - 0.1
    assert success(net, test) == attacked  # the teacher itself is untouched


def test_slots_are_shared_evenly_by_the_suspects() -> None:
    assert [slots(4, count) for count in (1, 2, 3, 4, 5)] == [4, 4, 6, 4, 5]
    for bank in range(1, 9):
        for suspects in range(1, 9):
            size = slots(bank, suspects)
            assert bank <= size < bank + suspects
            assert size % suspects == 0


def test_patterns_rotate_over_the_suspects_and_stay_in_the_ball() -> None:
    x, y = (torch.from_numpy(each) for each in toys.digits(64))
    config = DetoxSection(bank=4, unlearn_radius=0.9, unlearn_steps=6)
    training = _Training(toys.cnn(), toys.cnn(), (2, 7), (1, 8, 8), config)
    bank = training.memory["bank"]
    for step in range(6):
        before = bank.clone()
        training.advance(x, y, step, torch.Generator().manual_seed(step))
        moved = [bool((row != old).any()) for row, old in zip(bank, before, strict=True)]
        assert moved == [slot == step % 4 for slot in range(4)]
        assert bank.flatten(1).norm(dim=1).max() <= 0.9 + 1e-5


def test_a_pattern_moves_towards_its_own_suspect() -> None:
    """Even slots belong to the first suspect, odd ones to the second."""
    x, y = (torch.from_numpy(each) for each in toys.digits(200))
    net = toys.cnn().eval()
    training = _Training(net, net, (2, 7), (1, 8, 8), DetoxSection(bank=2, unlearn_radius=0.9))

    def towards(delta: torch.Tensor, target: int) -> float:
        images = (x[y != target] + delta).clamp(0, 1)
        with torch.no_grad():
            return float(-net(images).log_softmax(1)[:, target].mean())

    for step in range(20):
        training._pattern(x, y, step, torch.Generator().manual_seed(1))
    for delta, target in zip(training.memory["bank"], (2, 7), strict=True):
        assert towards(delta, target) < towards(torch.zeros_like(delta), target) - 0.03


def test_a_batch_of_the_suspect_alone_does_not_stop_it() -> None:
    x, _ = toys.digits(16)
    training = _Training(toys.cnn(), toys.cnn(), (3,), (1, 8, 8), DetoxSection(unlearn_steps=2))
    loss = training.advance(
        torch.from_numpy(x), torch.full((16,), 3), 0, torch.Generator().manual_seed(0)
    )
    assert torch.isfinite(loss)


def test_what_is_kept_is_the_teachers_answer_to_clean_images() -> None:
    """All of it: the clean term is nothing where the copy says what the teacher says, whatever the
    labels; none of it: it is their cross-entropy."""
    x, y = (torch.from_numpy(each) for each in toys.digits(64))
    net, wrong = toys.cnn().eval(), (y + 1) % 10
    for keep, expected in ((1.0, 0.0), (0.0, None)):
        config = DetoxSection(unlearn_keep=keep)
        training = _Training(net, net, (2,), (1, 8, 8), config)
        loss = float(training._clean(x, wrong, net(x)).detach())
        told = float(torch.nn.functional.cross_entropy(net(x), wrong).detach())
        assert loss == pytest.approx(told if expected is None else expected, abs=1e-5)
    between = _Training(net, net, (2,), (1, 8, 8), DetoxSection(unlearn_keep=0.75))
    assert float(between._clean(x, wrong, net(x)).detach()) == pytest.approx(0.25 * told, abs=1e-5)
