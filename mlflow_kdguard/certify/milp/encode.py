"""Both networks around one image as rows of a program: the triangle relaxation, and big-M.

Every value that is not a copy of another has a variable in its box, every linear operation its
rows with the file's own constants, so that nothing is rounded on the way. A bent operation
y = max(z, low) is a *switch*: y >= z, y >= low, and a chord above, which depends on what is known
about z and belongs to `rows`; with a binary variable that says which side z is on, it is exact
(Tjeng, Xiao and Tedrake, arXiv 1711.07356).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

from mlflow_kdguard.certify import ops
from mlflow_kdguard.certify.backward import Relaxed
from mlflow_kdguard.certify.forms import Form, dense
from mlflow_kdguard.certify.joint import Index
from mlflow_kdguard.certify.rounding import UNIT
from mlflow_kdguard.solvers.model import Builder, Flags, Floats, Model

Numbers = NDArray[np.int64]

NONE = -1
"""In the place of a variable: the value is 0, or nobody asks for it."""
_ROWS = 256
"""Rows of a linear operation that are written out together."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A program without an objective, and where things are in it.

    `pixels`: the image's variables (d, NONE where no network looks); `outputs`: K logits each;
    `z`, `y`: variables of the switches y = max(z, low), s each.
    """

    model: Model
    pixels: Numbers
    outputs: dict[Index, Numbers]
    z: Numbers
    y: Numbers
    low: Floats


def encode(relaxed: Relaxed, image: int, outputs: Sequence[Index]) -> Encoded:
    """The networks behind `outputs` around the image of that number."""
    writer = _Writer(relaxed, image, outputs)
    for index in range(len(relaxed.joint.ops)):
        if writer.needed[index].any():
            writer.write(index)
    z, y, low = (np.concatenate([np.zeros(0, kind), *parts]) for kind, parts in (
        (np.int64, writer.z), (np.int64, writer.y), (np.float64, writer.low),
    ))  # fmt: skip
    places = {index: writer.place[index] for index in outputs}
    pixels = writer.place.get(0, np.full(prod(relaxed.joint.input_shape), NONE))
    return Encoded(writer.builder.model(), pixels, places, z, y, low)


def chords(lo: Floats, hi: Floats, low: Floats) -> tuple[Floats, Floats]:
    """Slopes and shifts of lines above max(z, low) on [lo, hi], shifts rounded up."""
    ends = np.stack((lo, hi))
    values = np.maximum(ends, low)
    slope = np.clip((values[1] - values[0]) / np.maximum(hi - lo, 1e-300), 0.0, 1.0)
    gap = values - slope * ends
    gap = gap + np.where(values == slope * ends, 0.0, 4 * UNIT * (abs(values) + abs(slope * ends)))
    return slope, gap.max(0)


@dataclass
class _Writer:
    relaxed: Relaxed
    image: int
    outputs: Sequence[Index]
    builder: Builder = field(default_factory=Builder)
    place: dict[Index, Numbers] = field(default_factory=dict)
    z: list[Numbers] = field(default_factory=list)
    y: list[Numbers] = field(default_factory=list)
    low: list[Floats] = field(default_factory=list)
    scaled: dict[Index, tuple[Floats, Floats]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Which values anybody asks for: a Relu that is off asks for nothing."""
        all_ops = self.relaxed.joint.ops
        self.folded = _folded(all_ops, self.outputs)
        self.needed: list[Flags] = [np.zeros(prod(op.shape), dtype=bool) for op in all_ops]
        for index in self.outputs:
            self.needed[index][:] = True
        for index in range(len(all_ops) - 1, 0, -1):
            op, mine = all_ops[index], self.needed[index]
            for source in op.inputs if mine.any() else ():
                if isinstance(op, ops.Clip):
                    lo, hi = self.box(source)
                    self.needed[source] |= mine & (hi > op.low) & (lo < op.high)
                elif _copies(op) or isinstance(op, ops.Extreme):
                    self.needed[source] |= mine
                else:
                    self.needed[source][:] = True

    def box(self, index: Index) -> tuple[Floats, Floats]:
        """What is known about an operation's values (flat)."""
        box = self.relaxed.boxes[index]
        lo, hi = (end[self.image].flatten().cpu().numpy() for end in (box.lo, box.hi))
        return lo, hi

    def write(self, index: Index) -> None:
        """Variables and rows of one operation."""
        op = self.relaxed.joint.ops[index]
        if _copies(op):
            self.place[index] = self.place[op.inputs[0]]
            if op.inputs[0] in self.scaled:
                self.scaled[index] = self.scaled[op.inputs[0]]
        elif isinstance(op, ops.Scale) and index in self.folded:
            self.place[index] = self.place[op.inputs[0]]
            factor, shift = (end.flatten().cpu().numpy() for end in (op.factor, op.shift))
            self.scaled[index] = factor, shift
        elif isinstance(op, ops.Clip):
            self._clip(index, op)
        elif isinstance(op, ops.Extreme):
            self._extreme(index, op)
        else:
            place = self._new(index, self.needed[index])
            if isinstance(op, ops.Linear):
                self._linear(op, place)

    def _new(self, index: Index, which: Flags) -> Numbers:
        lo, hi = self.box(index)
        place = np.full(len(which), NONE, dtype=np.int64)
        place[which] = self.builder.variables(lo[which], hi[which])
        self.place[index] = place
        return place

    def _linear(self, op: ops.Linear, place: Numbers) -> None:
        offset = op.offset
        shift = np.zeros(len(place))
        if offset is not None:
            shift = offset.expand(1, *op.shape).reshape(-1).cpu().numpy()
        sources = np.concatenate([self.place[i] for i in op.inputs])
        factor, offset_of = (
            np.concatenate([self._scale(i)[end] for i in op.inputs]) for end in (0, 1)
        )
        for part in np.array_split(np.flatnonzero(place >= 0), -(-len(place) // _ROWS)):
            values = self._coefficients(op, part)
            added = values @ offset_of
            size = abs(shift[part]) + abs(values) @ abs(offset_of)
            room = 4 * (len(factor) + 8) * UNIT * size if offset_of.any() else 0.0
            columns = np.broadcast_to(sources, values.shape)
            own = place[part][:, None]
            self.builder.rows(
                np.concatenate((columns, own), 1),
                np.concatenate((values * factor, -np.ones_like(own, dtype=float)), 1),
                -shift[part] - added - room, -shift[part] - added + room,
            )  # fmt: skip

    def _scale(self, index: Index) -> tuple[Floats, Floats]:
        """Factors and offsets of an operation's values to the variables in their places."""
        n = len(self.place[index])
        return self.scaled.get(index, (np.ones(n), np.zeros(n)))

    def _coefficients(self, op: ops.Linear, rows: Numbers) -> Floats:
        """What each input's values count for the values at `rows`: one after another."""
        if isinstance(op, ops.Affine) and len(op.shape) == 1:
            return op.weight[torch.from_numpy(rows).to(op.weight.device)].cpu().numpy()
        shapes = [self.relaxed.joint.ops[i].shape for i in op.inputs]
        device = self.relaxed.ball.centre.device
        one = torch.zeros((len(rows), prod(op.shape)), dtype=torch.float64, device=device)
        one[torch.arange(len(rows)), torch.from_numpy(rows)] = 1.0
        forms = op.pull(Form(one.view(-1, *op.shape)))
        parts = [dense(f, s).coef.flatten(1) for f, s in zip(forms, shapes, strict=True)]
        return torch.cat(parts, 1).cpu().numpy()

    def _clip(self, index: Index, op: ops.Clip) -> None:
        needed = self.needed[index]
        # An input of which nothing is asked was not written.
        source = self.place.get(op.inputs[0], np.full(len(needed), NONE))
        lo, hi = self.box(op.inputs[0])
        fixed = (hi <= op.low) | (lo >= op.high)
        inside = (lo >= op.low) & (hi <= op.high) & ~fixed
        place = np.where(inside, source, NONE)
        end, fixed = np.where(hi <= op.low, op.low, op.high), fixed & needed
        some = fixed & (end != 0.0)
        place[some] = self.builder.variables(end[some], end[some])
        bent = needed & ~inside & ~fixed
        ends = lo.clip(op.low, op.high), hi.clip(op.low, op.high)
        place[bent] = self.builder.variables(ends[0][bent], ends[1][bent])
        up, down = bent & (lo < op.low), bent & (hi > op.high)
        self._switches(source[up & ~down], place[up & ~down], op.low)
        if down.any():
            self._lines(index, down, source, place)
            pair = np.stack((place, source), 1)[down & ~up]
            self.builder.rows(pair, np.array([1.0, -1.0]), hi=0.0)
        self.place[index] = place

    def _switches(self, z: Numbers, y: Numbers, low: float) -> None:
        self.z.append(z)
        self.y.append(y)
        self.low.append(np.full(len(z), low))
        if len(z):
            self.builder.rows(np.stack((y, z), 1), np.array([1.0, -1.0]), lo=0.0)

    def _lines(self, index: Index, which: Flags, z: Numbers, y: Numbers) -> None:
        """Values that bend down, or twice, stay between their lines."""
        lines = self.relaxed.lines[index].rows(torch.tensor([self.image]))
        pair = np.stack((y, z), 1)[which]
        for side, slope, shift in (
            (1.0, lines.upper_slope, lines.upper_shift),
            (-1.0, lines.lower_slope, lines.lower_shift),
        ):
            rate, rest = (
                np.zeros(len(pair)) if end is None else end.flatten().cpu().numpy()[which]
                for end in (slope, shift)
            )
            values = np.stack((np.ones_like(rate), -rate), 1) * side
            self.builder.rows(pair, values, hi=side * rest)

    def _extreme(self, index: Index, op: ops.Extreme) -> None:
        """max(a, b) = b + relu(a - b), min(a, b) = a - relu(a - b)."""
        a, b = (self.place[i] for i in op.inputs)
        lines = self.relaxed.lines[index].rows(torch.tensor([self.image]))
        slope, shift, below = (
            end.flatten().cpu().numpy()
            for end in (lines.upper_slope, lines.upper_shift, lines.lower_slope)
        )
        same = shift == 0.0
        first, second = same & (slope == 1.0) & (below == 1.0), same & (slope == 0.0)
        place = np.where(first, a if op.largest else b, b if op.largest else a)
        open_ = self.needed[index] & ~first & ~second
        if open_.any():
            (a_lo, a_hi), (b_lo, b_hi) = (self.box(i) for i in op.inputs)
            room = 4 * UNIT * (abs(a_lo) + abs(a_hi) + abs(b_lo) + abs(b_hi))[open_]
            lo, hi = (a_lo - b_hi)[open_] - room, (a_hi - b_lo)[open_] + room
            z = self.builder.variables(lo, hi)
            y = self.builder.variables(lo.clip(0.0), hi.clip(0.0))
            self.builder.rows(
                np.stack((z, a[open_], b[open_]), 1), np.array([1.0, -1.0, 1.0]), 0.0, 0.0
            )
            self._switches(z, y, 0.0)
            lo, hi = self.box(index)
            place[open_] = out = self.builder.variables(lo[open_], hi[open_])
            base, sign = (b, -1.0) if op.largest else (a, 1.0)
            self.builder.rows(
                np.stack((out, base[open_], y), 1), np.array([1.0, -1.0, sign]), 0.0, 0.0
            )
        self.place[index] = place


def _copies(op: ops.Op) -> bool:
    """Whether an operation only hands its input on."""
    if isinstance(op, ops.Scale):
        return bool((op.factor == 1.0).all() and (op.shift == 0.0).all())
    return isinstance(op, ops.Reshape)


def _folded(all_ops: Sequence[ops.Op], outputs: Sequence[Index]) -> set[Index]:
    """Element-wise scales of a copy that only linear operations read, which take them over."""
    readers: dict[Index, list[Index]] = {index: [] for index in range(len(all_ops))}
    for index, op in enumerate(all_ops):
        for source in op.inputs:
            readers[source].append(index)

    def linear(index: Index) -> bool:
        if index in outputs:
            return False
        kinds = [all_ops[reader] for reader in readers[index]]
        return all(
            linear(reader) if _copies(kind)
            else isinstance(kind, ops.Linear) and not isinstance(kind, ops.Scale)
            for reader, kind in zip(readers[index], kinds, strict=True)
        )  # fmt: skip

    return {
        i
        for i, op in enumerate(all_ops)
        if isinstance(op, ops.Scale) and not _copies(op) and linear(i)
    }
