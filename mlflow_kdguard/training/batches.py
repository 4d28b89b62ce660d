"""Which images a step sees: order from (seed, epoch), augmentation from the step's generator."""

import hashlib

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mlflow_kdguard.config import Loop
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.errors import DataError

_RESIDENT = 4 << 30
"""Bytes of images that are kept on an accelerator; larger sets are moved batch by batch."""


def derive(*parts: int | str) -> int:
    """A 63-bit seed for one purpose, such as `derive(seed, "order", epoch)`."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Batches:
    """Draws augmented batches from one tensor that holds the whole set.

    An epoch is floor(n / batch) full batches of a fresh permutation (one batch where n < batch):
    a short rest would be a noisier step, and what it holds is seen in the next epochs.
    """

    def __init__(self, data: Dataset, loop: Loop, *, seed: int, device: torch.device) -> None:
        if len(data) == 0:
            raise DataError(f"{data.uri} holds no images.", remedy="Name data to train on.")
        self._seed = seed
        self._device = device
        self._flip = loop.augment == "shift-flip"
        self._shift = 0 if loop.augment == "none" else loop.shift
        self._format = torch.channels_last if loop.channels_last else torch.contiguous_format
        self._size = min(loop.batch, len(data))
        self.per_epoch = len(data) // self._size
        self._count = len(data)
        self._labels = torch.from_numpy(np.ascontiguousarray(data.y)).to(device)
        self._windows = self._views(torch.from_numpy(np.ascontiguousarray(data.x)))
        self._order = (-1, torch.empty(0, dtype=torch.int64))

    def draw(self, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Images N×C×H×W, labels N and indices N of a step, augmented by `generator`."""
        epoch, place = divmod(step, self.per_epoch)
        if self._order[0] != epoch:
            order = torch.Generator().manual_seed(derive(self._seed, "order", epoch))
            self._order = (epoch, torch.randperm(self._count, generator=order).to(self._device))
        index = self._order[1][place * self._size : (place + 1) * self._size]
        return self._images(index, generator), self._labels[index], index

    def _views(self, images: Tensor) -> Tensor:
        """All shifted views of all images, n×C×(2s+1)×(2s+1)×H×W, without copying any."""
        height, width = images.shape[2:]
        padded = functional.pad(images, (self._shift,) * 4) if self._shift else images
        if padded.numel() * padded.element_size() <= _RESIDENT:
            padded = padded.to(self._device)
        return padded.unfold(2, height, 1).unfold(3, width, 1)

    def _images(self, index: Tensor, generator: torch.Generator) -> Tensor:
        choices = 2 * self._shift + 1
        corner = torch.randint(
            choices, (2, len(index)), generator=generator, device=generator.device
        ).to(self._windows.device)
        x = self._windows[index.to(self._windows.device), :, corner[0], corner[1]].to(self._device)
        if self._flip:
            coin = torch.rand(len(index), generator=generator, device=generator.device) < 0.5
            x = torch.where(coin.to(x.device)[:, None, None, None], x.flip(3), x)
        return x.contiguous(memory_format=self._format)
