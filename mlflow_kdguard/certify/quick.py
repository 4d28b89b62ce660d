"""Quick passes in float32 that look for good slopes and multipliers, and promise nothing.

Whatever they find is bounded again by `backward` in float64 before it is believed. A bound is
maximal at one point of the ball, and by the envelope theorem its derivative in every slope and
multiplier is what the relaxed network does at that point: one pass backwards to find the point and
one forwards through it replace automatic differentiation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from mlflow_kdguard.certify import ops
from mlflow_kdguard.certify.backward import Relaxed
from mlflow_kdguard.certify.forms import Form, dense
from mlflow_kdguard.certify.joint import Index, Joint
from mlflow_kdguard.certify.lines import Lines


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """The switches of some operations side by side: M columns, an operation's in one slice."""

    place: dict[Index, slice]
    shapes: dict[Index, tuple[int, ...]]
    width: int

    @classmethod
    def of(cls, relaxed: Relaxed, outputs: Sequence[Index]) -> "Columns":
        """The bent operations that `outputs` depend on and that are not linear everywhere."""
        place, shapes, count = {}, {}, 0
        for index in ancestors(relaxed.joint, outputs):
            lines = relaxed.lines.get(index)
            if lines is None or lines.identity:
                continue
            size = prod(shape := relaxed.joint.ops[index].shape)
            place[index], shapes[index] = slice(count, count + size), shape
            count += size
        return cls(place, shapes, count)

    def cut(self, values: Tensor) -> dict[Index, Tensor]:
        """N×M columns as each operation's N×shape."""
        return {
            index: values[:, where].reshape(len(values), *self.shapes[index])
            for index, where in self.place.items()
        }


def ancestors(joint: Joint, outputs: Sequence[Index]) -> list[Index]:
    """The operations that `outputs` are computed from, in order, themselves included."""
    seen, waiting = set[Index](), list(outputs)
    while waiting:
        index = waiting.pop()
        if index not in seen:
            seen.add(index)
            waiting += joint.ops[index].inputs
    return sorted(seen)


@dataclass(frozen=True, slots=True, eq=False)
class Switches:
    """Lines around every switch of B images (B×M): slope·z + shift above and below.

    `open_`: those that are bent, and linear once a phase is fixed; their lower slope is free.
    """

    up: Tensor
    up_shift: Tensor
    low: Tensor
    low_shift: Tensor
    open_: Tensor

    @classmethod
    def of(cls, relaxed: Relaxed, columns: Columns) -> "Switches":
        """What is known of them."""
        images = len(relaxed.ball.centre)
        parts = [
            _around(relaxed.lines[index], relaxed.joint.ops[index], images)
            for index in columns.place
        ]
        if not parts:
            nothing = relaxed.ball.centre.new_zeros((images, 0))
            return cls(nothing, nothing, nothing, nothing, nothing.bool())
        up, up_shift, low, low_shift, open_ = (torch.cat(p, 1) for p in zip(*parts, strict=True))
        return cls(up, up_shift, low, low_shift, open_ > 0.0)

    def take(self, image: Tensor, phase: Tensor) -> "Switches":
        """The switches of each row's image, with phases (int8 N×M) fixed."""
        fixed, on = phase != 0, (phase > 0).to(self.up.dtype)
        return Switches(
            torch.where(fixed, on, self.up[image]),
            self.up_shift[image].masked_fill(fixed, 0.0),
            torch.where(fixed, on, self.low[image]),
            self.low_shift[image].masked_fill(fixed, 0.0),
            self.open_[image] & ~fixed,
        )

    def to(self, dtype: torch.dtype) -> "Switches":
        """The same numbers in another dtype."""
        up, low = self.up.to(dtype), self.low.to(dtype)
        return Switches(up, self.up_shift.to(dtype), low, self.low_shift.to(dtype), self.open_)

    def lines(self, columns: Columns, relaxed: Relaxed, image: Tensor) -> dict[Index, Lines]:
        """Lines for `backward`, a row each; what has no columns is as it is around each image."""
        up, up_shift = columns.cut(self.up), columns.cut(self.up_shift)
        low, shifts = columns.cut(self.low), columns.cut(self.low_shift)
        low_shift = {
            i: shift if bool((shift != 0.0).any()) else None for i, shift in shifts.items()
        }
        lines = {i: Lines(up[i], up_shift[i], low[i], low_shift[i]) for i in columns.place}
        for index, known in relaxed.lines.items():
            if index not in lines:
                lines[index] = known if known.identity else known.rows(image)
        return lines


def _around(lines: Lines, op: ops.Op, images: int) -> tuple[Tensor, ...]:
    below = torch.zeros_like(lines.upper_shift) if lines.lower_shift is None else lines.lower_shift
    free = (lines.upper_slope > 0.0) & (lines.upper_slope < 1.0) & one_bend(op)
    values = (lines.upper_slope, lines.upper_shift, lines.lower_slope, below, free.double())
    return tuple(v.expand(images, *op.shape).reshape(images, -1) for v in values)


def one_bend(op: ops.Op) -> bool:
    """Whether a phase makes it linear: a Relu, or a maximum of two."""
    return not isinstance(op, ops.Clip) or (op.low == 0.0 and op.high == float("inf"))


@dataclass(frozen=True, slots=True, eq=False)
class Balls:
    """Where each of N rows may look, flat and in float32: centre and radii, or an l2 radius."""

    centre: Tensor
    radius: Tensor
    length: float | None

    @classmethod
    def of(cls, relaxed: Relaxed) -> "Balls":
        """The balls of all images."""
        ball = relaxed.ball
        if ball.norm == "l2":
            centre = ball.centre.flatten(1).float()
            return cls(centre, torch.zeros_like(centre), ball.eps)
        lo, hi = ball.lo.flatten(1), ball.hi.flatten(1)
        return cls(((lo + hi) / 2).float(), ((hi - lo) / 2).float(), None)

    def take(self, image: Tensor) -> "Balls":
        """One a row."""
        return replace(self, centre=self.centre[image], radius=self.radius[image])

    def farthest(self, coef: Tensor) -> Tensor:
        """The point at which each row's plane is highest: N×d."""
        if self.length is None:
            return self.centre + torch.copysign(self.radius, coef)
        size = torch.linalg.vector_norm(coef, dim=1, keepdim=True).clamp(min=1e-30)
        return torch.addcmul(self.centre, coef, self.length / size)


class Passes:
    """Both passes over the operations behind `outputs`, for rows whose lines are set by `begin`."""

    def __init__(self, joint: Joint, columns: Columns, outputs: Sequence[Index]) -> None:
        self.joint, self.columns = joint, columns
        self.order = ancestors(joint, outputs)

    def begin(self, switches: Switches, phase: Tensor, balls: Balls) -> None:
        """Rows with these lines (float32) and phases (int8 N×M)."""
        self.lines, self.balls = switches, balls
        self.free = switches.open_.float()
        self.side = phase.float()
        self.bent_below = bool((switches.low_shift != 0.0).any())

    def down(self, seeds: dict[Index, Tensor], theta: Tensor) -> tuple[Tensor, Tensor]:
        """The bound of each row (N) and the point where it is attained (N×d).

        `theta` (N×M): lower slopes of open switches, non-negative multipliers of fixed ones.
        """
        lines, n = self.lines, len(theta)
        self.low = torch.where(lines.open_, theta, lines.low)
        push = self.side * theta
        self.falls, self.rising = torch.zeros_like(theta), torch.zeros_like(lines.open_)
        self.coef = torch.zeros_like(theta)
        waiting = dict(seeds)
        shift = theta.new_zeros(n)
        for index in reversed(self.order):
            v = waiting.pop(index, None)
            if v is None:
                continue
            op = self.joint.ops[index]
            where = self.columns.place.get(index)
            if index == 0:
                waiting[0] = v
            elif isinstance(op, ops.Linear):
                if op.offset is not None:
                    shift = shift + v.flatten(1) @ op.offset.flatten()
                for source, form in zip(op.inputs, op.pull(Form(v)), strict=True):
                    _push(waiting, source, dense(form, self.joint.ops[source].shape).coef)
            elif where is None:
                _push(waiting, op.inputs[0], v)
            else:
                smaller = isinstance(op, ops.Extreme) and not op.largest
                flat = -v.flatten(1) if smaller else v.flatten(1)
                rises = flat.clamp(min=0.0)
                falls = flat - rises
                self.falls[:, where], self.rising[:, where] = falls, flat > 0.0
                self.coef[:, where] = flat
                shift = shift + torch.linalg.vecdot(rises, lines.up_shift[:, where])
                if self.bent_below:
                    shift = shift + torch.linalg.vecdot(falls, lines.low_shift[:, where])
                bent = (rises * lines.up[:, where]).addcmul_(falls, self.low[:, where])
                bent = (bent + push[:, where]).view_as(v)
                if isinstance(op, ops.Extreme):
                    _push(waiting, op.inputs[0], v + bent if smaller else bent)
                    _push(waiting, op.inputs[1], -bent if smaller else v - bent)
                else:
                    _push(waiting, op.inputs[0], bent)
        coef = waiting.get(0)
        flat = torch.zeros_like(self.balls.centre) if coef is None else coef.flatten(1)
        point = self.balls.farthest(flat)
        return shift + torch.linalg.vecdot(flat, point), point

    def up(self, point: Tensor) -> tuple[Tensor, dict[Index, Tensor]]:
        """Derivatives of the bounds in theta (N×M), and the relaxed values of all operations."""
        slope = torch.where(self.rising, self.lines.up, self.low)
        shift = torch.where(self.rising, self.lines.up_shift, self.lines.low_shift)
        rate = torch.addcmul(self.side, self.free, self.falls)
        gradient = torch.zeros_like(slope)
        values: dict[Index, Tensor] = {0: point.view(-1, *self.joint.input_shape)}
        for index in self.order[1:]:
            op, where = self.joint.ops[index], self.columns.place.get(index)
            inputs = [values[i] for i in op.inputs]
            if isinstance(op, ops.Linear):
                values[index] = op.value(*inputs)
            elif where is None:
                values[index] = inputs[0]
            else:
                z = (inputs[0] if len(inputs) == 1 else inputs[0] - inputs[1]).flatten(1)
                gradient[:, where] = z * rate[:, where]
                bent = torch.addcmul(shift[:, where], z, slope[:, where]).view_as(inputs[0])
                values[index] = bent if len(inputs) == 1 else _extreme_value(op, bent, inputs)
        return gradient, values

    def real(self, point: Tensor) -> tuple[Tensor, dict[Index, Tensor]]:
        """The switches (N×M) and all values of the real networks at the point."""
        z = point.new_zeros((len(point), self.columns.width))
        values: dict[Index, Tensor] = {0: point.view(-1, *self.joint.input_shape)}
        for index in self.order[1:]:
            op, where = self.joint.ops[index], self.columns.place.get(index)
            inputs = [values[i] for i in op.inputs]
            values[index] = op.value(*inputs)
            if where is not None:
                first = inputs[0] if len(inputs) == 1 else inputs[0] - inputs[1]
                z[:, where] = first.flatten(1)
        return z, values

    def losses(self, z: Tensor, theta: Tensor) -> Tensor:
        """How far each open switch's line is from the switch at `z`, times its coefficient: N×M."""
        lines, rises = self.lines, self.coef.clamp(min=0.0)
        truth = z.clamp(min=0.0)
        above, below = torch.addcmul(lines.up_shift, lines.up, z) - truth, theta * z - truth
        return torch.where(lines.open_, rises * above + self.falls * below, 0.0)


def _extreme_value(op: ops.Op, bent: Tensor, inputs: list[Tensor]) -> Tensor:
    largest = isinstance(op, ops.Extreme) and op.largest
    return inputs[1] + bent if largest else inputs[0] - bent


def _push(waiting: dict[Index, Tensor], index: Index, coef: Tensor) -> None:
    known = waiting.get(index)
    waiting[index] = coef if known is None else known + coef
