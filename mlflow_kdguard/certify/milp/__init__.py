"""Bounds by linear programs: rows "lp" and "milp" of table "bound".

`encode` writes both networks as rows, `question` the confidences, `tree` searches. The solver is
an oracle that nobody believes: it names multipliers, and what they prove is computed here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mlflow_kdguard.certify import branch, confidence, gap, split, trees
from mlflow_kdguard.certify.backward import Relaxed
from mlflow_kdguard.certify.ball import Ball
from mlflow_kdguard.certify.confidence import Margins
from mlflow_kdguard.certify.joint import Joint
from mlflow_kdguard.certify.margins import Items
from mlflow_kdguard.certify.milp.encode import encode
from mlflow_kdguard.certify.milp.question import Cut, Question
from mlflow_kdguard.certify.milp.tree import Ask, Tree
from mlflow_kdguard.certify.parallel import go_on
from mlflow_kdguard.certify.propagate import relax
from mlflow_kdguard.certify.relax import NODES, Bounds, attacked, plain_arithmetic
from mlflow_kdguard.solvers.model import Floats
from mlflow_kdguard.solvers.oracle import Oracle

__all__ = ["Solved", "lp", "milp"]


@dataclass(frozen=True, slots=True)
class Solved:
    """A bound by a solver. `branching`: split nodes, up to `nodes` programs an image.

    `solver`: a row of table "solver"; `until`: monotonic seconds at which to end; what was not
    solved by then keeps its linear bound.
    """

    branching: bool
    solver: str = "highs"
    until: float = float("inf")

    def __call__(
        self, joint: Joint, ball: Ball, classes: Tensor | None, nodes: int = NODES
    ) -> Bounds:
        """Bound the gap of class `classes` (int64 B), or of all classes where that is None."""
        points = attacked(joint, ball, classes)
        with plain_arithmetic(ball.centre.device), Oracle(self.solver, go_on) as oracle:
            found = Questions.of(joint, ball, classes, refining=self.branching)
            upper, spent = [], 0
            for image in range(len(points)):
                tree = found.tree(image, oracle.ask, points, branching=self.branching)
                tree.nodes, tree.until = nodes, self.until
                upper.append(tree.run())
                spent += tree.spent
                if tree.best is not None:
                    points[image] = found.point(image, tree.best)
        gaps = torch.tensor(upper, dtype=torch.float64, device=ball.centre.device)
        return Bounds(gap.sound(gaps, found.relaxed), -(-spent // len(upper)), points)


lp = Solved(branching=False)
milp = Solved(branching=True)


@dataclass(frozen=True, slots=True, eq=False)
class Questions:
    """All classes and directions of B images, with linear bounds and boxes of the margins."""

    relaxed: Relaxed
    start: gap.Directions
    classes: Tensor | None

    @classmethod
    def of(cls, joint: Joint, ball: Ball, classes: Tensor | None, *, refining: bool) -> "Questions":
        """`refining`: boxes of switches and margins shrink by searches of their own first."""
        relaxed = relax(joint, ball, tighten=True)
        count, device = len(ball.centre), ball.centre.device
        image = torch.arange(count, device=device)
        items = Items(image, classes) if classes is not None else Items(
            image.repeat_interleave(joint.classes),
            torch.arange(joint.classes, device=device).repeat(count),
        )  # fmt: skip
        if not refining:
            return cls(relaxed, gap.directions(relaxed, items), classes)
        relaxed = trees.refined(relaxed, branch.HIDDEN_ROUNDS[0])
        start = branch.narrowed(relaxed, items, gap.directions(relaxed, items), 0)
        return cls(relaxed, start, classes)

    def tree(self, image: int, ask: Ask, points: Tensor, *, branching: bool) -> Tree:
        """The search of one image; `points`: B images where gaps are known to be attained."""
        joint, rows = self.relaxed.joint, self.start.rows
        known = encode(self.relaxed, image, (joint.reference, joint.student))
        chosen = split.multipliers(self.start.parameters, rows)
        slack = confidence.margin(joint.classes, chosen.high, rows.high)
        slack = slack + confidence.margin(joint.classes, chosen.low, rows.low)
        questions, bounds = [], []
        for row in (rows.items.image == image).nonzero()[:, 0].tolist():
            ends = [known.outputs[joint.student], known.outputs[joint.reference]]
            high, low = ends if bool(rows.student_high[row, 0]) else ends[::-1]
            constant = float(chosen.constant[row] + slack[row])
            cut = Cut(chosen.high[row].cpu().numpy(), chosen.low[row].cpu().numpy(), constant)
            question = Question(
                known, int(rows.items.klass[row]), high, low,
                _ends(rows.high, row), _ends(rows.low, row), [cut],
            )  # fmt: skip
            questions.append(question)
            bounds.append(min(1.0, float(self.start.upper[row].nan_to_num(1.0))))
        measure = self._measure(image)
        floor = measure(points[image].flatten().cpu().numpy())
        return Tree(questions, bounds, ask, measure, branching, NODES, floor=floor)

    def _measure(self, image: int) -> Callable[[Floats], float]:
        """The gap at a point of the image's box."""

        def gap_at(point: Floats) -> float:
            outputs = self.relaxed.joint.logits(self.point(image, point)[None])
            gaps = (torch.softmax(outputs[1], 1) - torch.softmax(outputs[0], 1)).abs()[0]
            return float(gaps.max() if self.classes is None else gaps[self.classes[image]])

        return gap_at

    def point(self, image: int, pixels: Floats) -> Tensor:
        """Pixels (d, NaN where no network looks) as a point of the image's ball: C×H×W."""
        ball = self.relaxed.ball
        centre = ball.centre[image]
        given = torch.from_numpy(pixels).to(centre).view_as(centre)
        moved = torch.where(given.isnan(), centre, given)
        alone = Ball(centre[None], ball.lo[[image]], ball.hi[[image]], ball.eps, ball.norm)
        return alone.nearest(moved[None])[0]


def _ends(box: Margins, row: int) -> tuple[Floats, Floats]:
    return box.lo[row].cpu().numpy(), box.hi[row].cpu().numpy()
