"""cleanse(): from a raw teacher to the reference that a student may be distilled from.

The chain (`DetoxSection.chain`) names rows of the detox table; each takes a `State` and returns
the next. Whether a row's result is kept is decided by clean validation accuracy alone; no trigger
is ever looked at.
"""

import logging
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlflow_kdguard import extensions
from mlflow_kdguard.config import DetoxSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.detox.record import DetoxRecord, StepRecord
from mlflow_kdguard.detox.state import Combine, State, Work
from mlflow_kdguard.detox.suspects import NEEDING, Suspicion, choose
from mlflow_kdguard.detox.tuning import check_options
from mlflow_kdguard.errors import ConfigError, DataError
from mlflow_kdguard.records import Progress, Source, silent
from mlflow_kdguard.training import derive

__all__ = [
    "DetoxRecord",
    "Detoxed",
    "State",
    "StepRecord",
    "Suspicion",
    "Work",
    "choose",
    "cleanse",
]

_log = logging.getLogger(__name__)
Row = Callable[[State, Work], State]


@dataclass(frozen=True, slots=True, eq=False)
class Detoxed:
    """The reference R, the detoxed copy D, what was done, and how long each row took.

    Seconds stand beside the record, so that the record of a resumed run is the same.
    """

    reference: nn.Module
    copy: nn.Module
    record: DetoxRecord
    seconds: dict[str, float]


def cleanse(
    teacher: nn.Module,
    clean: Dataset,
    *,
    suspects: tuple[int, ...],
    config: DetoxSection,
    seed: int,
    device: torch.device,
    folder: Path | None = None,
    progress: Progress = silent,
    suspects_from: str = "given",
) -> Detoxed:
    """Run the chain on a copy of `teacher`, which itself is left as it was.

    `clean` is a small, trusted, labelled set; a share of it (`config.validation`) only decides
    what is kept. An empty chain makes the raw teacher the reference. With a `folder`, a killed
    call that is repeated with the same arguments ends with the same bits.

    Raises DataError for unlabelled or too few images, ConfigError for suspects that do not fit,
    Interrupted, NonFiniteError.
    """
    rows = {name: _row(name) for name in config.chain}
    check_options(rows, config.options)
    _check_suspects(suspects, clean.classes, config.chain)
    state = _start(teacher, split(clean, share=config.validation, seed=seed), suspects, device)
    state = replace(state, preview=_preview(state, rows))
    raw = state.judge(state.teacher, device)
    state = replace(state, least=max(0, raw.k - int(config.max_drop * raw.n + 1e-9)))
    work = Work(config, seed, device, folder, progress)
    seconds: dict[str, float] = {}
    for name in config.chain:
        started = time.perf_counter()
        state = rows[name](state, work)
        seconds[f"{len(state.steps):02d}-{name}"] = time.perf_counter() - started
        _tell(state.steps[-1])
    record = DetoxRecord(
        chain=config.chain,
        suspects=suspects,
        suspects_from=suspects_from,
        clean=Source(uri=clean.uri, sha256=clean.sha256),
        layers=state.layers,
        teacher=raw,
        reference=state.judge(state.reference, device),
        least=state.least,
        steps=state.steps,
    )
    return Detoxed(state.reference.eval(), state.copy.eval(), record, seconds)


def _row(name: str) -> Row:
    row: Row = extensions.load("detox", name)
    return row


def _start(
    teacher: nn.Module,
    parts: tuple[Dataset, Dataset],
    suspects: tuple[int, ...],
    device: torch.device,
) -> State:
    raw = deepcopy(teacher).to(device).eval().requires_grad_(False)
    return State(
        teacher=raw,
        copy=raw,
        reference=raw,
        train=parts[0],
        validation=parts[1],
        suspects=suspects,
        least=0,
        preview=lambda copy: copy,
    )


def split(clean: Dataset, *, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Training and validation part of the clean set, drawn under the seed."""
    if not (clean.y >= 0).all():
        raise DataError(
            f"{clean.uri} holds unlabelled images.", remedy="Detox needs labels (data.clean)."
        )
    generator = torch.Generator().manual_seed(derive(seed, "validation"))
    order = torch.randperm(len(clean), generator=generator).numpy()
    count = round(share * len(clean))
    if not 0 < count < len(clean):
        raise DataError(
            f"{len(clean)} clean images leave none for training or validation at a share of "
            f"{share}.",
            remedy="Give more clean images, or set detox.validation to 0.2.",
        )
    kept, held = sorted(order[count:].tolist()), sorted(order[:count].tolist())
    return (
        clean.take(kept, uri=f"{clean.uri} (detox training)"),
        clean.take(held, uri=f"{clean.uri} (detox validation)"),
    )


def _preview(state: State, rows: dict[str, Row]) -> Combine:
    """What the chain's combining rows will make of a copy (rows whose module has `combine`)."""
    modules = [sys.modules[row.__module__] for row in rows.values()]
    combines: list[Any] = [module.combine for module in modules if hasattr(module, "combine")]
    if not combines:
        return lambda copy: copy
    last = combines[-1]

    def preview(copy: nn.Module) -> nn.Module:
        combined: nn.Module = last(state.teacher, copy, state.suspects, state.train.classes)
        return combined

    return preview


def _check_suspects(suspects: tuple[int, ...], classes: int, chain: tuple[str, ...]) -> None:
    if len(set(suspects)) != len(suspects) or not all(0 <= each < classes for each in suspects):
        raise ConfigError(
            f"suspects {suspects} are not distinct classes of 0..{classes - 1}.",
            remedy="Correct detox.suspects.",
        )
    if not suspects and NEEDING & set(chain):
        raise ConfigError(
            "the detox chain works on suspect classes, and there are none.",
            remedy=f"Set detox.suspects to auto, or take out {', '.join(sorted(NEEDING))}.",
        )


def _tell(step: StepRecord) -> None:
    if step.outcome == "past the limit":
        _log.warning(
            "detox step %s ended past the limit, at a clean accuracy of %.3f, and stays: give it "
            "more clean images, or a lower detox.unlearn_lr",
            step.name,
            step.reference.rate,
        )
    elif step.outcome != "kept":
        _log.warning(
            "detox step %s was %s (%d of %d steps): clean accuracy fell past the limit",
            step.name,
            step.outcome,
            step.kept_at,
            step.steps,
        )
