"""Universal inversion as a detector: is one class reached far more easily than clean nets allow?

The statistic is the largest per-class rate of `adversary.inversion` on one half of the clean
images; the patterns' success rates are then taken on the other half. A rate alone means nothing:
plainly trained clean networks reach .5 where adversarially trained ones reach .1. The p-value
comes from clean networks of the same architecture and regime (`calibration`), or not at all.
"""

import numpy as np
import torch
from torch import nn

from mlflow_kdguard.adversary.inversion import Inverted, invert_all
from mlflow_kdguard.audit import calibration
from mlflow_kdguard.audit.question import Answer, Question
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.errors import DataError
from mlflow_kdguard.records import Finding
from mlflow_kdguard.training import derive
from mlflow_kdguard.triggers import Trigger

NAME = "inversion"


def examine(net: nn.Module, question: Question) -> Answer:
    """Per-class rates; flagged classes where calibrated; patterns of the flagged or the top class.

    Raises ConfigError for a calibration of other settings or data, DataError without labels.
    """
    radius = question.config.radius
    found = search(net, question, radius=radius)
    rates = [each.rate.rate for each in found]
    top = max(range(len(rates)), key=lambda label: rates[label])
    null = calibration.null_of(
        net, question, lambda shadow: statistic(search(shadow, question, radius=radius))
    )
    p_values = None if null.record is None else [null.record.p_value(rate) for rate in rates]
    alpha = question.config.alpha
    flagged = [label for label, p in enumerate(p_values or ()) if p <= alpha]
    finding = Finding(
        name=NAME,
        score=rates[top],
        p_value=None if p_values is None else p_values[top],
        target=top,
        flagged=bool(flagged),
        details={
            "rates": rates,
            "n": [each.rate.n for each in found],
            "radius": question.config.radius,
            "steps": question.config.steps,
            "flagged": flagged,
            "p_values": p_values,
            "calibration": null.document(),
        },
    )
    return Answer(finding, tuple((trigger(found[t]), t) for t in flagged or [top]))


def search(
    net: nn.Module, question: Question, *, radius: float, detector: str = NAME
) -> tuple[Inverted, ...]:
    """`invert_all` at one radius on the searching half of the clean images, under a seed that the
    question and the detector's name tell."""
    config, (data, _) = question.config, halves(question.data, seed=question.seed)
    return invert_all(
        net.to(question.device),
        torch.from_numpy(data.x).to(question.device),
        torch.from_numpy(data.y).to(question.device),
        classes=data.classes,
        radius=radius,
        steps=config.steps,
        batch=config.batch,
        generator=torch.Generator().manual_seed(derive(question.seed, detector)),
        progress=question.progress,
    )


def statistic(found: tuple[Inverted, ...]) -> float:
    """The largest rate of any class: bounds the rate of each, so that all classes are flagged
    by one null distribution."""
    return max(each.rate.rate for each in found)


def halves(data: Dataset, *, seed: int) -> tuple[Dataset, Dataset]:
    """Clean images to search on, and others to take the found triggers' success rates on."""
    labelled = np.flatnonzero(data.y >= 0)
    if len(labelled) < 2:
        raise DataError(
            f"{data.uri} has {len(labelled)} labelled images; inversion needs a labelled set.",
            remedy="Give a clean labelled set (data.clean).",
        )
    generator = torch.Generator().manual_seed(derive(seed, "halves"))
    order = labelled[torch.randperm(len(labelled), generator=generator).numpy()]
    middle = (len(order) + 1) // 2
    return (
        data.take(np.sort(order[:middle]), uri=f"{data.uri} (search half)"),
        data.take(np.sort(order[middle:]), uri=f"{data.uri} (held-out half)"),
    )


def trigger(found: Inverted) -> Trigger:
    """The pattern as a trigger that adds; pixels stay in [0,1], so more than ±1 adds nothing."""
    pattern = found.delta.detach().cpu().clamp(-1.0, 1.0).numpy().astype(np.float32)
    return Trigger(name=f"recovered-{found.target}", kind="add", mask=None, pattern=pattern)
