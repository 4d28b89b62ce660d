"""Linear functionals of a layer's output, the rows that a backward pass carries.

A row of a convolution sees only a window of each earlier layer. A `Form` stores that window and
where it lies, which makes a row of a deep neuron several times cheaper than a dense one. Rows of
all channels share their place, so that what a layer's maps hold there is cut out once a place.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """G places of windows, and which of them each of N rows has (`row`, int64 N).

    `image`, `top`, `left`: int64 G, the image of the batch and the window's first row and column.
    """

    row: Tensor
    image: Tensor
    top: Tensor
    left: Tensor

    def moved(self, top: Tensor, left: Tensor) -> "Places":
        """The same rows at other places of the same images."""
        return replace(self, top=top, left=left)

    def cut(self, maps: Tensor, height: int, width: int) -> Tensor:
        """`maps` (B×C×H×W, or 1×C×H×W shared) at each place: G×C×h×w, zero outside the layer."""
        padded = F.pad(maps, (width, width, height, height))
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        which = torch.zeros_like(self.image) if maps.shape[0] == 1 else self.image
        return windows[which, :, self.top + height, self.left + width]


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """N functionals of one layer's output.

    `coef` is N×shape where `places` is None (dense); else it is N×C×h×w, the coefficients of rows
    top .. top+h-1 and columns left .. left+w-1 of each channel. Where `spills`, coefficients
    outside the layer may differ from zero; they mean nothing and `clean` removes them.
    """

    coef: Tensor
    places: Places | None = None
    spills: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the window."""
        return int(self.coef.shape[-2]), int(self.coef.shape[-1])

    def norm1(self) -> Tensor:
        """Sum of the coefficients' magnitudes, a row: N."""
        return self.coef.abs().flatten(1).sum(1)

    def dot(self, maps: Tensor, image: Tensor) -> Tensor:
        """Value of each functional on `maps` (B×shape or 1×shape) of its image: N."""
        return inner(self.coef, self.read(maps, image))

    def read(self, maps: Tensor, image: Tensor) -> Tensor:
        """`maps` (B×shape or 1×shape, shared) of each row's image, cut to its window."""
        if self.places is None:
            return maps if maps.shape[0] == 1 else maps[image]
        return self.places.cut(maps, *self.size)[self.places.row]

    def with_coef(self, coef: Tensor) -> "Form":
        """The same windows with other coefficients, zero outside the layer if these are."""
        return replace(self, coef=coef)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise inner product of two N×… tensors (or 1×… for b): N."""
    if b.shape[0] != a.shape[0]:
        return (a.flatten(1) @ b.reshape(-1, 1))[:, 0]
    return (a.flatten(1)[:, None] @ b.flatten(1)[..., None])[:, 0, 0]


def one_hot(shape: Shape, image: Tensor, index: Tensor, sign: Tensor) -> Form:
    """`sign` (N) times neuron `index` (N, row-major) of a layer of this shape."""
    n = index.shape[0]
    rows = torch.arange(n, device=index.device)
    if len(shape) != 3:
        coef = sign.new_zeros((n, *shape))
        coef.view(n, -1)[rows, index] = sign
        return Form(coef)
    channels, height, width = shape
    coef = sign.new_zeros((n, channels, 1, 1))
    coef[rows, index // (height * width), 0, 0] = sign
    place, row = torch.unique(
        image * (height * width) + index % (height * width), return_inverse=True
    )
    at = place % (height * width)
    return Form(coef, Places(row, place // (height * width), at // width, at % width))


def dense(form: Form, shape: Shape) -> Form:
    """The same functionals with all coefficients written out."""
    if form.places is None:
        return form
    _, height, width = shape
    row = form.places.row
    rows = _spread(form.coef, form.places.top[row], height, axis=2)
    return Form(_spread(rows, form.places.left[row], width, axis=3))


def clean(form: Form, shape: Shape) -> Form:
    """The same functionals with zeros where windows leave the layer."""
    if form.places is None or not form.spills:
        return form
    ones = form.coef.new_ones((1, 1, *shape[1:]))
    kept = form.places.cut(ones, *form.size)[form.places.row]
    return Form(form.coef * kept, form.places)


def settle(form: Form, shape: Shape) -> Form:
    """Dense where windows cover the whole layer anyway."""
    if form.places is None or form.size[0] < shape[-2] or form.size[1] < shape[-1]:
        return form
    return dense(form, shape)


def add(a: Form, b: Form, shape: Shape) -> Form:
    """a + b; windows that differ by one offset for all rows are joined, others written out."""
    if a.places is None or b.places is None or len(a.places.top) != len(b.places.top):
        return Form(dense(a, shape).coef + dense(b, shape).coef)
    down, right = b.places.top - a.places.top, b.places.left - a.places.left
    if bool((down != down[0]).any()) or bool((right != right[0]).any()):
        return Form(dense(a, shape).coef + dense(b, shape).coef)
    top, bottom = _union(a.size[0], b.size[0], int(down[0]))
    left, end = _union(a.size[1], b.size[1], int(right[0]))
    width, height = end - left, bottom - top
    coef = _place(a.coef, -top, -left, height, width)
    coef = coef + _place(b.coef, int(down[0]) - top, int(right[0]) - left, height, width)
    joined = a.places.moved(a.places.top + top, a.places.left + left)
    return settle(Form(coef, joined, a.spills or b.spills), shape)


def _union(size_a: int, size_b: int, offset: int) -> tuple[int, int]:
    return min(0, offset), max(size_a, offset + size_b)


def _place(coef: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    bottom, right = height - top - coef.shape[2], width - left - coef.shape[3]
    return F.pad(coef, (left, right, top, bottom))


def _spread(coef: Tensor, start: Tensor, length: int, *, axis: int) -> Tensor:
    """Move each row's window along one axis to its place in 0 .. length-1."""
    size = coef.shape[axis]
    source = torch.arange(length, device=start.device) - start[:, None]
    known = (source >= 0) & (source < size)
    view = [1, 1, 1, 1]
    view[0], view[axis] = coef.shape[0], length
    shape = list(coef.shape)
    shape[axis] = length
    picked = coef.gather(axis, source.clamp(0, size - 1).view(view).expand(shape))
    return picked * known.view(view)
