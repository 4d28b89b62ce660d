"""One class and one direction as a program: p_H - p_L over both networks, softmax by lines.

Upper end of p_H = 1/(1+s), s = Σ exp a_j: e_j lies above tangents of exp, p_H below the chord of
1/(1+s) on s's interval. Lower end of p_L: e_j lies below the chord of exp on [l_j, u_j], p_L above
tangents of 1/(1+s). A node of the search narrows intervals of switches, of L's margins and of H's
s, and the chords with them; tangents hold everywhere and are added where an answer needs them.
Every e_j is scaled by exp(-u_j), and s by its largest value: unscaled, solvers were seen to call
wrong points optimal.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from mlflow_kdguard.certify.milp.encode import Encoded, Numbers, chords
from mlflow_kdguard.solvers.adapter import NOTHING
from mlflow_kdguard.solvers.model import Builder, Floats, Model

TANGENTS = 5
"""Tangents of exp, and of 1/(1+s), that a program begins with."""
NEGLIGIBLE = 1e-7
"""exp(u_j) of a class that becomes a constant."""
STEEPEST = 500.0
"""Margins beyond which exponentials are left to the linear bound."""
SLACK = 1e-12
"""Share of a row's terms by which it is relaxed. An exponential of a rounded difference of margins
is off by at most 2 STEEPEST + 8 units of 2^-53 of its value, a ninth of that."""
STEEP = 1e7
"""A tangent of 1/(1+s) that is steeper than that is left out."""


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """p_H - p_L <= high·a + low·b + constant: what linear bounds know of both together."""

    high: Floats
    low: Floats
    constant: float


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """Part of a question: boxes of the switches (s), of L's margins (m), of H's scaled s."""

    z_lo: Floats
    z_hi: Floats
    b_lo: Floats
    b_hi: Floats
    s_lo: float
    s_hi: float
    bound: float
    solved: bool = False
    basis: Floats = field(default_factory=lambda: NOTHING)
    branch: tuple[str, int, float] | None = None

    def children(self) -> "tuple[Node, Node]":
        """Both halves along `branch`; they cover the node."""
        assert self.branch is not None
        what, j, at = self.branch
        node = replace(self, solved=False, branch=None)
        if what == "s":
            return replace(node, s_hi=at), replace(node, s_lo=at)
        lo, hi = f"{what}_lo", f"{what}_hi"
        below, above = getattr(self, hi).copy(), getattr(self, lo).copy()
        below[j], above[j] = at, at
        return replace(node, **{hi: below}), replace(node, **{lo: above})


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Variables of a question's program: margins of H and L, their exponentials, scaled sums s of
    H and t of L, and both confidences."""

    a: Numbers
    b: Numbers
    e: Numbers
    f: Numbers
    s: int
    t: int
    high: int
    low: int


@dataclass(slots=True, eq=False)
class Question:
    """A class and a direction around one image.

    `high`, `low`: variables of the K logits of H and L; `a`, `b`: boxes of their margins (lo, hi);
    `cuts`: joint bounds; `tangents`: where answers asked for more ("e", j, at) or ("t", 0, at).
    """

    encoded: Encoded
    klass: int
    high: Numbers
    low: Numbers
    a: tuple[Floats, Floats]
    b: tuple[Floats, Floats]
    cuts: list[Cut]
    tangents: list[tuple[str, int, float]] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether exponentials of all margins are numbers to calculate with."""
        return max(float(np.abs(end).max()) for end in (*self.a, *self.b)) < STEEPEST

    def mass(self, box: tuple[Floats, Floats]) -> tuple[float, float]:
        """Least and largest Σ exp over a box of margins, relaxed outwards."""
        least, most = (float(np.exp(end).sum()) for end in box)
        return least * (1.0 - SLACK), most * (1.0 + SLACK)

    def root(self, bound: float) -> Node:
        """The whole question, which is known to be at most `bound`."""
        z = self.encoded.z
        least, most = self.mass(self.a)
        return Node(
            self.encoded.model.lo[z], self.encoded.model.hi[z], *self.b, least / most, 1.0, bound
        )

    def program(self, node: Node) -> tuple[Model, Layout]:
        """The linear program of a node."""
        builder, layout = self.built(node)
        return builder.model({layout.high: 1.0, layout.low: -1.0}), layout

    def built(self, node: Node) -> tuple[Builder, Layout]:
        """The rows of a node."""
        known = self.encoded
        lo, hi = known.model.lo.copy(), known.model.hi.copy()
        lo[known.z], hi[known.z] = node.z_lo, node.z_hi
        lo[known.y] = np.maximum(node.z_lo, known.low)
        hi[known.y] = np.maximum(node.z_hi, known.low)
        builder = Builder(replace(known.model, lo=lo, hi=hi))
        slope, shift = chords(node.z_lo, node.z_hi, known.low)
        if len(slope):
            pair = np.stack((known.y, known.z), 1)
            builder.rows(pair, np.stack((np.ones_like(slope), -slope), 1), hi=shift)
        layout = self._softmax(builder, node)
        for cut in self.cuts:
            columns = np.concatenate(([layout.high, layout.low], layout.a, layout.b))
            values = np.concatenate(([1.0, -1.0], -cut.high, -cut.low))
            builder.rows(columns, values, hi=cut.constant)
        self._added(builder, layout)
        return builder, layout

    def _softmax(self, builder: Builder, node: Node) -> Layout:
        b = node.b_lo, node.b_hi
        a_at = self._margins(builder, self.high, self.a)
        b_at = self._margins(builder, self.low, b)
        (_, most), (low_least, low_most) = self.mass(self.a), self.mass(b)
        e_at, f_at = (
            builder.variables(np.exp(lo - top) * (1 - SLACK), np.exp(hi - top) * (1 + SLACK))
            for (lo, hi), top in ((self.a, self.a[1]), (b, self.b[1]))
        )
        scale = self.mass(self.b)[1]
        s = int(builder.variables(node.s_lo * (1 - SLACK), node.s_hi * (1 + SLACK))[0])
        t_ends = low_least / scale, low_most / scale
        t = int(builder.variables(t_ends[0] * (1 - SLACK), t_ends[1] * (1 + SLACK))[0])
        ends = [_share(most * end) for end in (node.s_lo, node.s_hi)]
        high = int(builder.variables(ends[1] - SLACK, ends[0] + SLACK)[0])
        lows = [_share(scale * end) for end in t_ends]
        low = int(builder.variables(lows[1] - SLACK, lows[0] + SLACK)[0])
        at = Layout(a_at, b_at, e_at, f_at, s, t, high, low)
        self._sums(builder, at, most, scale)
        self._upper(builder, at, node, most)
        self._lower(builder, at, b, t_ends, scale)
        return at

    def _added(self, builder: Builder, at: Layout) -> None:
        """Tangents that answers asked for: the last rows, so that the others keep their numbers."""
        scale = self.mass(self.b)[1]
        for kind, j, point in self.tangents:
            if kind == "e":
                self._above(builder, at, np.array([j]), np.array([point]))
            else:
                self._tangent(builder, at, point, scale)

    def _margins(self, builder: Builder, z: Numbers, box: tuple[Floats, Floats]) -> Numbers:
        own = builder.variables(*box)
        others = np.delete(z, self.klass)
        columns = np.stack((own, others, np.full_like(others, z[self.klass])), 1)
        builder.rows(columns, np.array([1.0, -1.0, 1.0]), 0.0, 0.0)
        return own

    def _sums(self, builder: Builder, at: Layout, most: float, scale: float) -> None:
        """s is at least, t at most what the exponentials add up to."""
        for column, e, top, whole, side in (
            (at.s, at.e, self.a[1], most, 1.0), (at.t, at.f, self.b[1], scale, -1.0),
        ):  # fmt: skip
            weights = np.exp(top) / whole
            small = np.exp(top) < NEGLIGIBLE
            rest = 0.0 if side > 0 else float(weights[small].sum())
            values = np.concatenate(([1.0], -np.where(small, 0.0, weights)))
            columns = np.concatenate(([column], e))
            builder.rows(columns, side * values, lo=side * rest - SLACK * (1.0 + weights.sum()))

    def _upper(self, builder: Builder, at: Layout, node: Node, most: float) -> None:
        """Tangents of exp for H, and the chord of 1/(1+s)."""
        lo, hi = self.a
        which = np.flatnonzero(np.exp(hi) >= NEGLIGIBLE)
        for share in np.linspace(0.0, 1.0, TANGENTS):
            self._above(builder, at, which, (lo + share * (hi - lo))[which])
        first, last = _share(most * node.s_lo), _share(most * node.s_hi)
        run = node.s_hi - node.s_lo
        slope = (last - first) / run if run > 1e-9 else 0.0
        room = SLACK * (2.0 + 2.0 * abs(slope))
        builder.rows(
            np.array([at.high, at.s]), np.array([1.0, -slope]), hi=first - slope * node.s_lo + room
        )

    def _above(self, builder: Builder, at: Layout, which: Numbers, points: Floats) -> None:
        """e_j >= exp(c - u_j) (1 + a_j - c) for classes `which` and points c."""
        lo, hi = self.a[0][which], self.a[1][which]
        rate = np.exp(points - hi)
        room = SLACK * (1.0 + rate * (1.0 + abs(points) + np.maximum(abs(lo), abs(hi))))
        columns = np.stack((at.e[which], at.a[which]), 1)
        values = np.stack((np.ones_like(rate), -rate), 1)
        builder.rows(columns, values, lo=rate * (1.0 - points) - room)

    def _lower(
        self, builder: Builder, at: Layout, b: tuple[Floats, Floats],
        t_ends: tuple[float, float], scale: float,
    ) -> None:  # fmt: skip
        """Chords of exp for L, and tangents of 1/(1+s)."""
        lo, hi = b
        ends = [np.exp(end - self.b[1]) for end in b]
        run = hi - lo
        rate = np.where(run > 1e-9, (ends[1] - ends[0]) / np.maximum(run, 1e-9), 0.0)
        start = np.where(run > 1e-9, ends[0], ends[1])
        room = SLACK * (1.0 + rate * (1.0 + abs(lo) + abs(hi)))
        columns = np.stack((at.f, at.b), 1)
        values = np.stack((np.ones_like(rate), -rate), 1)
        builder.rows(columns, values, hi=start - rate * lo + room)
        first, last = (_share(scale * end) for end in t_ends)
        for confidence in np.linspace(first, last, TANGENTS):
            self._tangent(builder, at, (1.0 / confidence - 1.0) / scale, scale)

    def _tangent(self, builder: Builder, at: Layout, point: float, scale: float) -> None:
        """p_L >= f(c) + f'(c) (t - c), f(t) = 1/(1 + scale·t)."""
        value = _share(scale * point)
        slope = -scale * value * value
        if slope < -STEEP:
            return
        room = SLACK * (2.0 + 2.0 * abs(slope))
        columns, values = np.array([at.low, at.t]), np.array([1.0, -slope])
        builder.rows(columns, values, lo=value - slope * point - room)


def _share(mass: float) -> float:
    """The confidence 1/(1+s)."""
    return 1.0 / (1.0 + mass)
