"""The one loop: schedule, batches, determinism, checkpoints, interruptions."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import toys
from mlflow_kdguard import training
from mlflow_kdguard.config import Loop
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.devices import pick
from mlflow_kdguard.errors import ConfigError, DataError, NonFiniteError
from mlflow_kdguard.training import Batch, state_sha256
from mlflow_kdguard.training.batches import Batches
from runs import CPU, FAST, LEARN, Dropping, digits, entropy, fitted, noisy, train

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


# ── schedule and batches ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("steps", [4, 7, 10, 33, 270])
def test_the_schedule_is_torchs_one_cycle(steps: int) -> None:
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        sgd, max_lr=0.08, total_steps=steps, cycle_momentum=False
    )
    for step in range(steps):
        expected = sgd.param_groups[0]["lr"]
        assert training.one_cycle(step, steps, 0.08) == pytest.approx(expected, rel=1e-12)
        sgd.step()
        if step < steps - 1:
            schedule.step()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_very_short_schedule_stays_within_its_peak(steps: int) -> None:
    rates = [training.one_cycle(step, steps, 0.08) for step in range(steps)]
    assert all(0 < rate <= 0.08 for rate in rates)


def test_an_epoch_shows_every_image_once_and_each_epoch_in_another_order() -> None:
    data = digits(96)
    batches = Batches(data, FAST, seed=3, device=CPU)
    generator = torch.Generator()
    orders = []
    for epoch in range(3):
        steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
        orders.append(torch.cat([batches.draw(step, generator)[2] for step in steps]).tolist())
        assert sorted(orders[-1]) == list(range(96))
    assert orders[0] != orders[1] != orders[2] != orders[0]
    # Any step can be drawn on its own, and gives the images of its indices.
    x, y, index = batches.draw(4, torch.Generator())
    assert index.tolist() == orders[1][32:64]
    assert np.array_equal(x.numpy(), data.x[index])
    assert np.array_equal(y.numpy(), data.y[index])


def test_a_set_smaller_than_a_batch_is_one_batch() -> None:
    batches = Batches(digits(20), FAST, seed=0, device=CPU)
    assert batches.per_epoch == 1
    assert len(batches.draw(0, torch.Generator())[2]) == 20


def _shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """Zero-padded shift, pixel by pixel."""
    out = np.zeros_like(image)
    _, height, width = image.shape
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                out[:, row, column] = image[:, row - down, column - right]
    return out


@pytest.mark.parametrize("augment", ["shift", "shift-flip"])
def test_each_image_is_shifted_on_its_own_by_up_to_shift_pixels(augment: str) -> None:
    x = toys.images(4, (3, 5, 6))
    data = Dataset.of(x, np.zeros(4, int), uri="noise", classes=1)
    loop = Loop.model_validate({"batch": 4, "augment": augment, "shift": 1})
    batches, generator = Batches(data, loop, seed=0, device=CPU), torch.Generator().manual_seed(0)
    seen = set()
    for step in range(60):
        images, _, index = batches.draw(step, generator)
        for image, source in zip(images.numpy(), index.tolist(), strict=True):
            views = {
                (down, right, flip): _shifted(x[source], down, right)[:, :, :: -1 if flip else 1]
                for down in (-1, 0, 1)
                for right in (-1, 0, 1)
                for flip in ((False, True) if augment == "shift-flip" else (False,))
            }
            (match,) = [key for key, view in views.items() if np.array_equal(view, image)]
            seen.add(match)
    assert len(seen) == (18 if augment == "shift-flip" else 9)


# ── what a run computes ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("device", DEVICES)
def test_it_learns(device: str) -> None:
    net, data, place = toys.net("cnn:8,16"), digits(600), pick(device)  # type: ignore[arg-type]
    last: list[tuple[int, int]] = []

    def listen(_what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        assert {"loss", "accuracy"} <= set(figures)
        last.append((done, total))

    done = fitted(net, entropy, data=data, loop=LEARN, device=place, progress=listen)
    assert training.accuracy(net, data, device=place).rate > 0.9
    assert done.figures["accuracy"] > 0.8
    assert last[-1] == (done.steps, done.steps) == (8 * 18, 8 * 18)
    assert not any(module.training for module in net.modules())


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"weight_decay": 0.0}])
def test_it_is_nesterov_sgd_under_the_schedule(options: dict[str, float]) -> None:
    loop = Loop(epochs=2, batch=50, augment="none", **options)  # type: ignore[arg-type]
    fitted(mine := toys.mlp(), entropy, loop=loop)
    other, batches = toys.mlp().train(), Batches(digits(), loop, seed=0, device=CPU)
    momenta = [torch.zeros_like(parameter) for parameter in other.parameters()]
    for step in range(8):
        x, y, _ = batches.draw(step, torch.Generator())
        slopes = torch.autograd.grad(functional.cross_entropy(other(x), y), [*other.parameters()])
        rate = training.one_cycle(step, 8, loop.lr)
        for parameter, slope, momentum in zip(other.parameters(), slopes, momenta, strict=True):
            pull = slope + loop.weight_decay * parameter.detach()
            momentum.mul_(loop.momentum).add_(pull)
            parameter.data -= rate * (pull + loop.momentum * momentum)
    for one, two in zip(mine.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_figures_are_means_over_the_last_epoch() -> None:
    seen: list[float] = []

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        batch.figures["step"] = torch.tensor(float(batch.step))
        value = functional.cross_entropy(net(batch.x), batch.y)
        seen.append(float(value.detach()))
        return value

    done = fitted(toys.mlp(), loss, loop=Loop(epochs=3, batch=50))
    assert done.figures["loss"] == pytest.approx(np.mean(seen[-4:]), rel=1e-6)
    assert done.figures["step"] == np.mean([8, 9, 10, 11])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [toys.cnn, Dropping])
def test_same_seed_same_bits_and_the_global_generator_is_left_alone(
    make: Callable[[], nn.Module], device: str
) -> None:
    place = pick(device)  # type: ignore[arg-type]
    torch.default_generator.manual_seed(1)
    before = torch.random.get_rng_state()
    first = train(make(), device=place)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.default_generator.manual_seed(2)
    assert train(make(), device=place) == first
    assert train(make(), device=place, seed=1) != first


@pytest.mark.parametrize(
    ("device", "amp"),
    [
        ("cpu", "bfloat16"),
        pytest.param("cuda", "bfloat16", marks=pytest.mark.cuda),
        pytest.param("cuda", "float16", marks=pytest.mark.cuda),
    ],
)
def test_mixed_precision_learns_even_where_the_loss_looks_without_gradients(
    device: str, amp: str
) -> None:
    def loss(net: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():  # a cast that is cached here would have no gradient below
            net(batch.x)
        logits = net(batch.x)
        assert logits.dtype == getattr(torch, amp)
        return functional.cross_entropy(logits.float(), batch.y)

    net, data, place = toys.net("cnn:8,16"), digits(600), pick(device)  # type: ignore[arg-type]
    loop = LEARN.model_copy(update={"amp": amp, "channels_last": True})
    fitted(net, loss, data=data, loop=loop, device=place)
    assert training.accuracy(net, data, device=place).rate > 0.85
    assert next(net.parameters()).dtype == torch.float32


def test_float16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="CUDA"):
        fitted(toys.mlp(), loop=Loop(amp="float16"))


def test_channels_last_images_have_that_format() -> None:
    def loss(net: nn.Module, batch: Batch) -> Tensor:
        assert batch.x.is_contiguous(memory_format=torch.channels_last)
        return functional.cross_entropy(net(batch.x), batch.y)

    images = Dataset.of(toys.images(40, (3, 8, 8)), np.arange(40) % 10, uri="noise", classes=10)
    loop = Loop(epochs=1, channels_last=True, augment="shift-flip")
    fitted(toys.cnn(shape=(3, 8, 8)), loss, data=images, loop=loop)


def test_no_epochs_change_nothing_and_no_images_are_an_error() -> None:
    net = toys.cnn()
    before = state_sha256(net)
    assert fitted(net.train(), loop=Loop(epochs=0)).steps == 0
    assert state_sha256(net) == before
    assert not net.training
    with pytest.raises(DataError, match="no images"):
        fitted(net, data=digits(10).take([], uri="nothing"))


def test_frozen_parameters_stay() -> None:
    net = toys.cnn()
    net.body.conv1.weight.requires_grad_(False)
    before = net.body.conv1.weight.clone()
    fitted(net)
    assert torch.equal(net.body.conv1.weight, before)


@pytest.mark.parametrize("at", [0, 5, 11])
def test_a_loss_that_is_not_finite_is_an_error_that_names_the_step(at: int, tmp_path: Path) -> None:
    def loss(net: nn.Module, batch: Batch) -> Tensor:
        value = noisy(net, batch)
        return value * float("nan") if batch.step == at else value

    path = tmp_path / "checkpoint"
    with pytest.raises(NonFiniteError, match=f"toy diverged: not finite at step {at + 1} of 12"):
        fitted(
            toys.cnn(),
            loss,
            checkpoint=path,
            loop=FAST.model_copy(update={"checkpoint_seconds": 1e-9}),
        )
    if at:  # what was kept before it is still the good state
        saved = torch.load(path, weights_only=True)
        assert saved["done"] <= at
        assert all(torch.isfinite(tensor).all() for tensor in saved["net"].values())


def test_weights_that_the_last_step_ruined_are_an_error() -> None:
    class Spike(torch.autograd.Function):
        @staticmethod
        def forward(_context: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(_context: Any, *slope: Tensor) -> Tensor:  # type: ignore[override]
            return slope[0] * float("inf")

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        value = noisy(net, batch)
        return Spike.apply(value) if batch.step == batch.steps - 1 else value  # type: ignore[no-untyped-call]

    with pytest.raises(NonFiniteError, match="step 12 of 12"):
        fitted(toys.cnn(), loss)


# ── inference ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("device", DEVICES)
def test_predictions_do_not_depend_on_the_batch_and_leave_the_mode(device: str) -> None:
    place = pick(device)  # type: ignore[arg-type]
    net, x = toys.cnn().train(), toys.images(21)
    net.body.norm1.eval()
    modes = [module.training for module in net.modules()]
    before = state_sha256(net)
    whole = training.predict(net, x, device=place)
    assert whole.dtype == np.float32
    assert whole.shape == (21, 10)
    np.testing.assert_allclose(training.predict(net, x, batch=4, device=place), whole, atol=1e-5)
    assert [module.training for module in net.modules()] == modes
    assert state_sha256(net) == before


def test_accuracy_counts_labelled_images() -> None:
    net, x = toys.cnn(), toys.images(30)
    answers = training.predict(net, x, device=CPU).argmax(1)
    labels = np.where(np.arange(30) < 10, -1, np.where(np.arange(30) < 20, answers, 9 - answers))
    data = Dataset.of(x, labels, uri="toys", classes=10)
    rate = training.accuracy(net, data, device=CPU, batch=7)
    assert (rate.k, rate.n) == (10, 20)
    assert training.accuracy(net, data.unlabelled(), device=CPU).n == 0


def test_digests_of_states_see_names_types_shapes_values_and_order() -> None:
    states = [
        nn.Linear(2, 2),
        nn.Linear(2, 2).double(),
        nn.Linear(4, 1, bias=False),
        nn.Sequential(nn.Linear(2, 2)),
        nn.Linear(2, 2),
    ]
    for module in states[:4]:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
    digests = {state_sha256(module) for module in states}
    assert len(digests) == len(states)
    assert state_sha256(states[0], states[1]) != state_sha256(states[1], states[0])
    assert state_sha256(states[0], None) != state_sha256(states[0])
