"""Altered proofs about networks of two pixels, held against enumeration of activation patterns.

No alteration may be accepted whose bound is below the exact gap. Numbers are altered at random and
by a search that keeps what lowers the bound: it may write any multiplier, slope or split, divide
leaves further, and tells the file's second account of the tree accordingly.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.proof.alter import MULTIPLIERS, Case, groups, pick, regrouped
from benchmarks.soundness import networks, planar
from mlflow_kdguard.certify import Ball, join, keep, relax
from mlflow_kdguard.certify.proofs import Writer
from mlflow_kdguard.errors import CertificateError, KDGuardError
from mlflow_kdguard.graph import Graph
from mlflow_kdguard.proof import Checker, Claim, Proof
from mlflow_kdguard.proof.lower import joined

Pair = tuple[Graph, Graph]
RADII, NODES = (0.01, 0.05, 0.2, 0.6), 24
TIE = 1e-12
"""What float64 may add to the enumerated gap."""
BITS = (0, 1, 0x3C00, 0x7BFF, 0x7C00, 0x7E00, 0x8000, 0xBC00, 0xFBFF, 0xFFFF)
"""Of float16: 0, the least, 1, the largest, infinity, NaN, and negative ones."""
SINGLES = (0.0, -0.0, 1e-45, 1e-30, 1.0, 1e6, 3e38, -1.0, -3e38)
DOUBLES = (5e-324, 1e-300, -1e-12, 1.0, -30.0, 700.0, -700.0, 1e308, -1e308)


@dataclass(frozen=True, slots=True, eq=False)
class Tiny:
    """A proof about two tiny networks, its checker, and the exact gap (`case.witness`)."""

    checker: Checker
    case: Case


def made(number: int, *, scales: tuple[float, ...] = networks.SCALES) -> Tiny | None:
    """A proof of the pair that follows from `number`; None where nothing can be bounded."""
    draw = np.random.default_rng((4, number))
    seeds, scale = draw.integers(2**31, size=2), float(draw.choice(scales))
    reference, student = (networks.planar(np.random.default_rng(int(s)), scale) for s in seeds)
    if reference.classes != student.classes:
        student = networks.planar(np.random.default_rng(int(seeds[0])), scale * 1.1)
    eps = float(draw.choice(RADII))
    x = draw.uniform(-0.2, 1.2, (1, 1, 2)).clip(0, 1).astype(np.float32)
    ball = Ball.around(torch.from_numpy(x)[None], eps=eps, norm="linf")
    kept, joint = keep.Kept(), join(reference, student, device=torch.device("cpu"))
    method = ("branch", "crown")[number % 3 == 0]
    try:
        relax.PROVABLE[method](joint, ball, None, NODES, kept=kept)
    except KDGuardError:
        return None
    checker = Checker(reference, student, joined(reference, student))
    claim = Claim("0" * 64, "0" * 64, "0" * 64, "", 0, "linf", eps, "all", 1.0)
    proof = Writer(checker, joint, claim).write(kept, 0, 0, x)
    lo, hi = (end.flatten().numpy() for end in ball.inner())
    exact, _ = planar.largest_gap(reference, student, lo, hi)
    return Tiny(checker, Case(proof, x, exact))


def lowest(tiny: Tiny, draw: np.random.Generator, steps: int) -> tuple[float, int]:
    """The least bound that the search for alterations finds, and how many were judged sound."""
    best, proof, judged = tiny.checker.bound(tiny.case.proof, tiny.case.image), tiny.case.proof, 0
    for _ in range(steps):
        changed = proof
        try:
            for _ in range(1 + pick(draw, 3)):
                changed = _moved(changed, tiny.checker, draw)
            bound = tiny.checker.bound(Proof.from_bytes(changed.to_bytes()), tiny.case.image)
        except CertificateError:
            continue
        judged += 1
        if bound <= best:
            best, proof = bound, changed
    return best, judged


def _moved(proof: Proof, checker: Checker, draw: np.random.Generator) -> Proof:
    """One step of the search."""
    if draw.random() < 0.25:
        return _divided(proof, checker, draw)
    if draw.random() < 0.4 and len(proof.gaps.steep):
        field = MULTIPLIERS[pick(draw, 3)]
        values = getattr(proof.gaps, field).copy()
        at = tuple(pick(draw, side) for side in values.shape)
        values[at] = _number(values[at], field == "where", draw)
        return replace(proof, gaps=replace(proof.gaps, **{field: values}))
    field = str(draw.choice(["theta", "theta", "theta", "value", "column", "node", "at", "number"]))
    some = groups(proof, field)
    if not some:
        return proof
    name = str(draw.choice(sorted(some)))
    values = getattr(some[name], field).copy()
    at = tuple(pick(draw, side) for side in values.shape)
    if field == "theta":
        values[at] = _number(values[at], True, draw)
    elif field == "value":
        values[at] = draw.choice(DOUBLES) if draw.random() < 0.4 else draw.normal() * 5
    else:
        values[at] = abs(int(values[at]) + int(draw.integers(-2, 3)))
    return regrouped(proof, name, replace(some[name], **{field: values}).told())


def _number(old: Any, bits: bool, draw: np.random.Generator) -> Any:
    if bits:
        return draw.choice(BITS) if draw.random() < 0.5 else draw.integers(1 << 16)
    return (
        draw.choice(SINGLES)
        if draw.random() < 0.3
        else np.float32(min(float(old) * draw.lognormal(0, 2), 3e38))
    )


def _divided(proof: Proof, checker: Checker, draw: np.random.Generator) -> Proof:
    """A leaf is divided once more; both parts take its multipliers."""
    some = groups(proof, "at")
    if not some:
        return proof
    name = str(draw.choice(sorted(some)))
    trees, which = some[name], pick(draw, len(some[name].at))
    tree, columns = int(trees.owner[which]), checker.net.width
    width = columns + (1 + checker.net.classes if name == "g" else 0)
    column = int(draw.integers(max(width, 1)))
    value = 0.0 if column < columns else float(draw.choice([*DOUBLES, *draw.normal(size=9) * 4]))
    end, own = int(trees.splits[: tree + 1].sum()), int(trees.splits[tree])
    new, node = np.array([2 * own + 1, 2 * own + 2]), int(trees.at[which])
    ends = np.cumsum(trees.evaluations)
    rest = np.delete(np.arange(len(trees.at)), which)
    place = int(ends[tree]) - 1
    order = np.concatenate((rest[:place], [which, which], rest[place:]))
    at = np.delete(trees.at, which)
    one = np.arange(len(trees.splits)) == tree
    grown = replace(
        trees, splits=trees.splits + one, evaluations=trees.evaluations + one,
        node=np.insert(trees.node, end, node), column=np.insert(trees.column, end, column),
        value=np.insert(trees.value, end, value), at=np.insert(at, [place, place], new),
        theta=trees.theta[order],
    )  # fmt: skip
    proof = regrouped(proof, name, grown.told())
    if name != "g":
        return proof
    parts = {part: getattr(proof.gaps, part)[order] for part in MULTIPLIERS}
    return replace(proof, gaps=replace(proof.gaps, **parts))
