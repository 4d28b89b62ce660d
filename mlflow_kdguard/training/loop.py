"""`fit`: SGD with Nesterov momentum under a schedule of rates, resumable to the bit."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mlflow_kdguard import devices
from mlflow_kdguard.config import Loop
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.errors import ConfigError, Interrupted
from mlflow_kdguard.files import digest_json
from mlflow_kdguard.records import Progress, silent
from mlflow_kdguard.training.batches import Batches
from mlflow_kdguard.training.checkpoint import Checkpoint, state_sha256
from mlflow_kdguard.training.interrupt import Signals
from mlflow_kdguard.training.run import Loss, Run

_REPORT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Fitted:
    """How a run ended: means over its last epoch (`loss` and what the loss reported)."""

    figures: dict[str, float]
    steps: int
    resumed_at: int


def fit(
    net: nn.Module,
    data: Dataset,
    loss: Loss,
    loop: Loop,
    *,
    seed: int,
    device: torch.device,
    what: str,
    checkpoint: Path | None = None,
    progress: Progress = silent,
    along: nn.Module | None = None,
    depends: str = "",
) -> Fitted:
    """Train `net` in place (moved to `device`) and leave it in evaluation mode.

    The result is a function of the arguments: torch's global generators are neither used nor
    changed (layers that read them, such as dropout, are seeded by step). `along` is trained and
    checkpointed with the net (connectors), and its buffers are where a loss keeps state.
    A run that was killed at any moment and is started again with the same arguments and
    `checkpoint` ends with the same bits (same machine, same number of threads). The checkpoint
    is bound to seed, loop, data, `what`, initial weights and `depends`, which should name what
    else the loss computes with (a teacher's digest).

    Raises Interrupted on Ctrl-C or SIGTERM, NonFiniteError where the loss or a weight is not
    finite, ConfigError for float16 on a CPU, DataError without images.
    """
    if loop.amp == "float16" and device.type == "cpu":
        raise ConfigError("amp: float16 needs CUDA.", remedy="Use bfloat16 or off on the CPU.")
    fingerprint = _fingerprint(net, along, data, loop, (seed, what, depends, device.type))
    keeper = Checkpoint(checkpoint, fingerprint, every=loop.checkpoint_seconds)
    batches = Batches(data, loop, seed=seed, device=device)
    run = Run(net, along, batches, loop, seed=seed, device=device)
    cuda = [device] if device.type == "cuda" else []
    with devices.deterministic(device), torch.random.fork_rng(cuda), Signals() as signals:
        try:
            run.restore(keeper.load())
            resumed_at = run.done
            _drive(run, loss, keeper, signals=signals, what=what, progress=progress)
        except KeyboardInterrupt as error:
            raise _interrupted(what, run, keeper) from error
    run.free()
    net.eval()
    return Fitted(run.figures(), run.steps, resumed_at)


def _drive(
    run: Run,
    loss: Loss,
    keeper: Checkpoint,
    *,
    signals: Signals,
    what: str,
    progress: Progress,
) -> None:
    """Steps until done, with reports and checkpoints in between; the last state is always kept."""
    reported = -math.inf
    fresh = run.done < run.steps
    while run.done < run.steps:
        if signals.struck:
            run.check(what)
            keeper.save(run.state())
            raise KeyboardInterrupt
        run.advance(loss)
        if keeper.due:
            run.check(what)
            keeper.save(run.state())
        if time.monotonic() - reported >= _REPORT_SECONDS and run.done < run.steps:
            run.check(what)
            progress(what, run.done, run.steps, run.figures())
            reported = time.monotonic()
    run.check(what, weights=True)
    if fresh:
        keeper.save(run.state())
    progress(what, run.steps, run.steps, run.figures())


def _fingerprint(
    net: nn.Module,
    along: nn.Module | None,
    data: Dataset,
    loop: Loop,
    rest: tuple[int | str, ...],
) -> str:
    # The initial weights are in it: the same loop on another network is another run.
    return digest_json(
        {
            "loop": loop.model_dump(mode="json", exclude={"checkpoint_seconds"}),
            "data": data.sha256,
            "initial": state_sha256(net, along),
            "rest": rest,
        }
    )


def _interrupted(what: str, run: Run, keeper: Checkpoint) -> Interrupted:
    remedy = (
        "Nothing was kept: no place for checkpoints was given."
        if keeper.path is None
        else f"Run the same command again: it goes on from {keeper.path}."
    )
    return Interrupted(
        f"{what} was interrupted after {run.done} of {run.steps} steps.", remedy=remedy
    )
