"""certify(): how far apart reference and student can be near each drawn image.

A witness (`witness`) bounds the confidence gap from below, a row of table "bound" (`relax`) from
above; both speak of the ONNX bytes that ship. What the bound means, and what it does not say, is
in `docs/reference/certify.md`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mlflow_kdguard import extensions, graph
from mlflow_kdguard.certify.ball import Ball
from mlflow_kdguard.certify.batch import Judge, Pair
from mlflow_kdguard.certify.budget import Ration
from mlflow_kdguard.certify.joint import Joint, join
from mlflow_kdguard.certify.milp import Solved
from mlflow_kdguard.certify.parallel import in_order, workers
from mlflow_kdguard.certify.proofs import Folder
from mlflow_kdguard.certify.relax import ANYTIME, Bound, Bounds
from mlflow_kdguard.certify.report import Judged, Question, summarise
from mlflow_kdguard.config import CertifySection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.draw import draw
from mlflow_kdguard.errors import ConfigError, DataError, Interrupted
from mlflow_kdguard.files import sha256
from mlflow_kdguard.records import CertifyReport, Progress, silent
from mlflow_kdguard.solvers import oracle
from mlflow_kdguard.training.interrupt import Signals

__all__ = ["Ball", "Bound", "Bounds", "Joint", "certify", "join"]

_BATCH_PIXELS = 20_000
_BATCH = 25


def certify(
    reference: bytes,
    student: bytes,
    data: Dataset,
    *,
    config: CertifySection,
    nonce: str = "",
    device: torch.device | None = None,
    progress: Progress = silent,
    proofs: Path | None = None,
    partial: bool = False,
) -> CertifyReport:
    """Bounds on max |p_S,k(x') - p_R,k(x')| around drawn images of `data`.

    `reference`, `student`: ONNX bytes. Which images are judged follows from the digests and
    `nonce` (`draw.draw`). `proofs`: a new folder for a proof of every bound
    (`mlflow_kdguard.proof`); the bounds reported are then those that the proofs claim. `partial`:
    Ctrl-C and SIGTERM end the search, and the report (`interrupted`) has the best bounds that are
    known by then, without proofs; a second one acts as it always does.
    Raises ModelError for graphs that cannot be bounded, DataError for images that do not fit them,
    ConfigError for an unknown method, SolverError for a solver that is not installed or has no
    licence, SoundnessError where a witness beats the bound, Interrupted on Ctrl-C.
    """
    place = device if device is not None else torch.device("cpu")
    bound = _bound(config)
    pair = _read(reference, student, place)
    question = _question((sha256(reference), sha256(student)), data, config, nonce, str(place))
    if proofs is not None:
        folder = Folder.begun(proofs, pair.joint, (reference, student), question)
        pair = replace(pair, folder=folder)
    _check(data, pair.reference, question)
    with Signals() if partial else nullcontext() as signals:

        def interrupted() -> bool:
            return signals is not None and signals.struck

        judged = _judged(Judge(pair, data, question, bound), progress, interrupted)
        report = summarise(question, judged, interrupted=interrupted())
    return report if pair.folder is None or report.interrupted else pair.folder.finished(report)


def _judged(judge: Judge, progress: Progress, interrupted: Callable[[], bool]) -> list[Judged]:
    """All drawn images, in order; Interrupted where Ctrl-C is not `interrupted`'s affair."""
    question, judged = judge.question, list[Judged]()
    parts = list(_batches(question.indices, judge.pair.joint))
    at_once, config = workers(torch.device(question.device)), question.config
    ration = Ration(
        len(parts), at_once, seconds=config.seconds, gib=config.memory, interrupted=interrupted
    )
    try:
        for found in in_order(
            lambda part: judge.batch(part, ration.limits()), parts, at_once=at_once
        ):
            judged += found
            worst = max(item.upper for item in judged)
            progress("certify", len(judged), len(question.indices), {"upper_max": worst})
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"certification stopped after {len(judged)} of {len(question.indices)} images.",
            remedy="Run it again; a bound of some of the drawn images certifies nothing.",
        ) from error
    return judged


def _method(config: CertifySection) -> str:
    return "crown" if config.method == "auto" else config.method


def _bound(config: CertifySection) -> Bound:
    """The row of table "bound"; one by a solver with that solver and the time limit."""
    bound: Bound = extensions.load("bound", _method(config))
    if config.memory is not None and _method(config) not in ANYTIME:
        raise ConfigError(
            f"the method {_method(config)!r} is not ended by a limit of memory.",
            remedy=f"Limit the memory of {', '.join(ANYTIME)} only.",
        )
    if isinstance(bound, Solved):
        seconds = float("inf") if config.seconds is None else config.seconds
        name = oracle.chosen(config.solver)
        return replace(bound, solver=name, until=time.monotonic() + seconds)
    if config.solver != "auto":
        raise ConfigError(
            f"the method {_method(config)!r} asks no solver, but {config.solver!r} is named.",
            remedy="Name a solver with the methods lp and milp only.",
        )
    return bound


def _read(reference: bytes, student: bytes, device: torch.device) -> Pair:
    graphs = (
        graph.read(reference, where="the reference"),
        graph.read(student, where="the student"),
    )
    joint = join(*graphs, device=device)
    return Pair(*graphs, joint, joint.cast(torch.float32, device))


def _question(
    digests: tuple[str, str], data: Dataset, config: CertifySection, nonce: str, device: str
) -> Question:
    indices = draw(len(data), config.samples, *digests, data.sha256, nonce)
    return Question(
        config, _method(config), *digests, data.sha256, data.uri, len(data), nonce, device, indices
    )


def _check(data: Dataset, model: graph.Graph, question: Question) -> None:
    if not question.indices:
        raise DataError(f"{data.uri} has no images to certify on.", remedy="Name a test set.")
    if data.shape != model.input_shape:
        raise DataError(
            f"{data.uri} has images of shape {data.shape}, the networks take {model.input_shape}.",
            remedy="Certify on the data that the networks were made for.",
        )
    labels = data.y[list(question.indices)]
    if labels.min() < 0 or labels.max() >= model.classes:
        raise DataError(
            f"{data.uri} has labels outside 0..{model.classes - 1} among the drawn images.",
            remedy="Certify on labelled images; whether the reference is right is part of it.",
        )


def _batches(indices: tuple[int, ...], joint: Joint) -> Iterator[tuple[int, ...]]:
    """At most _BATCH images each, and no more batches than that asks for: every batch pays for the
    same number of small operations. Whatever the number of threads, the batches are the same.
    """
    pixels = int(np.prod(joint.input_shape))
    size = max(1, min(_BATCH, _BATCH_PIXELS // pixels))
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
