"""Lower bounds: contents of a square that really send images to the target class.

PGD (arXiv 1706.06083) over the contents alone, one content for each image, or one for all of them
(a universal patch, as in Brown et al., arXiv 1712.09665, at a fixed place). What is reported is
evaluated in float64, by the NumPy interpreter that shares no code with the bounds.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mlflow_kdguard.adversary.pgd import ascend
from mlflow_kdguard.certify.contents import Scene, lead
from mlflow_kdguard.errors import SoundnessError
from mlflow_kdguard.graph import Graph, evaluate

_ROWS = 512
"""Images in one pass, at most."""
_PASS_BYTES = 256 << 20
"""What a pass may keep for its gradient."""
CANDIDATES = 32
"""Contents, at most, that flipped one image and are tried on all of them."""


@dataclass(frozen=True, slots=True)
class Effort:
    """Steps of a search, and from how many random contents it starts besides the plain ones."""

    steps: int
    restarts: int


def single(scene: Scene, *, effort: Effort, generator: torch.Generator) -> Tensor:
    """For each of B images the content of the largest lead found: float64 B×C×s×s in [0, 1].

    Starts: the image's own pixels, black, white, random grey and random black-and-white. The scene
    is float32.
    """
    own = scene.region.cut(scene.images)
    starts = [own, *_plain(own), *_drawn(own, effort.restarts, generator)]
    image = torch.arange(len(own), device=own.device).repeat(len(starts))
    found, leads = [], []
    for which in torch.split(torch.arange(len(image), device=own.device), _rows(scene, _ROWS)):
        start, base = torch.cat(starts)[which], scene.images[image[which]]

        def objective(contents: Tensor, base: Tensor = base) -> Tensor:
            return lead(scene.joint.logits(scene.region.paste(base, contents))[1], scene.target)

        found.append(_ascended(objective, start, effort.steps))
        with torch.no_grad():
            leads.append(objective(found[-1]))
    best = torch.cat(leads).view(len(starts), -1).argmax(0)
    return torch.cat(found).view(len(starts), *own.shape)[best, image[: len(own)]].double()


def universal(scene: Scene, known: Tensor, *, effort: Effort, generator: torch.Generator) -> Tensor:
    """The content that sends most of the images to the target: C×s×s float64.

    Ascends the mean log-sigmoid of the leads in the first images, as many as one gradient has room
    for; contents in `known` (N×C×s×s), which flip one image each, are tried as well. The scene is
    float32: counts are for choosing, not for reporting.
    """
    some = scene.region.cut(scene.images[:1])
    starts = torch.cat((*_plain(some), *_drawn(some, effort.restarts, generator)))

    first = replace(scene, images=scene.images[: max(1, _rows(scene) // len(starts))])

    def objective(contents: Tensor) -> Tensor:
        total = contents.new_zeros(len(contents))
        for leads in _all_leads(first, contents):
            total = total + functional.logsigmoid(leads).sum(1)
        return total

    found = _ascended(objective, starts, effort.steps)
    tried = torch.cat((starts, found, known.to(found)[:CANDIDATES]))
    with torch.no_grad():
        hits = sum((leads > 0.0).sum(1) for leads in _all_leads(scene, tried))
        scores = objective(tried) / len(first.images)
    assert isinstance(hits, Tensor)
    order = hits.double() + torch.sigmoid(scores).double() / 2
    return tried[int(order.argmax())].double()


def _all_leads(scene: Scene, contents: Tensor) -> Iterator[Tensor]:
    """Leads of each of M contents in every image, some images at a time: M×(images)."""
    for images in torch.split(scene.images, max(1, _rows(scene, _ROWS) // len(contents))):
        base = images.repeat(len(contents), 1, 1, 1)
        x = scene.region.paste(base, contents.repeat_interleave(len(images), 0))
        yield lead(scene.joint.logits(x)[1], scene.target).view(len(contents), -1)


def _rows(scene: Scene, at_most: int = 1 << 20) -> int:
    """Images in one pass, by what the network's values of one image take."""
    values = sum(prod(op.shape) for op in scene.joint.ops)
    return max(8, min(at_most, _PASS_BYTES // (4 * values)))


def _ascended(objective: object, start: Tensor, steps: int) -> Tensor:
    """PGD in the unit box; sign steps soon reach its corners, where best contents mostly lie."""
    centre = torch.full_like(start, 0.5)
    return ascend(objective, centre, eps=0.5, steps=steps, start=start)  # type: ignore[arg-type]


def _plain(like: Tensor) -> list[Tensor]:
    return [torch.zeros_like(like), torch.ones_like(like)]


def _drawn(like: Tensor, restarts: int, generator: torch.Generator) -> list[Tensor]:
    drawn = []
    for number in range(restarts):
        grey = torch.rand(like.shape, generator=generator).to(like)
        drawn.append(grey.round() if number % 2 else grey)
    return drawn


def attained(
    model: Graph, scene: Scene, contents: Tensor
) -> tuple[NDArray[np.float64], list[bool]]:
    """The lead of the target, and whether it is the answer, with each image's content: float64 B.

    Raises SoundnessError for contents that are none: outside [0, 1], or of another shape.
    """
    fits = contents.shape == scene.region.cut(scene.images).shape
    if not (fits and bool(((contents >= 0.0) & (contents <= 1.0)).all())):
        raise SoundnessError("a patch left the pixel range: what it does says nothing.")
    x = scene.region.paste(scene.images.double(), contents.double())
    logits = torch.from_numpy(evaluate(model, x.cpu().numpy()))
    return lead(logits, scene.target).numpy(), (logits.argmax(1) == scene.target).tolist()
