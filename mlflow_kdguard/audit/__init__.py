"""examine(): is there a backdoor in this network, as far as clean images can tell?

Detectors are rows of the detector table; each answers with a `Finding`. The verdict is

    suspect     a detector flagged a class,
    clean       every detector that decides gave a p-value, and none flagged anything,
    undecided   otherwise: an uncalibrated detector is never read as "clean".
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from mlflow_kdguard import extensions, intervals
from mlflow_kdguard.audit.inversion import halves
from mlflow_kdguard.audit.question import Answer, Detector, Question, Recovered
from mlflow_kdguard.config import AuditSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.errors import ModelError, NonFiniteError, UsageError
from mlflow_kdguard.records import Asr, AuditReport, Model, Progress, Source, silent
from mlflow_kdguard.training import predict
from mlflow_kdguard.triggers import Pixels, Trigger

__all__ = ["Answer", "Audited", "Detector", "Question", "examine"]

Verdict = Literal["clean", "suspect", "undecided"]


@dataclass(frozen=True, slots=True)
class Audited:
    """The report, and the triggers that detectors recovered (flagged classes, else the top one)."""

    report: AuditReport
    recovered: tuple[Recovered, ...]


def examine(
    net: nn.Module,
    *,
    model_sha256: str,
    data: Dataset,
    config: AuditSection,
    seed: int,
    device: torch.device,
    progress: Progress = silent,
    triggers: Sequence[Recovered] = (),
    folder: Path | None = None,
) -> Audited:
    """Ask every detector of `config.detectors` about `net`, given clean labelled images.

    `triggers` are known ones with their target classes: their success rates are taken on all of
    `data`; those of recovered ones on the half that they were not searched on. All bounds in the
    report hold together at 95 % (Bonferroni). With a `folder`, shadow networks that were trained
    before a kill are not trained again.
    Raises NonFiniteError, ModelError for a network that does not answer with one logit a class,
    ConfigError and DataError for what the detectors cannot work with.
    """
    net.to(device)
    _check(net, data, device)
    for known, aim in triggers:
        _check_trigger(known, aim, data)
    question = Question(data, config, seed, device, progress, folder)
    answers = [_ask(name, net, question) for name in config.detectors]
    recovered = tuple(found for answer in answers for found in answer.recovered)
    verdict, target = _verdict(answers)
    report = AuditReport(
        model=Model(sha256=model_sha256),
        data=Source(uri=data.uri, sha256=data.sha256),
        detectors=tuple(answer.finding for answer in answers),
        verdict=verdict,
        target=target,
        asr=_success(net, question, triggers, recovered),
    )
    return Audited(report, recovered)


def _ask(name: str, net: nn.Module, question: Question) -> Answer:
    detector: Detector = extensions.load("detector", name)
    started = time.perf_counter()
    answer = detector(net, question)
    seconds = time.perf_counter() - started
    finding = answer.finding.model_copy(update={"seconds": seconds})
    return Answer(finding, answer.recovered, answer.decides)


def _verdict(answers: Sequence[Answer]) -> tuple[Verdict, int | None]:
    flagged = [answer.finding for answer in answers if answer.finding.flagged]
    if flagged:
        surest = min(flagged, key=lambda each: 0.0 if each.p_value is None else each.p_value)
        return "suspect", surest.target
    deciding = [answer.finding for answer in answers if answer.decides]
    if deciding and all(finding.p_value is not None for finding in deciding):
        return "clean", None
    return "undecided", None


def _success(
    net: nn.Module,
    question: Question,
    supplied: Sequence[Recovered],
    recovered: Sequence[Recovered],
) -> tuple[Asr, ...]:
    confidence = intervals.bonferroni(intervals.CONFIDENCE, max(1, len(supplied) + len(recovered)))
    rows: list[Asr] = []
    for trigger, target in supplied:
        hits, others = _hits(net, question, question.data, (trigger, target))
        rows.append(_asr((trigger, target), "supplied", hits, others, confidence))
    if recovered:
        _, held_out = halves(question.data, seed=question.seed)
        for trigger, target in recovered:
            hits, others = _hits(net, question, held_out, (trigger, target))
            rows.append(_asr((trigger, target), "recovered", hits, others, confidence))
    return tuple(rows)


def _hits(
    net: nn.Module, question: Question, data: Dataset, attack: Recovered
) -> tuple[int, Pixels]:
    """Images of other classes, and how many of them the trigger sends to its target."""
    trigger, target = attack
    others = data.x[(data.y != target) & (data.y >= 0)]
    if not len(others):
        return 0, others
    logits = predict(net, trigger.apply(others), device=question.device)
    return int((logits.argmax(1) == target).sum()), others


def _asr(
    attack: Recovered,
    source: Literal["supplied", "recovered"],
    hits: int,
    others: Pixels,
    confidence: float,
) -> Asr:
    trigger, target = attack
    return Asr(
        trigger=trigger.sha256,
        name=trigger.name,
        target=target,
        source=source,
        k=hits,
        n=len(others),
        changed=trigger.changed(others),
        confidence=confidence,
    )


def _check_trigger(trigger: Trigger, target: int, data: Dataset) -> None:
    if not 0 <= target < data.classes or trigger.shape != data.shape:
        raise UsageError(
            f"trigger {trigger.name!r} of shape {trigger.shape} and target {target} does not fit "
            f"{data.uri}: {data.classes} classes of images {data.shape}."
        )


def _check(net: nn.Module, data: Dataset, device: torch.device) -> None:
    try:
        logits = predict(net, data.x, device=device)
    except RuntimeError as error:  # torch's only word for images of another size
        raise ModelError(
            f"the network does not run on {data.uri} with images {data.shape}: "
            f"{str(error).splitlines()[0]}.",
            remedy="Audit with images of the kind that the network was made for.",
        ) from error
    if logits.shape != (len(data), data.classes):
        raise ModelError(
            f"the network answers {data.uri} with shape {logits.shape}, not "
            f"{(len(data), data.classes)}.",
            remedy="Audit with data of the classes that the network was made for.",
        )
    if not np.isfinite(logits).all():
        raise NonFiniteError(
            f"the network's outputs on {data.uri} are not finite.",
            remedy="Check the model's weights; no verdict can be given about it.",
        )
