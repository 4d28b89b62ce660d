"""Lift, value kept and validity, with intervals over seeds and test images."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.guard.cells import Judged

VALID = 0.3
"""How far the undefended student's rate must lie above the clean teacher's student's."""
WORTH = 0.03
"""Below that difference between undefended and untaught, value is told as a difference."""
DRAWS, CONFIDENCE = 4000, 0.95


@dataclass(frozen=True, slots=True)
class Score:
    """One guard on one row, over seeds: means, and one-sided 95 % bounds of the lift.

    `kept`: (guarded - no teacher) / (undefended - no teacher) in accuracy, where that is told;
    `gained`: guarded - no teacher.
    """

    accuracy: float
    drop: float
    asr: float
    baseline: float
    lift: float
    lift_lower: float
    lift_upper: float
    kept: float | None
    gained: float
    seconds: float
    seeds: int

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def score(
    guarded: Sequence[Judged],
    undefended: Sequence[Judged],
    clean: Sequence[Judged],
    untaught: Sequence[Judged],
) -> Score:
    """The score of students of the same seeds, in the same order, on the same images."""
    accuracy, none, alone = (
        float(np.mean([one.accuracy for one in each])) for each in (guarded, undefended, untaught)
    )
    pairs = [(one.sent, other.sent) for one, other in zip(guarded, clean, strict=True)]
    low, high = lift_bounds(pairs)
    worth = none - alone
    return Score(
        accuracy=accuracy,
        drop=none - accuracy,
        asr=float(np.mean([one.asr for one in guarded])),
        baseline=float(np.mean([one.asr for one in clean])),
        lift=float(
            np.mean([one.asr - other.asr for one, other in zip(guarded, clean, strict=True)])
        ),
        lift_lower=low,
        lift_upper=high,
        kept=(accuracy - alone) / worth if worth >= WORTH else None,
        gained=accuracy - alone,
        seconds=float(np.mean([sum(one.told["seconds"].values()) for one in guarded])),
        seeds=len(guarded),
    )


@dataclass(frozen=True, slots=True)
class Faith:
    """What is certified of a guard's students, over seeds: mean witness and mean bound (FaithUB) of
    the confidence gap to the reference, the bound beside that of a clean teacher's student, and
    the reference's own gap to the raw teacher."""

    lower: float
    upper: float
    ratio: float
    gap: float

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def faith(guarded: Sequence[Judged], clean: Sequence[Judged]) -> Faith:
    """Of students whose bounds are told."""

    def mean(students: Sequence[Judged], name: str) -> float:
        return float(np.mean([one.told["bounds"][name] for one in students]))

    upper = mean(guarded, "upper")
    gap = float(np.mean([one.told["gap"] for one in guarded]))
    return Faith(mean(guarded, "lower"), upper, upper / mean(clean, "upper"), gap)


def lift_bounds(
    pairs: Sequence[tuple[NDArray[np.bool_], NDArray[np.bool_]]], *, seed: int = 0
) -> tuple[float, float]:
    """One-sided 95 % bounds of the mean difference of two rates, by a two-level bootstrap: seeds,
    and, within each, the images that both were judged on."""
    draw = np.random.default_rng(seed)
    counts = []
    for one, other in pairs:
        change = one.astype(int) - other.astype(int)
        counts.append([int((change == value).sum()) for value in (-1, 0, 1)])
    shares = np.array(counts, float)
    sizes = shares.sum(1)
    found = np.empty(DRAWS)
    for number in range(DRAWS):
        chosen = draw.integers(len(pairs), size=len(pairs))
        means = []
        for which in chosen:
            drawn = draw.multinomial(int(sizes[which]), shares[which] / sizes[which])
            means.append((drawn[2] - drawn[0]) / sizes[which])
        found[number] = np.mean(means)
    return float(np.quantile(found, 1 - CONFIDENCE)), float(np.quantile(found, CONFIDENCE))


def valid(undefended: Sequence[Judged], clean: Sequence[Judged]) -> bool:
    """Whether the attack survives distillation, beyond what a clean teacher's student does."""
    lifts = [one.asr - other.asr for one, other in zip(undefended, clean, strict=True)]
    return float(np.mean(lifts)) >= VALID
