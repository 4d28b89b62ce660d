"""Accuracy, attack success and distance from the teacher, taken on the ONNX bytes that ship.

Everything is counted over the images in their order, in one pass that holds one batch at a time:
k and n, never a bare rate. A single output that is not finite fails the whole measurement, since
argmax of NaNs is class 0 and every comparison with NaN is False (`docs/threat-model.md`, 8).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mlflow_kdguard import intervals
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.errors import DataError, ModelError, UsageError
from mlflow_kdguard.measure.session import Session, softmax
from mlflow_kdguard.measure.tally import Attack, Images, Tally
from mlflow_kdguard.records import Measurement, Model, Progress, Source, silent
from mlflow_kdguard.triggers import Trigger

if TYPE_CHECKING:
    from torch import device as Device

__all__ = ["Attack", "Session", "measure", "opened", "refuse_batch_mixing", "softmax"]

ROW_TOLERANCE = 1e-4
"""Largest softmax difference of one image between batch sizes 1, 2 and 64."""


def measure(
    model: bytes,
    data: Dataset,
    *,
    device: "Device",
    triggers: Sequence[Attack] = (),
    teacher: bytes | None = None,
    reference: bytes | None = None,
    baseline: bytes | None = None,
    confidence: float = intervals.CONFIDENCE,
    batch: int = 256,
    threads: int = 0,
    progress: Progress = silent,
) -> Measurement:
    """Measure the ONNX bytes `model` on labelled images.

    Accuracy is k of n. Of each (trigger, target, source): n images whose label is not the target,
    k that the triggered image sends to it, and the same of `baseline` where one is declared; the
    bounds of all triggers hold together (Bonferroni). With `teacher` (the original one), both are
    counted on the same images; with `reference` too, the softmax gaps max_k |R_k - P_k| (their
    mean) and max_k |R_k - S_k| (the largest).
    Raises DataError where an image has no label, UsageError where the request does not fit
    together, ModelError and NonFiniteError as `Session` does.
    """
    _check_data(data)
    if reference is not None and teacher is None:
        raise UsageError("a reference is measured against the original teacher, which is missing.")
    given = {"student": model, "teacher": teacher, "reference": reference, "baseline": baseline}
    nets = {
        name: _open(blob, f"the {name}'s ONNX file", data, device, threads)
        for name, blob in given.items()
        if blob is not None
    }
    for trigger, target, _ in triggers:
        _check_trigger(trigger, target, data)
    refuse_batch_mixing(nets["student"], data)
    tally = _count(nets, data, Tally.of(triggers), batch, progress)
    student = nets["student"]
    models = {name: Model(sha256=net.sha256) for name, net in nets.items()}
    return Measurement(
        model=models["student"],
        data=Source(uri=data.uri, sha256=data.sha256),
        provider=student.provider,
        accuracy=tally.accuracy(),
        asr=tally.asr(confidence, has_baseline=baseline is not None),
        teacher=models.get("teacher"),
        paired=None if teacher is None else tally.paired(),
        reference=None if reference is None else tally.gap(models["reference"]),
        baseline=models.get("baseline"),
    )


def opened(
    model: bytes, data: Dataset, *, where: str, device: "Device", threads: int = 0
) -> Session:
    """A session on ONNX bytes that takes the images of `data`, each by itself.

    Raises ModelError as `Session` and `refuse_batch_mixing` do, and where shapes do not fit.
    """
    session = _open(model, where, data, device, threads)
    refuse_batch_mixing(session, data)
    return session


def refuse_batch_mixing(session: Session, data: Dataset) -> None:
    """Refuse a model whose answer to an image depends on its neighbours (batches of 1, 2, 64).

    Raises ModelError naming the image whose softmax differs by more than `ROW_TOLERANCE`.
    """
    x, _ = data.batch(np.arange(min(64, len(data))))
    whole = softmax(session.logits(x, 64))
    for size in (1, 2):
        gap = np.abs(softmax(session.logits(x, size)) - whole).max(axis=1)
        if (gap > ROW_TOLERANCE).any():
            raise ModelError(
                f"{session.where} answers image {int(gap.argmax())} differently in batches of "
                f"{size} and {len(x)} (softmax differs by {gap.max():.2g}).",
                remedy="Its operators mix the images of a batch; export it in evaluation mode.",
            )


def _count(
    nets: dict[str, Session], data: Dataset, tally: Tally, batch: int, progress: Progress
) -> Tally:
    for start in range(0, len(data), batch):
        indices = np.arange(start, min(start + batch, len(data)))
        x, y = data.batch(indices)
        tally.count(nets, Images(x, y, indices), batch)
        done = int(indices[-1]) + 1
        progress("measure", done, len(data), {"accuracy": tally.accuracy().rate})
    return tally


def _check_data(data: Dataset) -> None:
    if len(data) == 0:
        raise DataError(f"{data.uri} holds no image.", remedy="Name images to measure on.")
    missing = int((data.y < 0).sum())
    if missing:
        raise DataError(
            f"{missing} of {len(data)} images of {data.uri} have no label.",
            remedy="Accuracy and attack success need labelled images.",
        )


def _check_trigger(trigger: Trigger, target: int, data: Dataset) -> None:
    if not 0 <= target < data.classes:
        raise UsageError(
            f"trigger {trigger.name!r} has target {target}, but {data.uri} has classes 0 to "
            f"{data.classes - 1}."
        )
    if trigger.shape != tuple(data.shape):
        raise UsageError(
            f"trigger {trigger.name!r} is of shape {trigger.shape}, images of "
            f"{data.uri} of shape {tuple(data.shape)}.",
            remedy="Use a trigger made for these images.",
        )


def _open(data: bytes, where: str, images: Dataset, device: "Device", threads: int) -> Session:
    session = Session(data, device=device, where=where, threads=threads)
    answered = session.logits(images.batch(np.arange(1))[0]).shape[1]
    if answered != images.classes:
        raise ModelError(
            f"{where} answers {answered} classes, but {images.uri} has {images.classes}.",
            remedy="Measure it on data of the same classes.",
        )
    return session
