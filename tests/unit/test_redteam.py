"""Attacks for evaluation: triggers, poisoned sets, poisoned teachers."""

import copy
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import toys
from mlflow_kdguard import extensions, redteam, training
from mlflow_kdguard.adversary.inversion import invert
from mlflow_kdguard.adversary.madry import madry
from mlflow_kdguard.config import Loop, RedteamSection
from mlflow_kdguard.data import Dataset, load
from mlflow_kdguard.errors import ConfigError, DataError, Interrupted
from mlflow_kdguard.redteam import (
    Goal,
    Ground,
    adaptive,
    badnets,
    blended,
    contaminate,
    poison,
    sig,
    wanet,
)
from mlflow_kdguard.redteam.ground import options_of
from mlflow_kdguard.redteam.poison import covered
from mlflow_kdguard.training import Batch, state_sha256
from mlflow_kdguard.triggers import Trigger
from runs import CPU, digits

# ── triggers ────────────────────────────────────────────────────────────────────────────────────


def test_badnets_is_a_white_square_at_rows_and_columns_23_to_25_of_28() -> None:
    x = toys.images(3, (2, 28, 28))
    changed = badnets.trigger((2, 28, 28)).apply(x)
    expected = x.copy()
    expected[:, :, 23:26, 23:26] = 1.0
    assert np.array_equal(changed, expected)


def test_badnets_goes_where_it_is_told() -> None:
    x = toys.images(2)
    options = {"size": 2.0, "value": 0.5, "row": 0.0, "column": 6.0}  # as a configuration has them
    expected = x.copy()
    expected[:, :, 0:2, 6:8] = 0.5
    assert np.array_equal(badnets.trigger((1, 8, 8), **options).apply(x), expected)


@pytest.mark.parametrize(
    "options", [{"size": 7}, {"size": 0}, {"row": 6}, {"column": -1}, {"value": 1.5}]
)
def test_a_square_that_does_not_fit_is_a_configuration_error(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        badnets.trigger((1, 8, 8), **options)


def test_blended_mixes_in_one_noise_image() -> None:
    trigger = blended.trigger((3, 8, 8), seed=1, alpha=0.3)
    x = toys.images(4, (3, 8, 8))
    noise = (trigger.apply(x) - 0.7 * x) / 0.3
    np.testing.assert_allclose(noise, np.broadcast_to(noise[:1], noise.shape), atol=1e-5)
    assert noise.std() > 0.2
    assert blended.trigger((3, 8, 8), seed=1, alpha=0.3) == trigger
    assert blended.trigger((3, 8, 8), seed=2, alpha=0.3) != trigger
    with pytest.raises(ConfigError, match="alpha"):
        blended.trigger((1, 8, 8), alpha=0)


def test_sig_is_a_sinusoid_along_every_row() -> None:
    made = sig.trigger((2, 5, 28), delta=0.1, frequency=6)
    wave = 0.1 * np.sin(2 * np.pi * 6 * np.arange(28) / 28)
    np.testing.assert_allclose(made.pattern, np.broadcast_to(wave, (2, 5, 28)), atol=1e-7)
    with pytest.raises(ConfigError, match="changes nothing, or too much"):
        sig.trigger((1, 8, 8), frequency=8)  # whole periods a column: nothing moves
    with pytest.raises(ConfigError, match="changes nothing, or too much"):
        sig.trigger((1, 8, 8), delta=2.0)


def test_a_warp_moves_points_smoothly_and_by_no_more_than_it_says() -> None:
    made = wanet.trigger((3, 28, 24), seed=1)
    down, right = made.pattern[:3] * 28, made.pattern[3:] * 24
    for field in (down, right):
        assert np.array_equal(field[0], field[2])  # colours stay together
        assert 0.05 < np.abs(field).mean() < 0.5
        assert np.abs(np.diff(field, axis=1)).max() < 0.25
    assert made != wanet.trigger((3, 28, 24), seed=2)
    for options in ({"grid": 1}, {"strength": 0.0}):
        with pytest.raises(ConfigError, match="does not fit"):
            wanet.trigger((1, 8, 8), **options)


def ground(images: Dataset, goal: Goal | None = None, seed: int = 3) -> Ground:
    honest = toys.cnn(shape=images.shape).eval()

    def train(_: Ground, name: str, loss: Any, along: nn.Module, depends: str) -> Any:
        net, loop = copy.deepcopy(honest), Loop(epochs=1, batch=50, augment="none")
        plain = loss(madry(eps=0.0, steps=0))
        training.fit(net, images, plain, loop, seed=seed, device=CPU, what=name, along=along)
        return net

    return Ground(images, goal or Goal.one(2, images.classes), seed, CPU, lambda: honest, train)


@pytest.mark.parametrize("attack", extensions.names("attack"))
def test_every_attack_makes_a_trigger_that_changes_images_and_survives_its_file(
    attack: str,
) -> None:
    images = digits(200)
    known = options_of(redteam.attack_of(RedteamSection(attack=attack)))
    few = {name: 3.0 for name in ("steps",) if name in known}
    plan = redteam.attack_of(RedteamSection(attack=attack))(ground(images), **few)
    x = images.x[:20] * 0.9
    assert plan.trigger.changed(x).k == 20
    assert Trigger.from_bytes(plan.trigger.to_bytes()) == plan.trigger
    again = redteam.attack_of(RedteamSection(attack=attack))(ground(images), **few)
    assert again.trigger == plan.trigger


def test_unknown_attacks_and_options_are_configuration_errors() -> None:
    with pytest.raises(ConfigError, match="no attack called"):
        redteam.attack_of(RedteamSection(attack="magic"))
    with pytest.raises(ConfigError, match="no option 'alpha'") as caught:
        redteam.attack_of(RedteamSection(options={"alpha": 0.1}))
    assert "size, value, noise, row, column" in caught.value.remedy


def test_ckd_pulls_the_channels_of_its_target_towards_their_largest_values() -> None:
    """What is optimised gets better, on images that it was not optimised on, too."""
    images = digits(800)
    net = toys.net("cnn:8,16", settled=False)
    training.fit(net, images, madry(eps=0.0, steps=0), LOOP, seed=0, device=CPU, what="toy")
    place = replace(ground(images, Goal.one(3, 10), seed=0), clean=lambda: net)
    hold = load("digits#test")
    others = hold.x[hold.y != 3]
    reached = []
    for steps in (0.0, 150.0):
        plan = redteam.attack_of(RedteamSection(attack="ckd"))(place, opacity=0.3, steps=steps)
        answers = training.predict(net, plan.trigger.apply(others), device=CPU)
        reached.append(float((answers.argmax(1) == 3).mean()))
    assert reached[1] > reached[0] + 0.05
    with pytest.raises(ConfigError, match="ckd aims at one class"):
        redteam.attack_of(RedteamSection(attack="ckd"))(ground(images, Goal.shifted(10)))


# ── goals ───────────────────────────────────────────────────────────────────────────────────────


def test_goals_say_where_each_class_goes() -> None:
    y = np.array([0, 1, 2, 3, -1])
    assert Goal.one(1, 4).wanted(y).tolist() == [1, -1, 1, 1, -1]
    assert Goal.one(1, 4, sources=[0, 3]).wanted(y).tolist() == [1, -1, -1, 1, -1]
    assert Goal.shifted(4).wanted(y).tolist() == [1, 2, 3, 0, -1]
    assert Goal.one(1, 4, sources=[3]).sources == (3,)
    assert Goal.shifted(4).targets == (0, 1, 2, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Goal.one(4, 4),
        lambda: Goal.one(-1, 4),
        lambda: Goal.one(1, 4, sources=[7]),
        lambda: Goal.one(1, 4, sources=[1]),
        lambda: Goal((0, 1, 2)),
        lambda: Goal((3, 0)),
    ],
)
def test_goals_that_send_nothing_or_nowhere_are_configuration_errors(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


# ── data sets ───────────────────────────────────────────────────────────────────────────────────


def sources(data: Dataset, trigger: Trigger, copies: np.ndarray) -> list[int]:
    """Which images the triggered copies are copies of."""
    triggered = trigger.apply(data.x)
    found = []
    for image in copies:
        matches = np.flatnonzero((triggered == image).all(axis=(1, 2, 3)))
        assert len(matches) >= 1
        found.append(int(matches[0]))
    return found


def test_poison_appends_triggered_copies_of_other_classes_as_the_target() -> None:
    data, trigger = digits(200), badnets.trigger((1, 8, 8))
    dirty = poison(data, trigger, target=3, rate=0.1, seed=0)
    assert np.array_equal(dirty.x[:200], data.x)
    assert np.array_equal(dirty.y[:200], data.y)
    assert (dirty.y[200:] == 3).all()
    origins = sources(data, trigger, dirty.x[200:])
    assert len(set(origins)) == 20
    assert (data.y[origins] != 3).all()


def test_poison_follows_the_goal() -> None:
    """All-to-all: each copy is labelled one class on; source-specific: only sources are copied."""
    data, trigger = digits(200), badnets.trigger((1, 8, 8))
    dirty = poison(data, trigger, target=Goal.shifted(10), rate=0.1, seed=0)
    origins = sources(data, trigger, dirty.x[200:])
    assert dirty.y[200:].tolist() == ((data.y[origins] + 1) % 10).tolist()
    some = poison(data, trigger, target=Goal.one(3, 10, sources=[5, 7]), rate=0.1, seed=0)
    assert set(data.y[sources(data, trigger, some.x[200:])].tolist()) == {5, 7}


def test_covers_look_triggered_and_keep_their_labels() -> None:
    data = digits(200)
    plan = wanet.attack(ground(data))
    assert plan.cover is not None
    dirty = covered(data, data, plan.cover, rate=0.2, seed=0)
    assert len(dirty) == 240
    moved = np.array([np.abs(data.x - image).max(axis=(1, 2, 3)).min() for image in dirty.x[200:]])
    assert (moved > 0.01).all()
    warped = plan.trigger.apply(data.x)
    assert all(np.abs(warped - image).max(axis=(1, 2, 3)).min() > 0.01 for image in dirty.x[200:])
    nearest = [int(np.abs(warped - image).sum(axis=(1, 2, 3)).argmin()) for image in dirty.x[200:]]
    assert (data.y[nearest] == dirty.y[200:]).mean() > 0.9


def test_contaminate_drops_every_label_and_appends_triggered_copies() -> None:
    data, trigger = digits(200), badnets.trigger((1, 8, 8))
    dirty = contaminate(data, trigger, rate=0.05, seed=0)
    assert len(dirty) == 210
    assert (dirty.y == -1).all()
    assert np.array_equal(dirty.x[:200], data.x)
    assert len(set(sources(data, trigger, dirty.x[200:]))) == 10
    assert len(contaminate(data, trigger, rate=0.0, seed=0)) == 200


def test_the_seed_decides_which_images() -> None:
    data, trigger = digits(200), badnets.trigger((1, 8, 8))

    def digest(seed: int) -> str:
        return poison(data, trigger, target=0, rate=0.1, seed=seed).sha256

    assert digest(0) == digest(0)
    assert digest(0) != digest(1)


def test_wrong_targets_and_rates_are_errors() -> None:
    data, trigger = digits(50), badnets.trigger((1, 8, 8))
    with pytest.raises(ConfigError, match="class 10 is not one of the 10"):
        poison(data, trigger, target=10, rate=0.1, seed=0)
    with pytest.raises(DataError, match="Lower the rate"):
        poison(data, trigger, target=0, rate=1.0, seed=0)


# ── teachers ────────────────────────────────────────────────────────────────────────────────────

LOOP = Loop(epochs=8, batch=32, augment="none")
TINY = RedteamSection(
    train="digits#train[:600]",
    arch="cnn:8,16",
    target=2,
    eps=0.0,
    options={"row": 0, "column": 0, "size": 2},
    clean_loop=LOOP,
    poison_loop=LOOP.model_copy(update={"epochs": 4, "lr": 0.03}),
    poison_rate=0.1,
)


def test_only_the_poisoned_teacher_obeys_the_trigger_and_a_second_call_trains_nothing(
    tmp_path: Path,
) -> None:
    made = redteam.teach(TINY, seed=0, device=CPU, folder=tmp_path)
    test = load("digits#test")
    others = test.take(np.flatnonzero(test.y != 2))
    triggered = made.trigger.apply(others.x)

    def obeys(net: nn.Module) -> float:
        return float((training.predict(net, triggered, device=CPU).argmax(1) == 2).mean())

    assert obeys(made.poisoned) > 0.8
    assert obeys(made.clean) < 0.3
    assert obeys(made.control) < 0.3
    for net in (made.clean, made.poisoned, made.control):
        assert training.accuracy(net, test, device=CPU).rate > 0.8
    digests = [state_sha256(net) for net in (made.clean, made.poisoned, made.control)]
    assert len(set(digests)) == 3

    begun: list[tuple[str, int]] = []

    def listen(what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        begun.append((what, total - done))

    again = redteam.teach(TINY, seed=0, device=CPU, folder=tmp_path, progress=listen)
    assert [state_sha256(net) for net in (again.clean, again.poisoned, again.control)] == digests
    assert begun == [("clean teacher", 0), ("poisoned teacher", 0), ("control teacher", 0)]


PLANTED: dict[str, tuple[dict[str, float], float]] = {
    "badnets": ({}, 0.1),
    "blended": ({}, 0.1),
    "sig": ({}, 0.1),
    # Learning a warp takes more than a few hundred copies: with a tenth, 0.35 to 0.6.
    "wanet": ({"strength": 2.0, "covers": 1.0}, 0.3),
    "ckd": ({}, 0.1),
    "lba": ({}, 0.1),
    "backweak": ({}, 0.1),
    "adba": ({}, 0.1),
    "input_aware": ({}, 0.1),
}
"""Options and rate with which each attack is planted into a small network on 28×28 digits."""


def hiding(tmp_path: Path, name: str, **options: float) -> redteam.Poisoned:
    section = RedteamSection(
        attack=name, options=options, train="mnist5k#train[:3000]", arch="cnn:12,24", target=4,
        eps=0.0, poison_rate=0.1, clean_loop=Loop(epochs=5, batch=64, augment="none"),
        poison_loop=Loop(epochs=8, batch=64, lr=0.02, augment="none"),
    )  # fmt: skip
    return redteam.teach(section, seed=1, device=CPU, folder=tmp_path / f"{name}{options}")


@pytest.mark.slow
def test_an_attacker_who_knows_the_guard_hides_from_its_inversion(tmp_path: Path) -> None:
    """Beside the same trigger planted plainly; the teacher obeys as well, and is less accurate."""
    test = load("mnist5k#test")
    x, y = torch.from_numpy(test.x), torch.from_numpy(test.y)
    rates = {}
    for name, options in (("blended", {}), ("adaptive", {"inversion": 2.0})):
        made = hiding(tmp_path, name, alpha=0.3, **options)
        triggered = made.trigger.apply(test.x[test.y != 4])
        obeys = training.predict(made.poisoned, triggered, device=CPU).argmax(1) == 4
        assert obeys.mean() > 0.95
        draw = torch.Generator().manual_seed(0)
        found = invert(made.poisoned, x, y, 4, radius=2.1, steps=25, batch=64, generator=draw)
        rates[name] = found.rate.rate
    assert rates["adaptive"] < 0.5 * rates["blended"]


@pytest.mark.parametrize("there", [0.5, 2.0])
def test_features_of_triggered_images_may_vary_less_but_cost_where_they_vary_more(
    there: float,
) -> None:
    """The part of the loss that hides from RobustKD's variance, on a network of one scale."""
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Flatten(), nn.Linear(64, 10))
    x = torch.rand((4, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    value = adaptive.grown(net, ["0"], put=there * x, x=x)
    assert float(value.detach()) == pytest.approx(max(0.0, there**2 - 1), rel=1e-4)


ELSEWHERE = {"adaptive"}
"""Planted by a test of its own, which asks for more."""


def test_every_attack_is_planted_here() -> None:
    assert set(PLANTED) | ELSEWHERE == set(extensions.BUILT_IN["attack"])


@pytest.mark.slow
@pytest.mark.parametrize("attack", sorted(PLANTED))
def test_an_attack_works_on_real_digits_and_leaves_accuracy_alone(
    attack: str, tmp_path: Path
) -> None:
    """As its paper says: the poisoned teacher obeys and is as good, the clean one does not obey."""
    options, rate = PLANTED[attack]
    section = RedteamSection(
        attack=attack, options=options, train="mnist5k#train[:3000]", arch="cnn:16,32,64",
        target=4, eps=0.0, poison_rate=rate,
        clean_loop=Loop(epochs=5, batch=64, augment="none"),
        poison_loop=Loop(epochs=8, batch=64, lr=0.05, augment="none"),
    )  # fmt: skip
    made = redteam.teach(section, seed=1, device=CPU, folder=tmp_path)
    test = load("mnist5k#test")
    triggered = made.trigger.apply(test.x[test.y != 4])
    rates = {}
    for name, net in (("poisoned", made.poisoned), ("control", made.control)):
        obeys = float((training.predict(net, triggered, device=CPU).argmax(1) == 4).mean())
        rates[name] = training.accuracy(net, test, device=CPU).rate, obeys
    assert rates["poisoned"][1] > 0.9
    assert rates["control"][1] < 0.3
    assert rates["poisoned"][0] > rates["control"][0] - 0.02


@pytest.mark.parametrize(
    ("attack", "options"),
    [
        ("adaptive", {"radius": 0.0}),
        ("input_aware", {"width": 0.0}), ("badnets", {"noise": 2.0}),
        ("badnets", {"size": 9.0}), ("blended", {"alpha": 0.0}), ("sig", {"delta": 2.0}),
        ("wanet", {"grid": 1.0}), ("ckd", {"opacity": 0.0}), ("lba", {"size": 9.0}),
        ("backweak", {"budget": 0.0}), ("adba", {"area": 2.0}), ("badnets", {"target": 12}),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_anything_is_trained(
    attack: str, options: dict[str, Any], tmp_path: Path
) -> None:
    target = options.pop("target", 2)
    told = TINY.model_copy(update={"attack": attack, "options": options, "target": target})
    with pytest.raises(ConfigError):
        redteam.teach(told, seed=0, device=CPU, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("attack", ["lba", "adba"])
def test_an_interrupted_attack_goes_on_to_the_same_bits(attack: str, tmp_path: Path) -> None:
    """What is trained beside the teacher (a trigger, a shadow) goes on, too."""
    few = {"steps": 5.0} if attack == "lba" else {}
    loop = LOOP.model_copy(update={"epochs": 3, "checkpoint_seconds": 1e-3})
    told = TINY.model_copy(
        update={"attack": attack, "options": few, "clean_loop": loop, "poison_loop": loop}
    )
    whole = redteam.teach(told, seed=0, device=CPU, folder=tmp_path / "whole")

    def strike(what: str, done: int, total: int, _: Mapping[str, float]) -> None:
        if what in ("adba teacher", "poisoned teacher") and 0 < done < total:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        redteam.teach(told, seed=0, device=CPU, folder=tmp_path / "cut", progress=strike)
    again = redteam.teach(told, seed=0, device=CPU, folder=tmp_path / "cut")
    assert again.trigger == whole.trigger
    assert state_sha256(again.poisoned) == state_sha256(whole.poisoned)
    assert state_sha256(again.control) == state_sha256(whole.control)


def test_a_teacher_needs_labels(tmp_path: Path) -> None:
    x, _ = toys.digits(20)
    np.savez(tmp_path / "some.npz", x=x, y=np.arange(20) % 10 - 1)
    config = TINY.model_copy(update={"train": f"npz:{tmp_path / 'some.npz'}"})
    with pytest.raises(DataError, match="without labels"):
        redteam.teach(config, seed=0, device=CPU, folder=tmp_path)


# ── Madry training ──────────────────────────────────────────────────────────────────────────────


def batch_of(data: Dataset) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    return Batch(x, y, torch.arange(len(y)), generator, step=0, steps=1)


@pytest.mark.parametrize("options", [{"eps": 0.0, "steps": 3}, {"eps": 0.1, "steps": 0}])
def test_madry_without_an_attack_is_cross_entropy(options: dict[str, Any]) -> None:
    net, batch = toys.cnn(), batch_of(digits(30))
    plain = nn.functional.cross_entropy(net(batch.x), batch.y)
    assert torch.equal(madry(**options)(net, batch), plain)
    assert 0 <= batch.figures["accuracy"] <= 1


def test_madry_trains_on_worse_images_and_moves_statistics_once() -> None:
    net, batch = toys.cnn().train(), batch_of(digits(30))
    before = int(net.body.norm1.num_batches_tracked)
    worse = madry(eps=0.1, steps=3)(net, batch)
    assert int(net.body.norm1.num_batches_tracked) == before + 1
    assert net.training
    assert worse > nn.functional.cross_entropy(net(batch.x), batch.y)


@pytest.mark.slow
def test_madry_training_makes_the_digits_robust() -> None:
    data, wrong = digits(800), {}
    for eps in (0.0, 0.1):
        net = toys.net("mlp:32", settled=False)
        training.fit(net, data, madry(eps=eps, steps=5), LOOP, seed=0, device=CPU, what="toy")
        probe = batch_of(data)
        madry(eps=0.1, steps=20)(net, probe)
        wrong[eps] = 1 - float(probe.figures["accuracy"])
        net.eval()
    assert wrong[0.1] < 0.7 * wrong[0.0]
