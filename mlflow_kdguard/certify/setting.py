"""What all nodes of some images share, and what a node's parameters say in float64."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlflow_kdguard.certify import confidence
from mlflow_kdguard.certify.backward import Relaxed
from mlflow_kdguard.certify.joint import Index, Joint
from mlflow_kdguard.certify.margins import Items
from mlflow_kdguard.certify.nodes import Nodes
from mlflow_kdguard.certify.quick import Balls, Columns, Passes, Switches
from mlflow_kdguard.certify.rounding import gamma
from mlflow_kdguard.certify.split import Multipliers, Rows, joint_bound

STEEPEST = 1e3
"""A steeper line than any derivative of the confidence is what keeps a point inside a band."""

_CELLS = 2_500_000
"""Switches of all rows that go through the passes together: 10 MiB an array."""


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """What all nodes of some images share: the graph in both precisions and its switches."""

    relaxed: Relaxed
    joint: Joint
    columns: Columns
    exact: Switches
    quick: Switches
    balls: Balls

    @classmethod
    def of(cls, relaxed: Relaxed, outputs: tuple[Index, ...]) -> "Setting":
        """The switches behind `outputs`."""
        columns = Columns.of(relaxed, outputs)
        exact = Switches.of(relaxed, columns)
        device = relaxed.ball.centre.device
        quick = relaxed.joint.cast(torch.float32, device)
        return cls(relaxed, quick, columns, exact, exact.to(torch.float32), Balls.of(relaxed))

    def passes(self, image: Tensor, phase: Tensor, outputs: tuple[Index, ...]) -> Passes:
        """Both passes for rows of these images with these phases fixed."""
        passes = Passes(self.joint, self.columns, outputs)
        passes.begin(self.quick.take(image, phase), phase, self.balls.take(image))
        return passes

    def around(self, image: Tensor, phase: Tensor, theta: Tensor) -> Relaxed:
        """The graph in float64 with a row's own slopes, phases and multipliers."""
        # Only what is linear in each phase has any.
        phase = torch.where(self.exact.open_[image], phase, 0)
        fixed = self.exact.take(image, phase)
        value = theta.double()
        low = torch.where(fixed.open_, value.clamp(0.0, 1.0), fixed.low)
        push = value.clamp(min=0.0) * phase
        lines = replace(fixed, low=low).lines(self.columns, self.relaxed, image)
        return replace(
            self.relaxed,
            boxes=[],
            lines=lines,
            pushes=self.columns.cut(push),
            each=torch.arange(len(image), device=image.device),
        )


def at_once(setting: Setting, most: int) -> int:
    """Rows that go through the passes together: `most`, or what leaves each array small enough."""
    return max(1, min(most, _CELLS // max(1, setting.columns.width)))


def chunks(count: int, size: int, device: torch.device) -> list[Tensor]:
    """Numbers 0..count - 1 in parts of at most `size`, about equal; none where there are none."""
    if not count:
        return []
    return list(torch.arange(count, device=device).chunk(-(-count // size)))


def verified(setting: Setting, nodes: Nodes) -> Tensor:
    """Upper bounds of p_H - p_L in the nodes with the multipliers that they hold: float64 N.

    Everything is computed anew in float64, with the rounding errors of `backward` and `confidence`,
    whatever the multipliers are, and never more than what the bands say by themselves. -inf where
    box and band leave nothing.
    """
    box = nodes.high
    at = box.lo + nodes.where.double().clamp(0.0, 1.0) * (box.hi - box.lo)
    upper = confidence.upper_plane(
        box, at, nodes.steep.double().clamp(1e-12, STEEPEST), nodes.high_band
    )
    weights = nodes.weights.double().clamp(min=1e-15)
    lower = confidence.lower_constant(nodes.low, weights, nodes.low_band)
    nothing = weights.new_zeros((len(nodes), 0))
    rows = Rows(
        Items(nodes.image, nodes.klass), nodes.student_high, nodes.high, nodes.low,
        nodes.high, ((nothing, nothing), (nothing, nothing)),
    )  # fmt: skip
    relaxed = setting.around(nodes.image, nodes.phase, nodes.theta)
    chosen = Multipliers(upper.weights, weights, upper.constant + lower)
    value, _ = joint_bound(relaxed, rows, chosen)
    value = torch.minimum(torch.where(value.isnan(), 1.0, value), nodes.plain + gamma(64))
    return torch.where(chosen.constant == -torch.inf, -torch.inf, value)
