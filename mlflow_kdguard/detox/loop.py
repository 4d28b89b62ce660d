"""Steps of a detox that can be killed at any moment and that never end past the limit.

`training.fit` counts epochs of SGD; a detox counts steps, brings its own optimiser, and looks at
the clean validation accuracy of the resulting reference on its way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mlflow_kdguard import devices
from mlflow_kdguard.config import Loop
from mlflow_kdguard.detox.record import Outcome
from mlflow_kdguard.detox.state import State, Work
from mlflow_kdguard.errors import Interrupted, NonFiniteError
from mlflow_kdguard.files import digest_json
from mlflow_kdguard.records import Rate
from mlflow_kdguard.training import derive, state_sha256
from mlflow_kdguard.training.batches import Batches
from mlflow_kdguard.training.checkpoint import Checkpoint
from mlflow_kdguard.training.interrupt import Signals

_LOOKS = 8
"""How often, beside its end, a step's result is judged."""
_CHECKPOINT_SECONDS = 10.0

Snapshot = dict[str, Tensor]


class Routine(Protocol):
    """What is trained. `memory` holds tensors that belong to the state beside the weights."""

    name: str
    steps: int
    module: nn.Module
    optimizer: torch.optim.Optimizer
    memory: dict[str, Tensor]

    def advance(self, x: Tensor, y: Tensor, step: int, generator: torch.Generator) -> Tensor:
        """One optimiser step on augmented clean images; returns its loss."""


@dataclass(slots=True, eq=False)
class Kept:
    """The state that the routine's module was left in."""

    outcome: Outcome
    at: int


@dataclass(slots=True, eq=False)
class _Course:
    done: int = 0
    good_at: int = 0
    good: Snapshot | None = None


def drive(
    routine: Routine, state: State, work: Work, judge: Callable[[], Rate], *, undo: bool = True
) -> Kept:
    """Run all steps, then leave the module in its last state whose reference met the limit.

    Without `undo` the module stays as it ends, and what is returned says which it is.

    Deterministic in seed and inputs; a run that is started again with the same ones goes on from
    its checkpoint in `work.folder`, or, finished, repeats nothing. `judge` is the resulting
    reference's validation accuracy. Raises Interrupted and NonFiniteError.
    """
    course = _Course()
    keeper = _keeper(routine, state, work)
    batches = _batches(state, work)
    cuda = [work.device] if work.device.type == "cuda" else []
    with devices.deterministic(work.device), torch.random.fork_rng(cuda), Signals() as signals:
        _restore(routine, course, keeper.load(), work.device)
        fresh = course.done < routine.steps
        while course.done < routine.steps:
            if signals.struck:
                keeper.save(_saved(routine, course))
                raise _interrupted(routine, course, keeper)
            loss = _advance(routine, course, batches, derive(work.seed, routine.name, state.place))
            if course.done == routine.steps or course.done % max(1, routine.steps // _LOOKS) == 0:
                _look(routine, course, loss, least=state.least, rate=judge(), work=work)
            if keeper.due:
                keeper.save(_saved(routine, course))
        if fresh:
            keeper.save(_saved(routine, course))
    return _settle(routine, course, undo=undo)


def _advance(routine: Routine, course: _Course, batches: Batches, seed: int) -> Tensor:
    """One step, with a seed of its own: also for layers that read torch's global generator."""
    torch.manual_seed(derive(seed, "layers", course.done))
    generator = torch.Generator().manual_seed(derive(seed, "step", course.done))
    x, y, _ = batches.draw(course.done, generator)
    loss = routine.advance(x, y, course.done, generator)
    course.done += 1
    return loss


def _look(
    routine: Routine, course: _Course, loss: Tensor, *, least: int, rate: Rate, work: Work
) -> None:
    """Remember the module's state if its reference meets the limit, and tell."""
    _check(routine, loss, course.done)
    if rate.k >= least:
        course.good_at, course.good = course.done, _snapshot(routine.module)
    figures = {"loss": float(loss), "clean_accuracy": rate.rate}
    work.progress(routine.name, course.done, routine.steps, figures)


def _check(routine: Routine, loss: Tensor, done: int) -> None:
    values = [loss, *routine.module.state_dict().values()]
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise NonFiniteError(
            f"{routine.name} diverged: not finite by step {done} of {routine.steps}.",
            remedy="Lower its learning rate (detox.mask_lr, detox.unlearn_lr).",
        )


def _settle(routine: Routine, course: _Course, *, undo: bool) -> Kept:
    if not routine.steps or course.good_at == course.done:
        return Kept("kept", course.done)
    if not undo:
        return Kept("past the limit", course.done)
    if course.good is None:
        return Kept("undone", 0)
    routine.module.load_state_dict(course.good)
    return Kept("rolled back", course.good_at)


def _batches(state: State, work: Work) -> Batches:
    loop = Loop(batch=work.config.batch, augment="shift", shift=2)
    return Batches(state.train, loop, seed=derive(work.seed, "detox"), device=work.device)


def _keeper(routine: Routine, state: State, work: Work) -> Checkpoint:
    name = f"{state.place:02d}-{routine.name}.checkpoint.pt"
    path = None if work.folder is None else work.folder / name
    fingerprint = digest_json(
        {
            "networks": state_sha256(state.teacher, state.copy, routine.module),
            "data": [state.train.sha256, state.validation.sha256],
            "config": work.config.model_dump(mode="json"),
            "rest": [work.seed, routine.name, list(state.suspects), state.least, work.device.type],
        }
    )
    return Checkpoint(path, fingerprint, every=_CHECKPOINT_SECONDS)


def _snapshot(module: nn.Module) -> Snapshot:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _saved(routine: Routine, course: _Course) -> dict[str, Any]:
    return {
        "done": course.done,
        "good_at": course.good_at,
        "good": course.good,
        "module": routine.module.state_dict(),
        "optimizer": routine.optimizer.state_dict(),
        "memory": routine.memory,
    }


def _restore(
    routine: Routine, course: _Course, saved: dict[str, Any] | None, device: torch.device
) -> None:
    if saved is None:
        return
    course.done, course.good_at, course.good = saved["done"], saved["good_at"], saved["good"]
    routine.module.load_state_dict(saved["module"])
    routine.optimizer.load_state_dict(saved["optimizer"])
    routine.memory.update({name: value.to(device) for name, value in saved["memory"].items()})


def _interrupted(routine: Routine, course: _Course, keeper: Checkpoint) -> Interrupted:
    remedy = (
        "Nothing was kept: no folder for checkpoints was given."
        if keeper.path is None
        else f"Run the same command again: it goes on from {keeper.path}."
    )
    return Interrupted(
        f"{routine.name} was interrupted after {course.done} of {routine.steps} steps.",
        remedy=remedy,
    )
