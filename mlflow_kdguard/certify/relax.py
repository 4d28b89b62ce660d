"""Upper bounds of the confidence gap by linear relaxation: the built-in rows of table "bound".

A bound is called with a joint graph, balls around B images and the classes that are asked for,
and returns `Bounds`. Solvers are meant to become further rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from mlflow_kdguard.certify import anytime, gap
from mlflow_kdguard.certify.ball import Ball
from mlflow_kdguard.certify.budget import AIM, Aim, Budget, Limit, Limits
from mlflow_kdguard.certify.joint import Joint
from mlflow_kdguard.certify.keep import Kept
from mlflow_kdguard.certify.propagate import relax
from mlflow_kdguard.certify.witness import Effort
from mlflow_kdguard.certify.witness import search as attack


@dataclass(frozen=True, slots=True, eq=False)
class Bounds:
    """Upper bounds of max |p_S,k - p_R,k| over the ball (and over k): `upper`, float64 B in [0, 1].

    `nodes`: subproblems an image. `worst`: B×C×H×W, for each image a point at which the bound is
    attained (where a witness search should look), or None. `stopped`: by which limit the search of
    each image was ended, if by any; None where that is not known.
    """

    upper: Tensor
    nodes: int
    worst: Tensor | None = None
    stopped: tuple[Limit | None, ...] | None = None


ATTACK = Effort(steps=20, restarts=8)
"""The attack before a search."""
NO_LIMITS = Limits()
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


class Provable(Protocol):
    """A bound that can leave behind what a proof needs."""

    def __call__(
        self,
        joint: Joint,
        ball: Ball,
        classes: Tensor | None,
        nodes: int = NODES,
        *,
        kept: Kept | None = None,
    ) -> Bounds:
        """As a Bound; `kept` receives splits and parameters."""
        ...


class Anytime(Protocol):
    """A bound that can be ended early, and then returns the best that it has."""

    def __call__(
        self,
        joint: Joint,
        ball: Ball,
        classes: Tensor | None,
        nodes: int = NODES,
        *,
        kept: Kept | None = None,
        limits: Limits = NO_LIMITS,
        aim: Aim = AIM,
    ) -> Bounds:
        """As a Provable; `limits` may end it, and so does a bound that meets the `aim`."""
        ...


def interval(joint: Joint, ball: Ball, classes: Tensor | None, nodes: int = NODES) -> Bounds:
    """Interval arithmetic (Gowal et al., arXiv 1810.12715) on both networks and their margins."""
    with plain_arithmetic(ball.centre.device):
        known = relax(joint, ball, tighten=False)
        return Bounds(gap.bounded(known, classes, gap.by_boxes).upper, 1)


def crown(
    joint: Joint,
    ball: Ball,
    classes: Tensor | None,
    nodes: int = NODES,
    *,
    kept: Kept | None = None,
) -> Bounds:
    """Joint CROWN (arXiv 1811.00866) with folded margins; see `docs/reference/certify.md`."""
    with plain_arithmetic(ball.centre.device):
        relaxed = replace(relax(joint, ball, tighten=True), kept=kept)
        found = gap.bounded(relaxed, classes, gap.by_planes)
        return Bounds(found.upper, 1, found.worst)


def branch(
    joint: Joint,
    ball: Ball,
    classes: Tensor | None,
    nodes: int = NODES,
    *,
    kept: Kept | None = None,
    limits: Limits = NO_LIMITS,
    aim: Aim = AIM,
) -> Bounds:
    """Branch and bound over Relus and confidences; see `mlflow_kdguard.certify.branch`.

    A short attack comes first, so that the search knows what it need not go below. `kept` receives
    what a proof needs. Attack and roots are never cut short: `limits` ends what comes after.
    """
    points = attacked(joint, ball, classes)
    with plain_arithmetic(ball.centre.device):
        reference, student = (torch.softmax(z, 1) for z in joint.logits(points))
        gaps = (student - reference).abs()
        floor = gaps.amax(1) if classes is None else gaps.gather(1, classes[:, None])[:, 0]
        relaxed = replace(relax(joint, ball, tighten=True), kept=kept)
        found = anytime.bounds(relaxed, classes, Budget(nodes, limits, aim), floor)
        return Bounds(found.upper, found.nodes, found.best, found.stopped)


def attacked(joint: Joint, ball: Ball, classes: Tensor | None) -> Tensor:
    """Points of the largest gaps that a short attack finds (B×C×H×W), the same every time."""
    generator = torch.Generator().manual_seed(0)
    quick = joint.cast(torch.float32, ball.centre.device)
    return attack(quick, ball, classes, effort=ATTACK, generator=generator)


PROVABLE: dict[str, Provable] = {"crown": crown, "branch": branch}
"""Rows of the table whose bounds can be proved."""
ANYTIME: dict[str, Anytime] = {"branch": branch}
"""And those that a limit ends with what they have."""


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """Sums of products only, which the rounding margin is made for: cuDNN may transform instead.

    The flag is global, so that on a GPU one bound runs at a time (`parallel.workers`).
    """
    plain = torch.backends.cudnn.flags(enabled=False) if device.type == "cuda" else nullcontext()
    with torch.no_grad(), plain:
        yield
