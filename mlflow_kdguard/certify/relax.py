"""Upper bounds of the confidence gap by linear relaxation: the built-in rows of table "bound".

A bound is called with a joint graph, balls around B images and the classes that are asked for,
and returns `Bounds`. Solvers are meant to become further rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mlflow_kdguard.certify import branch as search
from mlflow_kdguard.certify import gap
from mlflow_kdguard.certify.ball import Ball
from mlflow_kdguard.certify.joint import Joint
from mlflow_kdguard.certify.propagate import relax


@dataclass(frozen=True, slots=True, eq=False)
class Bounds:
    """Upper bounds of max |p_S,k - p_R,k| over the ball (and over k): `upper`, float64 B in [0, 1].

    `nodes`: subproblems an image. `worst`: B×C×H×W, for each image a point at which the bound is
    attained (where a witness search should look), or None.
    """

    upper: Tensor
    nodes: int
    worst: Tensor | None = None


NODES = 400
"""What the configuration asks for where it says nothing."""


class Bound(Protocol):
    """One row of table "bound"."""

    def __call__(
        self, joint: Joint, ball: Ball, classes: Tensor | None, nodes: int = NODES
    ) -> Bounds:
        """Bound the gap of class `classes` (int64 B), or of all classes where that is None.

        `nodes`: subproblems an image at most, where the bound has any.
        """
        ...


def interval(joint: Joint, ball: Ball, classes: Tensor | None, nodes: int = NODES) -> Bounds:
    """Interval arithmetic (Gowal et al., arXiv 1810.12715) on both networks and their margins."""
    with _plain_arithmetic(ball.centre.device):
        known = relax(joint, ball, tighten=False)
        return Bounds(gap.bounded(known, classes, gap.by_boxes).upper, 1)


def crown(joint: Joint, ball: Ball, classes: Tensor | None, nodes: int = NODES) -> Bounds:
    """Joint CROWN (arXiv 1811.00866) with folded margins; see `docs/reference/certify.md`."""
    with _plain_arithmetic(ball.centre.device):
        found = gap.bounded(relax(joint, ball, tighten=True), classes, gap.by_planes)
        return Bounds(found.upper, 1, found.worst)


def branch(joint: Joint, ball: Ball, classes: Tensor | None, nodes: int = NODES) -> Bounds:
    """Branch and bound over Relus and confidences; see `mlflow_kdguard.certify.branch`."""
    with _plain_arithmetic(ball.centre.device):
        relaxed = relax(joint, ball, tighten=True)
        return Bounds(*search.bounds(relaxed, classes, search.Budget(nodes)))


@contextmanager
def _plain_arithmetic(device: torch.device) -> Iterator[None]:
    """Sums of products only, which the rounding margin is made for: cuDNN may transform instead.

    The flag is global, so that on a GPU one bound runs at a time (`parallel.workers`).
    """
    plain = torch.backends.cudnn.flags(enabled=False) if device.type == "cuda" else nullcontext()
    with torch.no_grad(), plain:
        yield
