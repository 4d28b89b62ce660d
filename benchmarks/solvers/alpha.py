"""α-CROWN of the confidence gap as a general verifier has it: softmax on raw logits.

An independent baseline (arXiv 2011.13824 on 2306.04431's question), for dense Relu networks: logits
in boxes, softmax decomposed as auto_LiRPA does it into exp, sum, reciprocal and product, each
bounded by lines; slopes, one for each neuron, and the product's planes are optimised by Adam.
float64, no rounding margins.
"""

import torch
from torch import Tensor

Layers = list[tuple[Tensor, Tensor]]
STEPS, RATE = 20, 0.1
_EPS = 1e-9


def _crown(
    layers: Layers,
    slopes: list[Tensor],
    boxes: list[tuple[Tensor, Tensor]],
    rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """Planes above rows·(output of the last of `layers`): coefficients R×d and shifts R."""
    v, shift = rows, rows.new_zeros(len(rows))
    for depth in range(len(layers) - 1, -1, -1):
        weight, bias = layers[depth]
        shift, v = shift + v @ bias, v @ weight
        if depth == 0:
            break
        lo, hi = boxes[depth - 1]
        open_ = (lo < 0) & (hi > 0)
        rate = torch.where(open_, hi / (hi - lo).clamp(min=_EPS), (lo >= 0).to(v.dtype))
        below = torch.where(open_, slopes[depth - 1].clamp(0, 1), rate)
        up, down = v.clamp(min=0), v.clamp(max=0)
        shift = shift + up @ torch.where(open_, -rate * lo, torch.zeros_like(lo))
        v = up * rate + down * below
    return v, shift


def _top(v: Tensor, shift: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    return v.clamp(min=0) @ hi + v.clamp(max=0) @ lo + shift


def _boxes(
    layers: Layers, slopes: list[Tensor], lo: Tensor, hi: Tensor
) -> list[tuple[Tensor, Tensor]]:
    found: list[tuple[Tensor, Tensor]] = []
    for depth in range(1, len(layers) + 1):
        size = len(layers[depth - 1][1])
        rows = torch.cat((torch.eye(size), -torch.eye(size))).to(lo)
        top = _top(*_crown(layers[:depth], slopes, found, rows), lo, hi)
        found.append((-top[size:], top[:size]))
    return found


def _softmax_plane(
    z: tuple[Tensor, Tensor], k: int, side: float, mix: Tensor
) -> tuple[Tensor, Tensor]:
    """A plane above side·softmax(z)_k on the box z: exp, sum, reciprocal, product."""
    lo, hi = z
    base = hi.max()
    lo, hi = lo - base, hi - base
    e_lo, e_hi = lo.exp(), hi.exp()
    above = (e_hi - e_lo) / (hi - lo).clamp(min=_EPS)
    above_shift = e_lo - above * lo
    middle = torch.minimum((lo + hi) / 2, lo + 0.99)
    below, below_shift = middle.exp(), middle.exp() * (1 - middle)
    s_lo, s_hi = e_lo.sum(), e_hi.sum()
    r_lo, r_hi = 1 / s_hi, 1 / s_lo
    a, b = e_lo[k], e_hi[k]
    # p = e·r (McCormick), r = 1/s: chord above, tangent below, both falling in s.
    chord, chord_shift = -1 / (s_lo * s_hi), 1 / s_lo + 1 / s_hi
    centre = (s_lo + s_hi) / 2
    tangent, tangent_shift = -1 / centre**2, 2 / centre
    coef, shift = torch.zeros_like(lo), lo.new_zeros(())
    if side > 0:
        # e·r <= r_hi·e + a·r - a·r_hi, and r_lo·e + b·r - b·r_lo
        e_w, r_w = mix * r_hi + (1 - mix) * r_lo, mix * a + (1 - mix) * b
        constant = -mix * a * r_hi - (1 - mix) * b * r_lo
        s_w, constant = r_w * chord, constant + r_w * chord_shift
        # s enters with a negative weight: from below.
        coef, shift = coef + s_w * below, shift + (s_w * below_shift).sum()
        coef[k], shift = coef[k] + e_w * above[k], shift + e_w * above_shift[k]
    else:
        # e·r >= r_lo·e + a·r - a·r_lo, and r_hi·e + b·r - b·r_hi
        e_w, r_w = -mix * r_lo - (1 - mix) * r_hi, -mix * a - (1 - mix) * b
        constant = mix * a * r_lo + (1 - mix) * b * r_hi
        s_w, constant = r_w * tangent, constant + r_w * tangent_shift
        # s enters with a positive weight: from above.
        coef, shift = coef + s_w * above, shift + (s_w * above_shift).sum()
        coef[k], shift = coef[k] + e_w * below[k], shift + e_w * below_shift[k]
    shift = shift + constant
    return coef, shift - coef.sum() * base


def gap(student: Layers, reference: Layers, lo: Tensor, hi: Tensor, k: int) -> float:
    """An upper bound of |p_S,k - p_R,k| on [lo, hi]: the least that Adam on the slopes saw."""
    nets = (student, reference)
    slopes = [[torch.full_like(b, 0.5).requires_grad_() for _, b in net[:-1]] for net in nets]
    mixes = torch.full((2, 2), 0.5, dtype=lo.dtype).requires_grad_()
    optimiser = torch.optim.Adam([mixes, *(s for net in slopes for s in net)], lr=RATE)
    best = 1.0
    for _ in range(STEPS):
        boxes = [_boxes(net, own, lo, hi) for net, own in zip(nets, slopes, strict=True)]
        values = []
        for turn, signs in enumerate(((1.0, -1.0), (-1.0, 1.0))):
            coef, shift, plain = 0.0, 0.0, 0.0
            parts = zip(nets, slopes, boxes, signs, mixes[turn].clamp(0, 1), strict=True)
            for net, own, known, side, mix in parts:
                row, constant = _softmax_plane(known[-1], k, side, mix)
                plane = _crown(net, own, known, row[None])
                coef, shift = coef + plane[0], shift + plane[1] + constant
                plain = plain + _plain(known[-1], k, side)
            values.append(torch.minimum(_top(coef, shift, lo, hi)[0], plain))
        value = torch.stack(values).max()
        best = min(best, float(value.detach()))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    return best


def _plain(z: tuple[Tensor, Tensor], k: int, side: float) -> Tensor:
    """The largest side·softmax(z)_k on the box itself."""
    ends = (z[0], z[1]) if side > 0 else (z[1], z[0])
    point = ends[0].clone()
    point[k] = ends[1][k]
    return side * torch.softmax(point, 0)[k]
