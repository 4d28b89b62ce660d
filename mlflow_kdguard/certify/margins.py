"""Margins of the logits: boxes around them, and planes above them and above their negatives.

The margins a_j = z_j - z_k of class k are folded into the functionals that the backward pass
starts from, so that the difference is taken before anything is relaxed.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from mlflow_kdguard.certify.backward import Relaxed, backward, written_out
from mlflow_kdguard.certify.confidence import Margins
from mlflow_kdguard.certify.forms import Form
from mlflow_kdguard.certify.rounding import down, up

_ROW_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Items:
    """N questions: an image of the batch and a class each (int64 N)."""

    image: Tensor
    klass: Tensor

    def others(self, classes: int) -> Tensor:
        """The classes other than the item's own, ascending: int64 N×(K-1)."""
        rest = torch.arange(classes - 1, device=self.klass.device)
        return rest + (rest >= self.klass[:, None])

    def unfold(self, weights: Tensor, classes: int) -> Tensor:
        """Multipliers of the margins (N×(K-1)) as coefficients of the logits: N×K."""
        rows = weights.new_zeros((len(weights), classes)).scatter(1, self.others(classes), weights)
        return rows.scatter(1, self.klass[:, None], -weights.sum(1, keepdim=True))


@dataclass(frozen=True, slots=True, eq=False)
class Planes:
    """Margins of one network: their box, and planes (N×m×d coefficients, N×m shifts)."""

    box: Margins
    above: tuple[Tensor, Tensor]
    above_negative: tuple[Tensor, Tensor]


def boxed(relaxed: Relaxed, items: Items, output: int) -> Margins:
    """Margins of one network from the box of its logits."""
    box, classes = relaxed.boxes[output], relaxed.joint.classes
    lo, hi = box.lo[items.image], box.hi[items.image]
    own, others = items.klass[:, None], items.others(classes)
    return Margins(
        down(lo.gather(1, others) - hi.gather(1, own)), up(hi.gather(1, others) - lo.gather(1, own))
    )


def planes(relaxed: Relaxed, items: Items, outputs: tuple[int, ...]) -> Planes:
    """Margins of one network (one output), or of the first minus those of the second."""
    n, classes = len(items.image), relaxed.joint.classes
    m = classes - 1
    folded = torch.zeros((n, m, classes), dtype=torch.float64, device=items.image.device)
    folded.scatter_(2, items.others(classes)[..., None], 1.0)
    folded.scatter_(2, items.klass[:, None, None].expand(n, m, 1), -1.0)
    rows = torch.stack((folded, -folded), 1).reshape(-1, classes)
    image = items.image.repeat_interleave(2 * m)
    coef, shift, bound = _bound_rows(relaxed, image, rows, outputs)
    coef, shift, bound = coef.view(n, 2, m, -1), shift.view(n, 2, m), bound.view(n, 2, m)
    return Planes(
        Margins(-bound[:, 1], bound[:, 0]), (coef[:, 0], shift[:, 0]), (coef[:, 1], shift[:, 1])
    )


def _bound_rows(
    relaxed: Relaxed, image: Tensor, rows: Tensor, outputs: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Planes above rows·(first output - second output), in chunks: coefficients, shift, bound."""
    joint = relaxed.joint
    step = max(16, _ROW_BYTES // (8 * max(prod(op.shape) for op in joint.ops)))
    parts = []
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        seeds = [(outputs[0], Form(rows[part]))]
        seeds += [(index, Form(-rows[part])) for index in outputs[1:]]
        plane = backward(relaxed, seeds, image[part])
        coef = written_out(plane, joint.input_shape).flatten(1)
        parts.append((coef, plane.shift, plane.highest(relaxed.ball)))
    coefs, shifts, bounds = zip(*parts, strict=True)
    return torch.cat(coefs), torch.cat(shifts), torch.cat(bounds)


def link(own: Margins, other: Margins, difference: Margins) -> Margins:
    """The margins of one network also lie in the other's plus `difference` = own - other."""
    lo = torch.maximum(own.lo, down(other.lo + difference.lo))
    return Margins(lo, torch.minimum(own.hi, up(other.hi + difference.hi)))


def caps(margins: Margins, items: Items) -> Tensor:
    """Upper bound of every other class's confidence, from the margins to the item's class.

    p_j = exp a_j / (1 + Σ_i exp a_i); N×K, and 0 at the item's own class.
    """
    n, m = margins.lo.shape
    exp_lo = margins.lo.exp()
    rest = 1.0 + (exp_lo.sum(1, keepdim=True) - exp_lo).clamp(min=0.0) * (1.0 - 1e-12)
    largest = torch.sigmoid(margins.hi - rest.log()) + 1e-9
    return largest.new_zeros((n, m + 1)).scatter_(1, items.others(m + 1), largest)
