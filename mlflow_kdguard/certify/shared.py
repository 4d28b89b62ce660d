"""How many images one content can send to a class: branch and bound over contents they share.

`contents` bounds the images that *some* content flips, a content each. A trigger that is the same
on every image flips fewer. A node is a box of contents with the images for which the lead of the
target in float32 is not bounded below -margin in it; no content of the box flips more than these.
Nodes cover all contents, so that the largest count of any node bounds every universal patch.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from mlflow_kdguard.certify.contents import Parts, Scene, Stopped, begun, bounded

_PAIRS = 2048
"""(Box, image) pairs that are bounded in one round."""


@dataclass(frozen=True, slots=True)
class Counted:
    """`most`: images that one content may flip, at most; `pairs`: how much was bounded."""

    most: int
    pairs: int


def count(scene: Scene, images: Tensor, *, enough: int, pairs: int, stopped: Stopped) -> Counted:
    """Bound how many of `images` (int64, those with an open part) any one content flips.

    Ends where no box holds more than `enough` images, which some content is known to flip, or
    after `pairs` of a box and an image were bounded.
    """
    if len(images) == 0:
        return Counted(0, 0)
    open_, seen = [begun(scene, images)], 0
    # The root box is not bounded again: its images are those that it could not close.
    while len(open_[0]) > enough and seen < pairs and not stopped():
        taken, rest = _round(open_, enough, min(_PAIRS, pairs - seen))
        halves = _halved(taken)
        seen += sum(map(len, halves))
        open_ = sorted([*rest, *_still_open(scene, halves)], key=len, reverse=True)
        if not open_:
            return Counted(0, seen)
    return Counted(len(open_[0]), seen)


def _round(boxes: list[Parts], enough: int, left: int) -> tuple[list[Parts], list[Parts]]:
    """The boxes with the most images, as many as a round may halve, and the others."""
    number, pairs = 0, 0
    for box in boxes:
        pairs += 2 * len(box)
        if len(box) <= enough or (number and pairs > left):
            break
        number += 1
    return boxes[:number], boxes[number:]


def _halved(boxes: list[Parts]) -> list[Parts]:
    """Both halves of each box, along the pixel to which the bounds of its images owe most."""
    halves = []
    for box in boxes:
        same = box.share.sum(0, keepdim=True).expand_as(box.share)
        nothing = torch.full_like(box.upper, torch.inf)
        both = replace(box, share=same, upper=nothing, computed=nothing).halves()
        halves += [both.take(part) for part in torch.arange(len(both)).chunk(2)]
    return halves


def _still_open(scene: Scene, boxes: list[Parts]) -> list[Parts]:
    """Every box with the images that it leaves open; boxes without any are done with."""
    pairs = boxes[0]
    for box in boxes[1:]:
        pairs = pairs.joined(box)
    found = bounded(scene, pairs)
    ends = torch.tensor([0, *(len(box) for box in boxes)]).cumsum(0).tolist()
    kept = []
    for start, end in pairwise(ends):
        part = found.take(torch.arange(start, end, device=found.image.device))
        part = part.take(part.computed >= -scene.margin)
        if len(part):
            kept.append(part)
    return kept
