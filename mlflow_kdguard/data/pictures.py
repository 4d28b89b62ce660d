"""Image files that are decoded by the batch, resized where the URI says so."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard.data.images import Images, Indices, Pixels, Shape
from mlflow_kdguard.data.uri import Request

if TYPE_CHECKING:
    from PIL.Image import Image

# Modes that convert to 8-bit RGB without losing what the file says; 16-bit and float do not.
_MODES = frozenset(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"])
# Others are kept out: to decode EPS, Pillow runs Ghostscript on the file.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")


class Pictures:
    """Image files as RGB.

    With `size` the shorter side is resized to it (bilinear, antialiased) and the centre square is
    cut out; without, every file must have the size of the first.
    """

    def __init__(
        self,
        request: Request,
        paths: Sequence[Path],
        size: int | None,
        *,
        shape: Shape | None = None,
    ) -> None:
        self._request, self._paths, self._size = request, paths, size
        self._shape = shape or self._measured()

    @property
    def shape(self) -> Shape:
        return self._shape

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, indices: Indices) -> Pixels:
        _, h, w = self._shape
        pixels = np.empty((len(indices), h, w, 3), np.uint8)
        for row, index in enumerate(indices):
            pixels[row] = self._decode(self._paths[index])
        planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        return planes.astype(np.float32) / np.float32(255)

    def take(self, indices: Indices) -> Images:
        chosen = [self._paths[index] for index in indices]
        return Pictures(self._request, chosen, self._size, shape=self._shape)

    def _measured(self) -> Shape:
        if self._size is not None:
            return 3, self._size, self._size
        height, width, _ = self._open(self._paths[0]).shape
        return 3, height, width

    def _decode(self, path: Path) -> NDArray[np.uint8]:
        pixels = self._open(path)
        if pixels.shape[:2] != self._shape[1:]:
            raise self._request.error(
                f"{path} is {pixels.shape[1]}×{pixels.shape[0]} pixels, but the first image is "
                f"{self._shape[2]}×{self._shape[1]}",
                remedy=f"Choose one size for all: {self._request.name}:DIR?size=32.",
            )
        return pixels

    def _open(self, path: Path) -> NDArray[np.uint8]:
        try:
            from PIL import Image
        except ImportError as error:
            raise self._request.error(
                "decoding image files needs Pillow", remedy="Install it: pip install pillow."
            ) from error
        try:
            with warnings.catch_warnings():
                # A decompression bomb is an error; what else Pillow has to say about a file is not.
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path, formats=_FORMATS) as image:
                    if image.mode not in _MODES:
                        raise ValueError(f"its pixels are {image.mode}, not 8-bit")
                    return np.asarray(_fitted(image.convert("RGB"), self._size), np.uint8)
        except (
            *(OSError, ValueError, SyntaxError, EOFError, MemoryError),
            *(Image.DecompressionBombError, Image.DecompressionBombWarning),
        ) as error:
            raise self._request.error(
                f"cannot read the image {path}: {error}", remedy="Repair or remove the file."
            ) from error


def _fitted(image: "Image", size: int | None) -> "Image":
    """Shorter side to `size`, centre crop; rounded as torchvision's Resize and CenterCrop do."""
    if size is None:
        return image
    width, height = image.size
    if min(width, height) != size:
        short = min(width, height)
        width, height = int(size * width / short), int(size * height / short)
        image = image.resize((width, height), resample=2)  # bilinear
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))
