"""Proofs about tiny networks, and ways to alter them."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from mlflow_kdguard.certify import Ball, join, keep, relax
from mlflow_kdguard.certify.proofs import Writer
from mlflow_kdguard.graph import Graph
from mlflow_kdguard.proof import Checker, Claim, Gaps, Proof, Trees
from mlflow_kdguard.proof.lower import joined

Pair = tuple[Graph, Graph]


def written(
    models: Pair,
    x: np.ndarray,
    eps: float,
    *,
    method: str = "branch",
    nodes: int = 60,
    klass: int | None = None,
    norm: Any = "linf",
) -> tuple[Checker, Proof, float]:
    """A checker, a proof about image `x` (C×H×W), and the bound that the search reported."""
    joint = join(*models, device=torch.device("cpu"))
    ball = Ball.around(torch.from_numpy(x)[None], eps=eps, norm=norm)
    kept = keep.Kept()
    top = None if klass is None else torch.tensor([klass])
    upper = relax.PROVABLE[method](joint, ball, top, nodes, kept=kept).upper
    checker = Checker(*models, joined(*models))
    classes: Any = "all" if klass is None else "top"
    claim = Claim("0" * 64, "0" * 64, "0" * 64, "", 0, norm, eps, classes, 1.0)
    proof = Writer(checker, joint, claim).write(kept, 0, 0, x)
    return checker, proof, float(upper[0])


def groups(proof: Proof) -> dict[str, Trees]:
    """All trees of a proof by the name of their group."""
    hidden = {str(index): trees for index, trees in proof.hidden.items()}
    return {
        **hidden, "reference": proof.margins[0], "student": proof.margins[1],
        "gap": proof.gaps.trees,
    }  # fmt: skip


def regrouped(proof: Proof, name: str, trees: Trees) -> Proof:
    """The proof with other trees in one group."""
    if name == "gap":
        return replace(proof, gaps=replace(proof.gaps, trees=trees))
    if name in ("reference", "student"):
        first, second = proof.margins
        return replace(proof, margins=(trees, second) if name == "reference" else (first, trees))
    return replace(proof, hidden={**proof.hidden, int(name): trees})


def without_evaluation(proof: Proof, which: int) -> Proof:
    """The proof without one evaluation of the gap."""
    gaps, trees = proof.gaps, proof.gaps.trees
    counts = trees.evaluations.copy()
    counts[trees.owner[which]] -= 1
    fewer = replace(
        trees, evaluations=counts, at=np.delete(trees.at, which),
        theta=np.delete(trees.theta, which, axis=0),
    )  # fmt: skip
    parts = {
        item.name: np.delete(getattr(gaps, item.name), which, axis=0)
        for item in fields(Gaps)
        if item.name != "trees"
    }
    return replace(proof, gaps=Gaps(fewer, **parts))
