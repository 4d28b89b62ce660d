"""Ways to alter proofs: what a file says twice, what is about something else, and numbers."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.certify.proofs import RAISED
from mlflow_kdguard.proof import Gaps, Proof, Trees

Floats = NDArray[np.float32]
Draw = np.random.Generator
MULTIPLIERS = ("where", "steep", "weights")


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A proof, its image, and the largest gap known there."""

    proof: Proof
    image: Floats
    witness: float


Altered = tuple[Proof, Floats]


def pick(draw: Draw, count: int) -> int:
    """One of `count` things."""
    return int(draw.integers(max(count, 1)))


def groups(proof: Proof, field: str = "number") -> dict[str, Trees]:
    """All trees of a proof by the name of their group, where they have any of `field`."""
    hidden = {str(index): trees for index, trees in proof.hidden.items()}
    whole = {**hidden, "r": proof.margins[0], "s": proof.margins[1], "g": proof.gaps.trees}
    return {name: trees for name, trees in whole.items() if getattr(trees, field).size}


def regrouped(proof: Proof, name: str, trees: Trees) -> Proof:
    """The proof with other trees in one group."""
    if name == "g":
        return replace(proof, gaps=replace(proof.gaps, trees=trees))
    if name in "rs":
        first, second = proof.margins
        return replace(proof, margins=(trees, second) if name == "r" else (first, trees))
    return replace(proof, hidden={**proof.hidden, int(name): trees})


def without(trees: Trees, which: int) -> Trees:
    """The trees without one evaluation."""
    counts = trees.evaluations.copy()
    counts[trees.owner[which]] -= 1
    at, theta = np.delete(trees.at, which), np.delete(trees.theta, which, axis=0)
    return replace(trees, evaluations=counts, at=at, theta=theta)


class AbsentError(Exception):
    """A proof has nothing of the kind that was to be altered."""


def _some(proof: Proof, draw: Draw, field: str) -> tuple[dict[str, Trees], str]:
    some = groups(proof, field)
    if not some:
        raise AbsentError
    return some, sorted(some)[pick(draw, len(some))]


def leaf(case: Case, _: Case, draw: Draw) -> Altered:
    """What bounds one leaf is taken away."""
    some, name = _some(case.proof, draw, "at")
    which = pick(draw, len(some[name].at))
    proof = regrouped(case.proof, name, without(some[name], which))
    if name == "g":
        parts = {part: np.delete(getattr(proof.gaps, part), which, axis=0) for part in MULTIPLIERS}
        proof = replace(proof, gaps=replace(proof.gaps, **parts))
    return proof, case.image


def phase(case: Case, _: Case, draw: Draw) -> Altered:
    """One step to one leaf is turned: on is off, the upper part the lower one."""
    some, name = _some(case.proof, draw, "node")
    fixed = some[name].fixed.copy()
    fixed[pick(draw, len(fixed))] ^= 1
    return regrouped(case.proof, name, replace(some[name], fixed=fixed)), case.image


def claim(case: Case, _: Case, draw: Draw) -> Altered:
    """The claim is lowered, by more than what it exceeds the checker's bound by."""
    upper = max(case.proof.claim.upper - 2 * RAISED, 0.0) * draw.uniform(0.0, 0.99999)
    return replace(case.proof, claim=replace(case.proof.claim, upper=float(upper))), case.image


def network(case: Case, _: Case, draw: Draw) -> Altered:
    """A weight is changed, and so a digest."""
    side = ("reference", "student")[pick(draw, 2)]
    return replace(case.proof, claim=replace(case.proof.claim, **{side: "1" * 64})), case.image


def image(case: Case, other: Case, _: Draw) -> Altered:
    """Another image is put in its place."""
    return case.proof, other.image


def radius(case: Case, _: Case, draw: Draw) -> Altered:
    """The ball is made larger."""
    eps = case.proof.claim.eps * draw.uniform(1.05, 2.0)
    return replace(case.proof, claim=replace(case.proof.claim, eps=float(eps))), case.image


def _changed(case: Case, draw: Draw, field: str, *, told: bool = False) -> Altered:
    some, name = _some(case.proof, draw, field)
    values = getattr(some[name], field).copy()
    at = tuple(pick(draw, side) for side in values.shape)
    if field == "theta":
        values[at] = draw.integers(1 << 16)
    elif field == "value":
        intervals = np.flatnonzero(values)
        values[intervals[pick(draw, len(intervals))] if len(intervals) else at] += draw.normal()
    else:
        values[at] += (-1, 1)[pick(draw, 2)] if values[at] else 1
    trees = replace(some[name], **{field: values})
    return regrouped(case.proof, name, trees.told() if told else trees), case.image


def _multiplier(case: Case, draw: Draw) -> Altered:
    field = MULTIPLIERS[pick(draw, len(MULTIPLIERS))]
    values = getattr(case.proof.gaps, field).copy()
    if not values.size:
        return _changed(case, draw, "theta")
    at = tuple(pick(draw, side) for side in values.shape)
    values[at] = draw.integers(1 << 16) if field == "where" else values[at] * draw.lognormal(0, 3)
    changed: dict[str, Any] = {item.name: getattr(case.proof.gaps, item.name)
                               for item in fields(Gaps)} | {field: values}  # fmt: skip
    return replace(case.proof, gaps=Gaps(**changed)), case.image


Kind = Callable[[Case, Case, Draw], Altered]

STRUCTURE: dict[str, Kind] = {
    "leaf removed": leaf,
    "phase flipped": phase,
    "claim lowered": claim,
    "weight changed": network,
    "image swapped": image,
    "switch changed": lambda case, _, draw: _changed(case, draw, "column"),
    "parent changed": lambda case, _, draw: _changed(case, draw, "node"),
    "leaf exchanged": lambda case, _, draw: _changed(case, draw, "at"),
    "question changed": lambda case, _, draw: _changed(case, draw, "number"),
    "splits miscounted": lambda case, _, draw: _changed(case, draw, "splits"),
}
"""Damage that must always be refused."""
NUMBERS: dict[str, Kind] = {
    "ball widened": radius,
    "band moved": lambda case, _, draw: _changed(case, draw, "value"),
    "slope or push changed": lambda case, _, draw: _changed(case, draw, "theta"),
    "multiplier changed": lambda case, _, draw: _multiplier(case, draw),
    "switch changed, leaves too": lambda case, _, draw: _changed(case, draw, "column", told=True),
    "parent changed, leaves too": lambda case, _, draw: _changed(case, draw, "node", told=True),
}
"""Alterations that are judged anew: accepted where the claim still follows."""
KINDS = STRUCTURE | NUMBERS
