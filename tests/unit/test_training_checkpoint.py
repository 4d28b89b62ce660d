"""Checkpoints: resumed to the bit, never those of another run, never executed."""

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import toys
from mlflow_kdguard import training
from mlflow_kdguard.config import Loop
from mlflow_kdguard.devices import pick
from mlflow_kdguard.errors import Interrupted, UsageError
from mlflow_kdguard.training import Batch, state_sha256
from runs import FAST, Dropping, digits, fitted, noisy, train

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


# ── checkpoints ─────────────────────────────────────────────────────────────────────────────────


def interrupted(at: int, loss: training.Loss = noisy) -> training.Loss:
    """A loss during which SIGTERM arrives, once."""

    def stopping(net: nn.Module, batch: Batch) -> Tensor:
        if batch.step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(net, batch)

    return stopping


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [toys.cnn, Dropping])
@pytest.mark.parametrize("options", [{}, {"augment": "shift-flip", "amp": "bfloat16"}])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    make: Callable[[], nn.Module], options: dict[str, str], device: str, tmp_path: Path
) -> None:
    loop = Loop.model_validate({"epochs": 2, "batch": 32, **options})
    same: dict[str, Any] = {"loop": loop, "device": pick(device)}  # type: ignore[arg-type]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    undisturbed = fitted(whole := make(), **same)
    path = tmp_path / "checkpoint"
    for at in (2, 7):
        with pytest.raises(Interrupted, match=f"after {at + 1} of 12 steps") as caught:
            fitted(make(), interrupted(at), checkpoint=path, **same)
        assert caught.value.exit_code == 130
        assert str(path) in caught.value.remedy
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    resumed = fitted(net := make(), checkpoint=path, **same)
    assert resumed.resumed_at == 8
    assert resumed.figures == undisturbed.figures
    assert state_sha256(net) == state_sha256(whole)
    # Finished is finished: nothing is trained again.
    assert fitted(again := make(), checkpoint=path, **same).resumed_at == 12
    assert state_sha256(again) == state_sha256(whole)


def test_ctrl_c_raised_within_a_step_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    def loss(net: nn.Module, batch: Batch) -> Tensor:
        if batch.step == 5:
            raise KeyboardInterrupt
        return noisy(net, batch)

    path = tmp_path / "checkpoint"
    often = FAST.model_copy(update={"checkpoint_seconds": 1e-9})
    with pytest.raises(Interrupted, match="goes on from"):
        fitted(toys.cnn(), loss, checkpoint=path, loop=often)
    net = toys.cnn()
    assert fitted(net, checkpoint=path).resumed_at == 5
    assert state_sha256(net) == train()


def test_an_interruption_without_a_place_for_checkpoints_says_so() -> None:
    with pytest.raises(Interrupted, match="Nothing was kept"):
        fitted(toys.cnn(), interrupted(1))


def test_what_is_trained_along_is_kept_too(tmp_path: Path) -> None:
    def along() -> nn.Module:
        extra = nn.Linear(10, 10)
        nn.init.eye_(extra.weight)
        nn.init.zeros_(extra.bias)
        extra.register_buffer("calls", torch.zeros(()))
        return extra

    def through(extra: nn.Module) -> training.Loss:
        def loss(net: nn.Module, batch: Batch) -> Tensor:
            extra.get_buffer("calls").add_(1)
            return functional.cross_entropy(extra(net(batch.x)), batch.y)

        return loss

    fitted(net := toys.mlp(), through(whole := along()), along=whole)
    assert not torch.equal(whole.get_parameter("weight"), torch.eye(10))
    path = tmp_path / "checkpoint"
    with pytest.raises(Interrupted):
        fitted(toys.mlp(), interrupted(6, through(part := along())), along=part, checkpoint=path)
    fitted(again := toys.mlp(), through(rest := along()), along=rest, checkpoint=path)
    assert state_sha256(again, rest) == state_sha256(net, whole)
    assert rest.get_buffer("calls") == 12


OTHERS: dict[str, dict[str, Any]] = {
    "seed": {"seed": 1},
    "loop": {"loop": FAST.model_copy(update={"lr": 0.01})},
    "data": {"data": digits(199)},
    "labels": {"data": digits().unlabelled()},
    "what": {"what": "another toy"},
    "depends": {"depends": "another teacher"},
}


@pytest.mark.parametrize("other", [*OTHERS, "weights", "architecture"])
def test_a_checkpoint_of_another_run_is_never_resumed(
    other: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "checkpoint"
    fitted(toys.cnn(), checkpoint=path)
    nets = {"weights": toys.cnn(seed=1), "architecture": toys.mlp()}
    with caplog.at_level(logging.WARNING):
        done = fitted(
            nets.get(other, toys.cnn()), ignoring, checkpoint=path, **OTHERS.get(other, {})
        )
    assert done.resumed_at == 0
    assert str(path) in caplog.text


def ignoring(net: nn.Module, batch: Batch) -> Tensor:
    """A loss that takes unlabelled images."""
    return functional.cross_entropy(net(batch.x), batch.y.clamp_min(0))


def test_how_often_checkpoints_are_written_does_not_matter_for_resuming(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    fitted(toys.cnn(), checkpoint=path)
    seldom = FAST.model_copy(update={"checkpoint_seconds": 99.0})
    assert fitted(toys.cnn(), checkpoint=path, loop=seldom).resumed_at == 12


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("damage", ["truncated", "payload", "noise", "list"])
def test_a_damaged_checkpoint_is_not_resumed_and_runs_nothing(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, proof = tmp_path / "checkpoint", tmp_path / "executed"
    fitted(toys.cnn(), checkpoint=path)
    whole = path.read_bytes()
    if damage == "payload":
        torch.save({"fingerprint": "", "net": Payload(proof)}, path)
    elif damage == "list":
        torch.save([1, 2], path)
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"noise" * 99)
    with caplog.at_level(logging.WARNING):
        assert fitted(toys.cnn(), checkpoint=path).resumed_at == 0
    assert "starting over" in caplog.text
    assert not proof.exists()
    assert path.read_bytes() == whole


def test_a_checkpoint_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="cannot write"):
        fitted(toys.cnn(), checkpoint=tmp_path / "file" / "checkpoint")
