"""The exact gap of two networks of two pixels, by enumeration of their activation patterns.

Within a pattern both networks are affine. The patterns that a box meets are found by cutting it
along one Relu after the other; what is left is a plane polygon on which the gap is a smooth
function of two affine maps, searched densely and ever more narrowly. Nothing here is shared with
the bounds: networks are read as lists of matrices.
"""

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard import graph
from mlflow_kdguard.graph import Graph

Floats = NDArray[np.float64]
_ROUNDS, _DENSE = 12, 24


def largest_gap(reference: Graph, student: Graph, lo: Floats, hi: Floats) -> tuple[float, int]:
    """max |p_S,k - p_R,k| over the box [lo, hi] (2 each) and k, and the number of patterns."""
    box = np.array([[lo[0], lo[1]], [hi[0], lo[1]], [hi[0], hi[1]], [lo[0], hi[1]]])
    nets = [_matrices(model) for model in (reference, student)]
    cells = [(box, [(np.eye(2), np.zeros(2)) for _ in nets])]
    for which, layers in enumerate(nets):
        for depth, (weight, bias) in enumerate(layers):
            last = depth == len(layers) - 1
            cells = [cut for cell in cells for cut in _through(cell, which, weight, bias, last)]
    best = max(_searched(polygon, maps) for polygon, maps in cells)
    return best, len(cells)


def _matrices(model: Graph) -> list[tuple[Floats, Floats]]:
    return [(x.weight, x.bias) for x in model.layers if isinstance(x, graph.Affine)]


def _through(cell, which, weight, bias, last):  # type: ignore[no-untyped-def]
    """A cell's pieces after one more layer of one network, with the network's map on each."""
    polygon, maps = cell
    linear, offset = maps[which]
    linear, offset = weight @ linear, weight @ offset + bias
    if last:
        return [(polygon, _with(maps, which, (linear, offset)))]
    pieces = [(polygon, np.ones(len(offset)))]
    for unit in range(len(offset)):
        cut = []
        for part, active in pieces:
            for sign in (1.0, -1.0):
                piece = _clipped(part, sign * linear[unit], sign * offset[unit])
                if len(piece) >= 3:
                    kept = active.copy()
                    kept[unit] = float(sign > 0)
                    cut.append((piece, kept))
        pieces = cut
    return [
        (part, _with(maps, which, (linear * active[:, None], offset * active)))
        for part, active in pieces
    ]


def _with(maps, which, new):  # type: ignore[no-untyped-def]
    return [new if i == which else old for i, old in enumerate(maps)]


def _clipped(polygon: Floats, normal: Floats, offset: float) -> Floats:
    """The part where normal·x + offset >= 0 (Sutherland and Hodgman)."""
    values = polygon @ normal + offset
    kept = []
    for i, (point, value) in enumerate(zip(polygon, values, strict=True)):
        after, ahead = polygon[(i + 1) % len(polygon)], values[(i + 1) % len(polygon)]
        if value >= 0:
            kept.append(point)
        if (value >= 0) != (ahead >= 0):
            kept.append(point + (after - point) * value / (value - ahead))
    return np.array(kept).reshape(-1, 2)


def _searched(polygon: Floats, maps) -> float:  # type: ignore[no-untyped-def]
    """Barycentric points of the polygon's fan, then ever closer around the best."""
    best, top = -1.0, polygon[0]
    corners = polygon[1:-1], polygon[2:]
    steps = np.linspace(0, 1, _DENSE)
    u, v = (each.ravel() for each in np.meshgrid(steps, steps))
    u, v = u[u + v <= 1 + 1e-12], v[u + v <= 1 + 1e-12]
    for a, b in zip(*corners, strict=True):
        points = polygon[0] + u[:, None] * (a - polygon[0]) + v[:, None] * (b - polygon[0])
        value, point = _best(points, maps)
        if value > best:
            best, top = value, point
    reach = np.ptp(polygon, axis=0) / _DENSE
    for _ in range(_ROUNDS):
        offsets = np.stack(np.meshgrid(*(np.linspace(-r, r, 9) for r in reach)), -1).reshape(-1, 2)
        near = _inside(top + offsets, polygon)
        if len(near):
            value, point = _best(near, maps)
            if value > best:
                best, top = value, point
        reach = reach / 3
    return best


def _inside(points: Floats, polygon: Floats) -> Floats:
    edges = np.roll(polygon, -1, axis=0) - polygon
    away = points[:, None, :] - polygon[None]
    turn = edges[None, :, 0] * away[..., 1] - edges[None, :, 1] * away[..., 0]
    return points[(turn >= 0).all(1) | (turn <= 0).all(1)]


def _best(points: Floats, maps) -> tuple[float, Floats]:  # type: ignore[no-untyped-def]
    confidences = []
    for linear, offset in maps:
        z = points @ linear.T + offset
        e = np.exp(z - z.max(1, keepdims=True))
        confidences.append(e / e.sum(1, keepdims=True))
    gaps = np.abs(confidences[1] - confidences[0]).max(1)
    at = int(gaps.argmax())
    return float(gaps[at]), points[at]
