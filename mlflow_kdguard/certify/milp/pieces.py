"""The same question as one integer program: binary switches, and chords in pieces.

A solver that runs this to its end says how good the chords can be made; its bound is a claim of
its own tree and part of no certificate. `tree` is what certifies.
"""

import numpy as np

from mlflow_kdguard.certify.milp.encode import Numbers
from mlflow_kdguard.certify.milp.question import NEGLIGIBLE, SLACK, Layout, Node, Question
from mlflow_kdguard.certify.rounding import UNIT
from mlflow_kdguard.solvers.model import Builder, Floats, Model

SEGMENTS = 4
"""Pieces of every chord."""


def integer_program(
    question: Question, node: Node, segments: int = SEGMENTS
) -> tuple[Model, Layout]:
    """The node with a binary variable for each open switch (big-M, arXiv 1711.07356) and for the
    pieces of exp (L) and 1/(1+s) (H)."""
    builder, at = question.built(node)
    _switches(builder, question, node)
    top = question.b[1]
    for j in np.flatnonzero(np.exp(top) >= NEGLIGIBLE):
        points = np.linspace(node.b_lo[j], node.b_hi[j], segments + 1)
        _pieces(builder, at.b[j], at.f[j], points, np.exp(points - top[j]))
    most = question.mass(question.a)[1]
    ends = 1.0 / (1.0 + most * np.array([node.s_lo, node.s_hi]))
    points = (1.0 / np.linspace(ends[0], ends[1], segments + 1) - 1.0) / most
    points[[0, -1]] = node.s_lo, node.s_hi
    _pieces(builder, at.s, at.high, points, 1.0 / (1.0 + most * points))
    return builder.model({at.high: 1.0, at.low: -1.0}), at


def linear_program(question: Question, columns: Numbers, values: Floats, *, exact: bool) -> Model:
    """The largest Σ values · v[columns] over both networks, such as one margin; with binary
    switches where `exact`."""
    builder, _ = question.built(node := question.root(1.0))
    if exact:
        _switches(builder, question, node)
    return builder.model({int(c): float(v) for c, v in zip(columns, values, strict=True)})


def _switches(builder: Builder, question: Question, node: Node) -> None:
    """y <= z + (low - z_lo)(1 - on) and y <= low + (z_hi - low) on."""
    low = question.encoded.low
    open_ = (node.z_lo < low) & (node.z_hi > low)
    if not open_.any():
        return
    z, y, low = question.encoded.z[open_], question.encoded.y[open_], low[open_]
    below, above = ((low - node.z_lo[open_]), (node.z_hi[open_] - low))
    below, above = below * (1.0 + 2 * UNIT), above * (1.0 + 2 * UNIT)
    on = builder.variables(np.zeros(len(z)), np.ones(len(z)), integer=True)
    one = np.ones(len(z))
    builder.rows(np.stack((y, z, on), 1), np.stack((one, -one, below), 1), hi=below)
    builder.rows(np.stack((y, on), 1), np.stack((one, -above), 1), hi=low)


def _pieces(builder: Builder, x: int, y: int, points: Floats, values: Floats) -> None:
    """y <= the line through (points, values), increasing points: lengths that fill one by one."""
    lengths = np.diff(points)
    if not (lengths > 1e-9).all():
        return
    k = len(lengths)
    parts = builder.variables(np.zeros(k), lengths)
    full = builder.variables(np.zeros(k - 1), np.ones(k - 1), integer=True)
    room = SLACK * (2.0 + np.abs(points).max() + np.abs(np.diff(values) / lengths).max())
    builder.rows(
        np.concatenate(([x], parts)), np.concatenate(([1.0], -np.ones(k))),
        points[0] - room, points[0] + room,
    )  # fmt: skip
    slopes = np.diff(values) / lengths
    builder.rows(
        np.concatenate(([y], parts)), np.concatenate(([1.0], -slopes)), hi=values[0] + room
    )
    pair = np.stack((parts[:-1], full), 1)
    builder.rows(pair, np.stack((np.ones(k - 1), -lengths[:-1]), 1), lo=0.0)
    pair = np.stack((parts[1:], full), 1)
    builder.rows(pair, np.stack((np.ones(k - 1), -lengths[1:]), 1), hi=0.0)
