"""Nodes of the search: parts of a row's question, with a bound each.

A node fixes the phase of some switches (a Relu on or off) and narrows the band of each network's
confidence. Switches of all layers stand in one axis of M columns, so that choosing one of them, or
of the two bands, is one argmax.
"""

from dataclasses import dataclass, fields, replace
from math import prod

import torch
from torch import Tensor

from mlflow_kdguard.certify import ops
from mlflow_kdguard.certify.backward import Relaxed
from mlflow_kdguard.certify.confidence import Band, Margins, tightened
from mlflow_kdguard.certify.joint import Index, Joint
from mlflow_kdguard.certify.lines import Lines


@dataclass(frozen=True, slots=True, eq=False)
class Nodes:
    """N nodes: whose they are (image, class, direction), what they fix, and multipliers.

    `phase`: int8 N×M, -1 off, 1 on, 0 open; `slope`, `push`: float32 N×M, the lower slope of open
    switches and the multiplier of fixed ones; `unit`: largest coefficient of a switch, N; `where`,
    `steep`, `low_weights`: see `split.Parameters`; `bound`: float64 N, -inf for an empty node;
    `score`: float32 N×(M+2), how much of the bound each switch and both bands account for.
    """

    image: Tensor
    klass: Tensor
    student_high: Tensor
    high_lo: Tensor
    high_hi: Tensor
    low_lo: Tensor
    low_hi: Tensor
    high_from: Tensor
    high_to: Tensor
    low_from: Tensor
    low_to: Tensor
    phase: Tensor
    slope: Tensor
    push: Tensor
    unit: Tensor
    where: Tensor
    steep: Tensor
    low_weights: Tensor
    bound: Tensor
    score: Tensor

    def __len__(self) -> int:
        return len(self.image)

    @property
    def high(self) -> Margins:
        """Margins of the network whose confidence is the higher one."""
        return Margins(self.high_lo, self.high_hi)

    @property
    def low(self) -> Margins:
        """Margins of the other network."""
        return Margins(self.low_lo, self.low_hi)

    @property
    def high_band(self) -> Band:
        """Log-odds of the higher confidence."""
        return Band(self.high_from, self.high_to)

    @property
    def low_band(self) -> Band:
        """Log-odds of the lower confidence."""
        return Band(self.low_from, self.low_to)

    def take(self, which: Tensor) -> "Nodes":
        """The nodes at `which` (int64)."""
        return Nodes(*(getattr(self, item.name)[which] for item in fields(self)))

    def joined(self, other: "Nodes") -> "Nodes":
        """These nodes, then the others."""
        names = [item.name for item in fields(self)]
        return Nodes(*(torch.cat((getattr(self, n), getattr(other, n))) for n in names))

    def put(self, which: Tensor, other: "Nodes") -> None:
        """Overwrite the nodes at `which`."""
        for item in fields(self):
            getattr(self, item.name)[which] = getattr(other, item.name)

    @property
    def chosen(self) -> Tensor:
        """What accounts for most of each bound: a switch's column, M (high band), M + 1 (low)."""
        return self.score.argmax(1)

    def split(self) -> tuple["Nodes", "Nodes"]:
        """Both children of every node, along what was chosen."""
        m = self.phase.shape[1]
        chosen = self.chosen[:, None]
        column = chosen.clamp(max=max(m - 1, 0))
        switch, high, low = (chosen < m), (chosen == m)[:, 0], (chosen == m + 1)[:, 0]
        first = self._child(column, switch, high, low, upper=False)
        return first, self._child(column, switch, high, low, upper=True)

    def _child(
        self, column: Tensor, switch: Tensor, high: Tensor, low: Tensor, *, upper: bool
    ) -> "Nodes":
        side = 1 if upper else -1
        fixed = self.phase.gather(1, column).where(~switch, torch.full_like(column, side).char())
        pushed = self.push.gather(1, column).masked_fill(switch, 0.0)
        ends = {}
        for name, band, halved in (("high", self.high_band, high), ("low", self.low_band, low)):
            middle = band.middle
            ends[f"{name}_from"] = torch.where(halved, middle, band.lo) if upper else band.lo
            ends[f"{name}_to"] = band.hi if upper else torch.where(halved, middle, band.hi)
        child = replace(
            self,
            phase=self.phase.scatter(1, column, fixed),
            push=self.push.scatter(1, column, pushed),
            bound=self.bound.clone(),
            **ends,
        )
        return child.consistent()

    def within(self, high: Margins, low: Margins) -> "Nodes":
        """The nodes with what boxes of the margins say besides."""
        return replace(
            self,
            bound=self.bound.clone(),
            high_lo=torch.maximum(self.high_lo, high.lo),
            high_hi=torch.minimum(self.high_hi, high.hi),
            low_lo=torch.maximum(self.low_lo, low.lo),
            low_hi=torch.minimum(self.low_hi, low.hi),
        ).consistent()

    def consistent(self) -> "Nodes":
        """Boxes and bands cut to each other; where nothing is left, the bound becomes -inf."""
        node, empty = self, torch.zeros_like(self.bound, dtype=torch.bool)
        for name in ("high", "low"):
            box, band = tightened(getattr(node, name), getattr(node, f"{name}_band"))
            empty |= (box.lo > box.hi).any(1) | (band.lo > band.hi)
            values = {
                f"{name}_lo": torch.minimum(box.lo, box.hi), f"{name}_hi": box.hi,
                f"{name}_from": torch.minimum(band.lo, band.hi), f"{name}_to": band.hi,
            }  # fmt: skip
            node = replace(node, **values)
        node.bound[empty] = -torch.inf
        return node


@dataclass(frozen=True, slots=True, eq=False)
class Switches:
    """Switches of all operations with any that is open, and their lines around each image (B×M).

    `open_`: which of them a node may fix. `offset`: the first column of each operation. `feeds`:
    for either network's output, the columns that it depends on (bool M). `others`: lines of the
    operations that have no open switch.
    """

    offset: dict[Index, int]
    shapes: dict[Index, tuple[int, ...]]
    upper_slope: Tensor
    upper_shift: Tensor
    lower_slope: Tensor
    open_: Tensor
    feeds: dict[Index, Tensor]
    others: dict[Index, Lines]

    @classmethod
    def of(cls, relaxed: Relaxed) -> "Switches":
        """The switches of a graph that was bounded."""
        joint, images = relaxed.joint, len(relaxed.ball.centre)
        offset, shapes, columns, count = {}, {}, [], 0
        for index, lines in relaxed.lines.items():
            free = (lines.upper_slope > 0.0) & (lines.upper_slope < 1.0)
            if not _one_bend(joint.ops[index]) or not bool(free.any()):
                continue
            offset[index], shapes[index] = count, joint.ops[index].shape
            count += prod(shapes[index])
            values = (lines.upper_slope, lines.upper_shift, lines.lower_slope, free.double())
            columns.append([v.expand(images, *shapes[index]).reshape(images, -1) for v in values])
        if not columns:
            empty = relaxed.ball.centre.new_zeros((images, 0))
            feeds = _feeds(joint, {}, empty.device)
            return cls({}, {}, empty, empty, empty, empty.bool(), feeds, relaxed.lines)
        above, shifts, below, free = (torch.cat(parts, 1) for parts in zip(*columns, strict=True))
        others = {i: lines for i, lines in relaxed.lines.items() if i not in offset}
        feeds = _feeds(joint, shapes, above.device)
        return cls(offset, shapes, above, shifts, below, free.bool(), feeds, others)

    def lines(self, nodes: Nodes, slope: Tensor) -> dict[Index, Lines]:
        """Lines of every operation around each node: fixed switches are linear."""
        on, off, image = nodes.phase > 0, nodes.phase < 0, nodes.image
        fixed = on | off
        upper = self.upper_slope[image].masked_fill(on, 1.0).masked_fill(off, 0.0)
        shift = self.upper_shift[image].masked_fill(fixed, 0.0)
        lower = torch.where(self.open_[image], slope, self.lower_slope[image])
        lower = lower.masked_fill(on, 1.0).masked_fill(off, 0.0)
        a, b, c = (self.cut(value) for value in (upper, shift, lower))
        lines = {index: Lines(a[index], b[index], c[index], None) for index in self.offset}
        for index, known in self.others.items():
            lines[index] = known if known.identity else known.rows(image)
        return lines

    def cut(self, values: Tensor) -> dict[Index, Tensor]:
        """N×M columns as each operation's N×shape."""
        return {
            index: values[:, start : start + prod(shape)].view(len(values), *shape)
            for (index, start), shape in zip(self.offset.items(), self.shapes.values(), strict=True)
        }

    def join(self, values: dict[Index, Tensor], n: int) -> Tensor:
        """The reverse."""
        parts = [values[index].flatten(1) for index in self.offset]
        return torch.cat(parts, 1) if parts else self.upper_slope.new_zeros((n, 0))

    def at(self, joint: Joint, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The switches at images x (N×M), and both networks' logits."""
        values, switches = [x], {}
        for index, op in enumerate(joint.ops[1:], 1):
            inputs = [values[i] for i in op.inputs]
            values.append(op.value(*inputs))
            if index in self.offset:
                first = inputs[0] if len(inputs) == 1 else inputs[0] - inputs[1]
                switches[index] = first.expand(len(x), *op.shape)
        return self.join(switches, len(x)), values[joint.reference], values[joint.student]


def _feeds(
    joint: Joint, shapes: dict[Index, tuple[int, ...]], device: torch.device
) -> dict[Index, Tensor]:
    feeds = {}
    for output in (joint.reference, joint.student):
        seen, waiting = set[Index](), [output]
        while waiting:
            index = waiting.pop()
            if index not in seen:
                seen.add(index)
                waiting += joint.ops[index].inputs
        counts = [(index in seen, prod(shape)) for index, shape in shapes.items()]
        feeds[output] = torch.tensor(
            [known for known, count in counts for _ in range(count)], device=device
        )
    return feeds


def _one_bend(op: ops.Op) -> bool:
    """Whether a phase makes it linear: a Relu, or a maximum of two."""
    return not isinstance(op, ops.Clip) or (op.low == 0.0 and op.high == float("inf"))
