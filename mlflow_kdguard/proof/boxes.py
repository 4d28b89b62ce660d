"""Boxes of all operations from the image to the logits, tightened where a switch is open."""

import numpy as np

from mlflow_kdguard.errors import CertificateError
from mlflow_kdguard.proof import bends
from mlflow_kdguard.proof.arithmetic import UNDERFLOW, Array, Indices, down, up
from mlflow_kdguard.proof.net import Bend, Linear, Net
from mlflow_kdguard.proof.passes import Known, Region, highest
from mlflow_kdguard.proof.trees import Trees, evaluated


def bounded(net: Net, region: Region, hidden: dict[int, Trees]) -> Known:
    """What is known of all operations. `hidden`: trees of the switches of some bent operations,
    by the number of the operation; tree 2i bounds switch i from above, tree 2i + 1 from below."""
    known = Known(net, region, [region.lo], [region.hi], [region.hi.copy()])
    for index, op in enumerate(net.ops[1:], 1):
        if isinstance(op, Linear):
            lo, hi, size = _linear(known, op)
        elif isinstance(op, Bend):
            lo, hi, size = _bend(known, index, op, hidden.get(index))
        else:
            raise CertificateError(f"UNSUPPORTED: operation {index} of the networks.")
        if not (np.isfinite(lo).all() and np.isfinite(hi).all() and np.isfinite(size).all()):
            raise CertificateError(f"bounds of operation {index} overflow float64.")
        known.lo.append(lo)
        known.hi.append(hi)
        known.sizes.append(size)
    return known


def _linear(known: Known, op: Linear) -> tuple[Array, Array, Array]:
    """Midpoint and radius through a linear operation: box, and Σ|W||x| + |b|."""
    middles = [(known.lo[i] + known.hi[i]) / 2.0 for i in op.inputs]
    radii = [
        np.maximum(up(known.hi[i] - m), up(m - known.lo[i]))
        for i, m in zip(op.inputs, middles, strict=True)
    ]
    size = op.spread(*(np.abs(m) + r for m, r in zip(middles, radii, strict=True)))
    if op.offset is not None:
        size = size + np.abs(op.offset)
    some = op.spread(*(np.ones_like(m) for m in middles)) > 0.0
    middle = op.value(*middles)
    radius = op.spread(*radii) + known.rate * size + UNDERFLOW * some
    return down(middle - radius), up(middle + radius), size * (1.0 + known.rate) + UNDERFLOW


def _bend(known: Known, index: int, op: Bend, trees: Trees | None) -> tuple[Array, Array, Array]:
    """Box and size of a bent operation; its lines are kept, and its input's box."""
    lo, hi = (known.lo[op.inputs[0]], known.hi[op.inputs[0]])
    size = np.maximum(np.abs(lo), np.abs(hi))
    if op.larger is not None:
        other = op.inputs[1]
        size = 4.0 * (size + np.maximum(np.abs(known.lo[other]), np.abs(known.hi[other])))
        lo, hi = down(lo - known.hi[other]), up(hi - known.lo[other])
    lo, hi = _tightened(known, op, lo, hi)
    if trees is not None:
        lo, hi = _grown(known, op, trees, lo, hi)
    known.lines[index] = bends.around(lo, hi, op.low, op.high)
    if op.larger is not None:
        return (
            op.value(*(known.lo[i] for i in op.inputs)),
            op.value(*(known.hi[i] for i in op.inputs)),
            size,
        )
    known.lo[op.inputs[0]], known.hi[op.inputs[0]] = lo, hi
    ends = op.value(lo), op.value(hi)
    # A clip may give far larger numbers than it is given.
    return *ends, 2.0 * (size + np.maximum(np.abs(ends[0]), np.abs(ends[1])))


def _tightened(known: Known, op: Bend, lo: Array, hi: Array) -> tuple[Array, Array]:
    """Open switches behind what is not linear, bounded by a pass each way."""
    if not _mixed(known, op):
        return lo, hi
    open_ = ((lo < op.low) & (hi > op.low)) | ((lo < op.high) & (hi > op.high))
    index = np.flatnonzero(open_)
    if len(index) == 0:
        return lo, hi
    above = highest(known, _ones(op, index, lo.size, 1.0))
    below = highest(known, _ones(op, index, lo.size, -1.0))
    lo, hi = lo.copy(), hi.copy()
    hi[index] = np.minimum(hi[index], above)
    lo[index] = np.maximum(lo[index], -below)
    return _ordered(lo, hi)


def _ordered(lo: Array, hi: Array) -> tuple[Array, Array]:
    """Ends of a box in order: where they cross, nothing is known to be wrong but the order."""
    return np.minimum(lo, hi), np.maximum(lo, hi)


def _mixed(known: Known, op: Bend) -> bool:
    """Whether anything before the switch is not linear, or adds two values."""
    if op.larger is not None:
        return True
    for index in known.net.behind(op.inputs[0]):
        before = known.net.ops[index]
        if len(before.inputs) > 1:
            return True
        if isinstance(before, Bend) and not known.lines[index].identity:
            return True
    return False


def _ones(op: Bend, index: Indices, size: int, sign: float) -> dict[int, Array]:
    """`sign` times some switches, as functionals of the operation's inputs."""
    rows = np.zeros((len(index), size))
    rows[np.arange(len(index)), index] = sign
    seeds = {op.inputs[0]: rows}
    if len(op.inputs) > 1:
        seeds[op.inputs[1]] = -rows
    return seeds


def _grown(known: Known, op: Bend, trees: Trees, lo: Array, hi: Array) -> tuple[Array, Array]:
    """The box, cut to what trees say; their numbers are 2·switch, one more from below."""
    if len(op.inputs) > 1 or bool((trees.number >= 2 * lo.size).any()):
        raise CertificateError("the proof holds a tree for a switch that there is not.")
    switch, side = trees.number // 2, np.where(trees.number % 2 == 0, 1.0, -1.0)

    def rows(which: Indices) -> dict[int, Array]:
        owner = trees.owner[which]
        seeds = np.zeros((len(which), lo.size))
        seeds[np.arange(len(which)), switch[owner]] = side[owner]
        return {op.inputs[0]: seeds}

    bound = trees.bounds(evaluated(known, trees, rows))
    lo, hi = lo.copy(), hi.copy()
    from_above = side > 0
    hi[switch[from_above]] = np.minimum(hi[switch[from_above]], bound[from_above])
    lo[switch[~from_above]] = np.maximum(lo[switch[~from_above]], -bound[~from_above])
    return _ordered(lo, hi)
