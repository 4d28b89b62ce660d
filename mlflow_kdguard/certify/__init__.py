"""certify(): how far apart reference and student can be near each drawn image.

A witness (`witness`) bounds the confidence gap from below, a row of table "bound" (`relax`) from
above; both speak of the ONNX bytes that ship. What the bound means, and what it does not say, is
in `docs/reference/certify.md`.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mlflow_kdguard import extensions, graph
from mlflow_kdguard.certify.ball import Ball
from mlflow_kdguard.certify.joint import Joint, join
from mlflow_kdguard.certify.parallel import in_order, workers
from mlflow_kdguard.certify.relax import Bound, Bounds
from mlflow_kdguard.certify.report import SKIPPED, Judged, Question, summarise
from mlflow_kdguard.certify.witness import Effort, attained, search, softmax
from mlflow_kdguard.config import CertifySection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.draw import draw
from mlflow_kdguard.errors import DataError, Interrupted, SoundnessError
from mlflow_kdguard.files import sha256
from mlflow_kdguard.records import CertifyReport, Progress, silent

__all__ = ["Ball", "Bound", "Bounds", "Joint", "certify", "join"]

_BATCH_PIXELS = 20_000
_BATCH = 25


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """The two networks as the bounds and as the witness search see them."""

    reference: graph.Graph
    student: graph.Graph
    joint: Joint
    quick: Joint


def certify(
    reference: bytes,
    student: bytes,
    data: Dataset,
    *,
    config: CertifySection,
    nonce: str = "",
    device: torch.device | None = None,
    progress: Progress = silent,
) -> CertifyReport:
    """Bounds on max |p_S,k(x') - p_R,k(x')| around drawn images of `data`.

    `reference`, `student`: ONNX bytes. Which images are judged follows from the digests and
    `nonce` (`draw.draw`). Raises ModelError for graphs that cannot be bounded, DataError for
    images that do not fit them, ConfigError for an unknown method, SoundnessError where a witness
    beats the bound, Interrupted on Ctrl-C.
    """
    place = device if device is not None else torch.device("cpu")
    bound: Bound = extensions.load("bound", _method(config))
    pair = _read(reference, student, place)
    question = _question((sha256(reference), sha256(student)), data, config, nonce, str(place))
    _check(data, pair.reference, question)
    judged: list[Judged] = []

    def judge(part: tuple[int, ...]) -> list[Judged]:
        late = config.seconds is not None and question.elapsed() > config.seconds
        return _judge(pair, data, part, question, None if late else bound)

    parts = list(_batches(question.indices, pair.joint))
    try:
        for found in in_order(judge, parts, at_once=workers(place)):
            judged += found
            worst = max(item.upper for item in judged)
            progress("certify", len(judged), len(question.indices), {"upper_max": worst})
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"certification stopped after {len(judged)} of {len(question.indices)} images.",
            remedy="Run it again; a bound of some of the drawn images certifies nothing.",
        ) from error
    return summarise(question, judged)


def _method(config: CertifySection) -> str:
    return "crown" if config.method == "auto" else config.method


def _read(reference: bytes, student: bytes, device: torch.device) -> _Pair:
    graphs = (
        graph.read(reference, where="the reference"),
        graph.read(student, where="the student"),
    )
    joint = join(*graphs, device=device)
    return _Pair(*graphs, joint, joint.cast(torch.float32, device))


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


def _judge(
    pair: _Pair, data: Dataset, part: tuple[int, ...], question: Question, bound: Bound | None
) -> list[Judged]:
    """Both bounds of a batch of images; without a bound (time is up) they stay undecided."""
    began = time.perf_counter()
    x, labels = data.batch(part)
    confidences = softmax(graph.evaluate(pair.reference, x.astype(np.float64)))
    lower, upper, nodes = np.zeros(len(part)), np.ones(len(part)), 0
    if bound is not None:
        place, top = torch.device(question.device), None
        ball = Ball.around(
            torch.from_numpy(x).to(place), eps=question.config.eps, norm=question.config.norm
        )
        if question.config.classes == "top":
            top = torch.from_numpy(confidences.argmax(1)).to(place)
        found = bound(pair.joint, ball, top, question.config.nodes)
        lower = _witness(pair, ball, top, first=part[0], question=question, found=found)
        upper, nodes = found.upper.cpu().numpy(), found.nodes
        _check_sound(part, lower, upper, question.method)
    seconds = (time.perf_counter() - began) / len(part)
    method = SKIPPED if bound is None else question.method
    return [
        Judged(int(i), int(label), p, float(lo), float(hi), method, nodes, seconds)
        for i, label, p, lo, hi in zip(part, labels, confidences, lower, upper, strict=True)
    ]


def _witness(
    pair: _Pair,
    ball: Ball,
    top: torch.Tensor | None,
    *,
    first: int,
    question: Question,
    found: Bounds,
) -> NDArray[np.float64]:
    """The largest gaps found: float64 B, each attained at a point of its ball."""
    effort = Effort(question.config.pgd_steps, question.config.restarts)
    generator = torch.Generator().manual_seed(question.seed(first))
    points = search(pair.quick, ball, top, effort=effort, generator=generator, hints=found.worst)
    return attained(pair.reference, pair.student, ball, points, top)


def _check_sound(
    part: tuple[int, ...], lower: NDArray[np.float64], upper: NDArray[np.float64], method: str
) -> None:
    if not bool((upper >= lower).all()):
        worst = int((lower - upper).argmax())
        raise SoundnessError(
            f"image {part[worst]}: a point of the ball has a gap of {lower[worst]:.17g}, above the "
            f"bound {upper[worst]:.17g} of {method!r}.",
            remedy="This is a bug in the bound; please report it with both models.",
        )
