"""Branch and bound over programs: a solver chooses multipliers and where to split, and no more.

A node is a linear program over a part of a question. Its bound is what the answer's multipliers
prove (`solvers.dual`), or its parent's where they prove less; a node that the answer proves empty
is dropped. An answer that proves nothing leaves the node as it is. The bound of an image is the
largest of all nodes, so that the search can end at any time. The solver's own tree is not used:
its dual bound could only be believed.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from time import monotonic

import numpy as np

from mlflow_kdguard.certify.milp.encode import NONE
from mlflow_kdguard.certify.milp.question import Layout, Node, Question
from mlflow_kdguard.solvers import dual
from mlflow_kdguard.solvers.adapter import Answer, Limits
from mlflow_kdguard.solvers.model import Floats, Model

SECONDS = 30.0
"""Time limit of one linear program."""
ROUNDS = 3
"""Times that a program is solved at most, with tangents added where they were missed: those of a
whole question, and those of which nothing else is left to improve."""
MISSED = 1e-4
"""By how much a tangent may be missed, in confidence."""
RELATIVE, ABSOLUTE = 0.02, 1e-3
"""A bound that exceeds the largest gap found by no more than that is left alone."""
SPLITTABLE = 1e-6
"""Scores below that are noise of the solver."""
LEAST_PRICE = 1e-3
"""What a switch counts for at least, in confidence for each unit of its value."""

Ask = Callable[[Model, Limits, Floats], Answer]
Gap = Callable[[Floats], float]


@dataclass(slots=True)
class Tree:
    """Bounds of all questions about one image, the worst first.

    `bounds`: what is known of each question; `branching`: whether nodes are split at all; `gap`:
    the real gap at a point of the image's box; `nodes`: linear programs at most; `until`: when to
    end (monotonic seconds).
    """

    questions: list[Question]
    bounds: list[float]
    ask: Ask
    gap: Gap
    branching: bool
    nodes: int
    until: float = float("inf")
    floor: float = 0.0
    best: Floats | None = None
    spent: int = 0
    closed: float = -float("inf")
    trace: list[tuple[float, float]] = field(default_factory=list)
    _open: list[tuple[float, int, int, Node]] = field(default_factory=list)
    _tie: "count[int]" = field(default_factory=count)

    def run(self) -> float:
        """The image's bound."""
        for number, (question, bound) in enumerate(zip(self.questions, self.bounds, strict=True)):
            if question.fits:
                self._push(number, question.root(bound))
            else:
                self.closed = max(self.closed, bound)
        while self._open and self.spent < self.nodes and monotonic() < self.until:
            if self._worst() <= self._enough() or self.closed >= self._worst():
                break
            _, _, number, node = heapq.heappop(self._open)
            if not node.solved:
                found = self._solved(self.questions[number], node)
                if found is not None:
                    self._push(number, found)
            elif node.branch is None or not self.branching:
                self.closed = max(self.closed, node.bound)
            else:
                for child in node.children():
                    self._push(number, child)
            self.trace.append((monotonic(), max(self.closed, self._worst())))
        return max(self.closed, self._worst())

    def _push(self, number: int, node: Node) -> None:
        heapq.heappush(self._open, (-node.bound, next(self._tie), number, node))

    def _worst(self) -> float:
        return -self._open[0][0] if self._open else -float("inf")

    def _enough(self) -> float:
        return max(self.floor * (1.0 + RELATIVE), self.floor + ABSOLUTE)

    def _solved(self, question: Question, node: Node) -> Node | None:
        """The node with its bound and what to split next; None where it is empty."""
        whole = node.bound == max(self.bounds) or self.spent < len(self.questions)
        for left in range(ROUNDS, 0, -1):
            limits = Limits(seconds=max(0.1, min(SECONDS, self.until - monotonic())))
            model, at = question.program(node)
            answer = self.ask(model, limits, node.basis)
            self.spent += 1
            if answer.status == "infeasible" and dual.empty(model, answer.y):
                return None
            bound = min(node.bound, dual.upper(model, answer.y))
            node = replace(node, bound=bound, basis=answer.basis, branch=None)
            if answer.x.shape != model.lo.shape or not np.isfinite(answer.x).all():
                break
            x = np.clip(answer.x, model.lo, model.hi)
            self._look(question, x)
            node = replace(node, branch=_branch(question, node, at, x, answer.y))
            if left == 1 or self.spent >= self.nodes or not _missed(question, at, x):
                break
            if not whole and node.branch is not None:
                break
        return replace(node, solved=True)

    def _look(self, question: Question, x: Floats) -> None:
        """The gap at the point of the image that the answer names."""
        pixels = question.encoded.pixels
        point = np.where(pixels == NONE, np.nan, x[pixels])
        value = self.gap(point)
        if value > self.floor:
            self.floor, self.best = value, point


def _missed(question: Question, at: Layout, x: Floats) -> bool:
    """Add tangents where the answer lies below the functions that they stand for."""
    most, scale = question.mass(question.a)[1], question.mass(question.b)[1]
    a, top = x[at.a], question.a[1]
    worth = np.exp(top) / (1.0 + most * x[at.s]) ** 2
    short = (np.exp(a - top) - x[at.e]) * worth
    added = [("e", int(j), float(a[j])) for j in np.flatnonzero(short > MISSED)]
    if 1.0 / (1.0 + scale * x[at.t]) - x[at.low] > MISSED:
        added.append(("t", 0, float(x[at.t])))
    question.tangents += added
    return bool(added)


def _branch(
    question: Question, node: Node, at: Layout, x: Floats, y: Floats
) -> tuple[str, int, float] | None:
    """What accounts for most of the difference of the program's value and the truth at its point.

    A chord's share is by how much the point exceeds the function, times the row's multiplier.
    """
    known = question.encoded
    choices: list[tuple[float, str, int, float]] = []
    rows = known.model.shape[0]
    if len(known.z):
        z = x[known.z]
        price = np.abs(y[rows : rows + len(z)]) if len(y) > rows else np.ones(len(z))
        # Where a box of the margins binds too, the price can be 0 and the switch matter.
        excess = (x[known.y] - np.maximum(z, known.low)) * np.maximum(price, LEAST_PRICE)
        excess[(node.z_lo >= known.low) | (node.z_hi <= known.low)] = 0.0
        j = int(excess.argmax())
        choices.append((float(excess[j]), "z", j, float(known.low[j])))
    scale = question.mass(question.b)[1]
    slope = scale / (1.0 + scale * x[at.t]) ** 2
    weights = np.exp(question.b[1]) / scale
    b = x[at.b]
    excess = (x[at.f] - np.exp(b - question.b[1])) * weights * slope
    j = int(excess.argmax())
    choices.append((float(excess[j]), "b", j, _inner(b[j], node.b_lo[j], node.b_hi[j])))
    truth = 1.0 / (1.0 + question.mass(question.a)[1] * x[at.s])
    s = _inner(x[at.s], node.s_lo, node.s_hi)
    choices.append((float(x[at.high] - truth), "s", 0, s))
    best = max(choices)
    return best[1:] if best[0] > SPLITTABLE else None


def _inner(point: float, lo: float, hi: float) -> float:
    """The point, kept away from both ends of its interval."""
    return float(min(max(point, lo + 0.2 * (hi - lo)), hi - 0.2 * (hi - lo)))
