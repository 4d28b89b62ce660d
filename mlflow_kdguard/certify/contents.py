"""Whether any content of a square sends an image to a class: branch and bound over the contents.

A part is a box of contents of one image. It is closed where, for *one* other class k, the linear
upper bound of z_t - z_k (CROWN, arXiv 1811.00866, with all hidden layers bounded anew for the
part) and what float32 inference may add to it lie below -margin everywhere in it; a part that is
open is halved along the pixel to which the bound owes most. A square has few pixels, so that parts
soon become small enough for nearly all switches to be decided. The two halves cover the part, and
the first part is [0, 1] in every pixel: an image none of whose parts is open keeps another class
for every content.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from mlflow_kdguard.certify.backward import backward, written_out
from mlflow_kdguard.certify.forms import Form
from mlflow_kdguard.certify.joint import Joint
from mlflow_kdguard.certify.propagate import relax
from mlflow_kdguard.certify.region import Region, whole
from mlflow_kdguard.certify.rounding import up

_CHUNK_BYTES = 48 << 20
"""What boxes and rows of the parts that are bounded together may take."""
_COPIES = 12
"""Numbers that are held for each value of the network and part."""
_AT_ONCE = 2048
"""Parts that are halved in one round."""


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """What is asked: B images (float64 B×C×H×W), a square, the class aimed at, and by how much
    another logit must lead.

    `errors` (float64 B×(K-1)): what onnxruntime's rounding may add to z_t - z_k, for the other
    classes k, whatever is in the square.
    """

    joint: Joint
    images: Tensor
    region: Region
    target: int
    margin: float
    errors: Tensor

    def leads(self, image: Tensor, contents: Tensor) -> Tensor:
        """z_t minus the largest other logit, for `contents` in the images at `image`: N."""
        x = self.region.paste(self.images[image].to(contents.dtype), contents)
        return lead(self.joint.logits(x)[1], self.target)


def lead(logits: Tensor, target: int) -> Tensor:
    """The target's logit minus the largest other one: N."""
    others = torch.cat((logits[:, :target], logits[:, target + 1 :]), 1)
    return logits[:, target] - others.amax(1)


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """N boxes of contents (float64 N×C×s×s), each of an image (int64 N).

    `upper`: bound of the lead of the target anywhere in the part (N), `computed` the same for the
    lead that onnxruntime computes; `highest`: contents at which the bound is attained; `share`:
    N×(C s s), how much of the bound each pixel accounts for.
    """

    image: Tensor
    lo: Tensor
    hi: Tensor
    upper: Tensor
    computed: Tensor
    highest: Tensor
    share: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def take(self, which: Tensor) -> "Parts":
        """The parts at `which` (int64 or bool)."""
        return Parts(*(getattr(self, name)[which] for name in self.__slots__))

    def joined(self, other: "Parts") -> "Parts":
        """These parts, then the others."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in self.__slots__)
        return Parts(*(torch.cat(pair) for pair in pairs))

    def halves(self) -> "Parts":
        """Both halves of every part, along the pixel with the largest share, not yet bounded."""
        width = (self.hi - self.lo).flatten(1)
        chosen = torch.where(self.share > 0.0, self.share, width * 1e-300).argmax(1)
        here = torch.nn.functional.one_hot(chosen, width.shape[1]).bool().view_as(self.lo)
        middle = (self.lo + self.hi) / 2
        first = replace(self, hi=torch.where(here, middle, self.hi))
        return first.joined(replace(self, lo=torch.where(here, middle, self.lo)))


def begun(scene: Scene, image: Tensor) -> Parts:
    """All contents of the square in the images at `image`, as one part each, not yet bounded."""
    lo, hi = whole(scene.region, scene.images[image])
    nothing = torch.full((len(lo),), torch.inf, dtype=torch.float64, device=lo.device)
    return Parts(image, lo, hi, nothing, nothing, lo, (hi - lo).flatten(1))


def bounded(scene: Scene, parts: Parts) -> Parts:
    """The parts with their bounds, never above what was known, in chunks that fit in memory."""
    size = _CHUNK_BYTES // (8 * _COPIES * sum(prod(op.shape) for op in scene.joint.ops))
    rows = torch.arange(len(parts), device=parts.image.device)
    done = [_bounded(scene, parts.take(which)) for which in torch.split(rows, max(1, size))]
    joined = done[0]
    for part in done[1:]:
        joined = joined.joined(part)
    return joined


def _bounded(scene: Scene, parts: Parts) -> Parts:
    joint, target, n = scene.joint, scene.target, len(parts)
    ball = scene.region.box(scene.images[parts.image], parts.lo, parts.hi)
    relaxed = relax(joint, ball, tighten=True)
    others = [k for k in range(joint.classes) if k != target]
    rows = -torch.eye(joint.classes, dtype=torch.float64, device=ball.lo.device)[others]
    rows[:, target] = 1.0
    image = torch.arange(n, device=rows.device).repeat_interleave(len(others))
    plane = backward(relaxed, [(joint.student, Form(rows.repeat(n, 1)))], image)
    bounds = plane.highest(ball).view(n, -1)
    computed, which = up(bounds + scene.errors[parts.image]).min(1)
    upper = bounds.gather(1, which[:, None])[:, 0]
    coef = scene.region.cut(written_out(plane, joint.input_shape))
    coef = coef.reshape(n, len(others), -1)[torch.arange(n, device=rows.device), which]
    lo, hi = parts.lo.flatten(1), parts.hi.flatten(1)
    return replace(
        parts,
        upper=_least(parts.upper, upper),
        computed=_least(parts.computed, computed),
        highest=torch.where(coef > 0.0, hi, lo).view_as(parts.lo),
        share=coef.abs() * (hi - lo),
    )


def _least(known: Tensor, found: Tensor) -> Tensor:
    return torch.minimum(known, torch.where(found.isnan(), torch.inf, found))


@dataclass(frozen=True, slots=True, eq=False)
class Searched:
    """For each of B images: `upper`, float64, bound of the lead for every content, `computed` that
    of the lead in float32; `nodes`, parts that were bounded; `closed`, whether no part was left
    open; `best` (B×C×s×s), the content of the largest lead found, and that `lead`."""

    upper: Tensor
    computed: Tensor
    nodes: Tensor
    closed: Tensor
    best: Tensor
    lead: Tensor


Stopped = Callable[[], bool]


def search(scene: Scene, best: Tensor, *, nodes: int, stopped: Stopped) -> Searched:
    """Halve open parts of every image until none is left, or `nodes` of them were bounded.

    `best`: contents (B×C×s×s) that an attack found. An image for which a content is known whose
    lead, with the least that float32 may add, exceeds -margin is not looked at further: its parts
    cannot all be closed.
    """
    return _Search(scene, best, nodes).run(stopped)


class _Search:
    def __init__(self, scene: Scene, best: Tensor, nodes: int) -> None:
        self.scene, self.limit, self.best = scene, nodes, best.clone()
        images = torch.arange(len(best), device=best.device)
        self.lead = scene.leads(images, best)
        self.nodes = torch.zeros_like(images)
        self.shut = torch.full((2, len(self.lead)), -torch.inf, dtype=torch.float64).to(best.device)
        self.open = begun(scene, images)

    def run(self, stopped: Stopped) -> Searched:
        """Round by round; every round bounds both halves of some open parts."""
        if not stopped():
            self.open = self._looked_at(self.open)
        while len(which := self._chosen()) and not stopped():
            rest = torch.ones(len(self.open), dtype=torch.bool, device=which.device)
            rest[which] = False
            halves = self._looked_at(self.open.take(which).halves())
            self.open = self.open.take(rest).joined(halves)
        self._shut(self.open)
        closed = torch.ones_like(self.nodes, dtype=torch.bool)
        closed[self.open.image] = False
        return Searched(self.shut[0], self.shut[1], self.nodes, closed, self.best, self.lead)

    def _shut(self, parts: Parts) -> None:
        """What these parts say is part of the bounds."""
        values = torch.stack((parts.upper, parts.computed))
        where = parts.image.expand_as(values)
        self.shut = self.shut.scatter_reduce(1, where, values, "amax")

    def _looked_at(self, parts: Parts) -> Parts:
        """Bound the parts and note what was found; those that stay open are returned."""
        found = bounded(self.scene, parts)
        self.nodes.index_add_(0, found.image, torch.ones_like(found.image))
        self._note(found)
        shut = found.computed < -self.scene.margin
        self._shut(found.take(shut))
        return found.take(~shut)

    def _note(self, found: Parts) -> None:
        """Remember, for each image, the content of the largest lead at the highest points."""
        leads = self.scene.leads(found.image, found.highest)
        top = self.lead.scatter_reduce(0, found.image, leads, "amax")
        raised = (leads > self.lead[found.image]) & (leads >= top[found.image])
        self.best[found.image[raised]] = found.highest[raised]
        self.lead = top

    def _chosen(self) -> Tensor:
        """Open parts to halve: the largest bounds of each image that is neither decided nor at its
        limit. How many does not depend on the other images, and so the verdicts do not either."""
        image, upper = self.open.image, self.open.upper
        left = (self.limit - self.nodes) // 2
        hopeless = self.lead + self.scene.errors.amin(1) >= -self.scene.margin
        left = left.masked_fill(hopeless, 0)
        order = upper.argsort(descending=True, stable=True)
        order = order[image[order].argsort(stable=True)]
        counts = torch.bincount(image, minlength=len(left))
        rank = torch.arange(len(order), device=order.device)
        rank = rank - (counts.cumsum(0) - counts)[image[order]]
        each = max(1, _AT_ONCE // len(left))
        return order[rank < left.clamp(max=each)[image[order]]]
