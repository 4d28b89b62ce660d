"""Proofs without what they do not need: only parts whose bound is needed for the claim are left.

From the root of a gap's tree downwards, the first node that is bounded within the claim is made a
leaf, with the one evaluation that says so. What is left is needed: without it, a leaf has no bound
within the claim.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from mlflow_kdguard.proof import Gaps, Proof
from mlflow_kdguard.proof.arithmetic import Array


@dataclass(slots=True, eq=False)
class _Kept:
    """Splits (their numbers) and evaluations (theirs, and their nodes) of one tree that stay."""

    node: list[int] = field(default_factory=list)
    split: list[int] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    evaluation: list[int] = field(default_factory=list)


def pruned(proof: Proof, values: Array, known: Array, within: float) -> Proof:
    """The proof with the smallest trees of gaps whose leaves are all bounded by `within`.

    `values`: bounds of all evaluations; `known`: what bounds every node anyway.
    """
    gaps, trees = proof.gaps, proof.gaps.trees
    first, kept = np.cumsum(trees.splits) - trees.splits, []
    for tree, start in enumerate(trees.offsets[:-1].tolist()):
        count, begin = int(trees.splits[tree]), int(first[tree])
        splits = dict(zip(trees.node[begin : begin + count].tolist(), range(count), strict=True))
        kept.append(_tree(splits, known[start:], _best(proof, tree, values), within))
    rows = np.array([i for k in kept for i in k.evaluation], dtype=np.int64)
    split = np.array(
        [int(f) + i for f, k in zip(first, kept, strict=True) for i in k.split], dtype=np.int64
    )
    smaller = replace(
        trees,
        splits=np.array([len(k.split) for k in kept], dtype=np.int64),
        node=np.array([n for k in kept for n in k.node], dtype=np.int64),
        column=trees.column[split], value=trees.value[split],
        evaluations=np.array([len(k.at) for k in kept], dtype=np.int64),
        at=np.array([n for k in kept for n in k.at], dtype=np.int64), theta=trees.theta[rows],
    )  # fmt: skip
    fewer = Gaps(smaller.told(), gaps.where[rows], gaps.steep[rows], gaps.weights[rows])
    return replace(proof, gaps=fewer)


def _best(proof: Proof, tree: int, values: Array) -> dict[int, tuple[float, int]]:
    """The least bound of each node that is evaluated, and which evaluation it is."""
    trees, best = proof.gaps.trees, dict[int, tuple[float, int]]()
    for which in np.flatnonzero(trees.owner == tree).tolist():
        node, value = int(trees.at[which]), float(values[which])
        best[node] = min(best.get(node, (np.inf, -1)), (value, which))
    return best


def _tree(
    splits: dict[int, int], known: Array, best: dict[int, tuple[float, int]], within: float
) -> _Kept:
    """One tree; `splits`: number of the split of each node that is divided."""
    kept, waiting, place = _Kept(), [0], {0: 0}
    for old in waiting:  # grows
        value, which = best.get(old, (np.inf, -1))
        if known[old] <= within:
            continue
        if value <= within or old not in splits:
            if which >= 0:
                kept.at.append(place[old])
                kept.evaluation.append(which)
            continue
        turn, child = len(kept.split), 2 * splits[old] + 1
        kept.node.append(place[old])
        kept.split.append(splits[old])
        place |= {child: 2 * turn + 1, child + 1: 2 * turn + 2}
        waiting += [child, child + 1]
    return kept
