"""Squares of an image that an attacker may fill: where they are, and what is pasted into them."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from mlflow_kdguard.certify.ball import Ball
from mlflow_kdguard.errors import ConfigError

CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")

_PLACE = re.compile(r"(\d{1,6}),(\d{1,6})")


@dataclass(frozen=True, slots=True)
class Region:
    """`size`×`size` pixels of every channel; the top left one is at (`row`, `column`), from 0."""

    row: int
    column: int
    size: int

    @classmethod
    def named(cls, text: str, size: int, shape: tuple[int, ...]) -> "Region":
        """The square that `text` names on images of `shape`: a corner, or ROW,COLUMN.

        Raises ConfigError where it names none, or one that leaves the image.
        """
        height, width = shape[-2:]
        place = _PLACE.fullmatch(text.replace(" ", ""))
        if place is not None:
            row, column = int(place[1]), int(place[2])
        elif text in CORNERS:
            row = 0 if text.startswith("top") else height - size
            column = 0 if text.endswith("left") else width - size
        else:
            raise ConfigError(
                f"{text!r} is no position of a patch.",
                remedy=f"Write ROW,COLUMN of its top left pixel, or {', '.join(CORNERS)}.",
            )
        if not (0 <= row <= height - size and 0 <= column <= width - size):
            raise ConfigError(
                f"a patch of {size}×{size} pixels at {text} leaves images of {height}×{width}.",
                remedy="Name a smaller size, or another position.",
            )
        return cls(row, column, size)

    def __str__(self) -> str:
        return f"{self.row},{self.column}"

    def cut(self, images: Tensor) -> Tensor:
        """The square's pixels, N×C×size×size, of images N×C×H×W."""
        end = self.row + self.size, self.column + self.size
        return images[..., self.row : end[0], self.column : end[1]]

    def paste(self, images: Tensor, contents: Tensor) -> Tensor:
        """The images with `contents` (N×C×size×size) in the square; everything else is kept."""
        pasted = images.clone()
        self.cut(pasted).copy_(contents)
        return pasted

    def box(self, images: Tensor, lo: Tensor, hi: Tensor) -> Ball:
        """All images whose square lies between `lo` and `hi` (float64 N×C×size×size each).

        Bounds ask a linf ball for its ends only; `eps` is that of the unit box.
        """
        ends = self.paste(images, lo), self.paste(images, hi)
        return Ball((ends[0] + ends[1]) / 2, *ends, 0.5, "linf")


def whole(region: Region, images: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of all contents of the square, [0, 1] in every pixel and channel."""
    ends = region.cut(images).double()
    return torch.zeros_like(ends), torch.ones_like(ends)
