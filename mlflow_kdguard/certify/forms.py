"""Linear functionals of a layer's output, the rows that a backward pass carries.

A row of a convolution sees only a window of each earlier layer. `Form` stores that window and
where it lies, which makes a row of a deep neuron several times cheaper than a dense one. Parts of
a window outside the layer hold zeros.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """N functionals of one layer's output.

    `coef` is N×shape where `top` is None (dense); else it is N×C×h×w, the coefficients of rows
    top .. top+h-1 and columns left .. left+w-1 of each channel (`top`, `left`: int64 N).
    """

    coef: Tensor
    top: Tensor | None = None
    left: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the window."""
        return int(self.coef.shape[-2]), int(self.coef.shape[-1])

    def norm1(self) -> Tensor:
        """Sum of the coefficients' magnitudes, a row: N."""
        return self.coef.abs().flatten(1).sum(1)

    def dot(self, maps: Tensor, image: Tensor) -> Tensor:
        """Value of each functional on `maps` (B×shape or 1×shape) of its image: N."""
        return (self.coef * self.read(maps, image)).flatten(1).sum(1)

    def read(self, maps: Tensor, image: Tensor) -> Tensor:
        """`maps` (B×shape or 1×shape, shared) of each row's image, cut to its window."""
        if self.top is None or self.left is None:
            return maps if maps.shape[0] == 1 else maps[image]
        height, width = self.size
        padded = F.pad(maps, (width, width, height, height))
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        which = torch.zeros_like(image) if maps.shape[0] == 1 else image
        return windows[which, :, self.top + height, self.left + width]

    def with_coef(self, coef: Tensor) -> "Form":
        """The same windows with other coefficients."""
        return replace(self, coef=coef)


def one_hot(shape: Shape, index: Tensor, sign: Tensor) -> Form:
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
    return Form(coef, index // width % height, index % width)


def dense(form: Form, shape: Shape) -> Form:
    """The same functionals with all coefficients written out."""
    if form.top is None or form.left is None:
        return form
    _, height, width = shape
    rows = _spread(form.coef, form.top, height, axis=2)
    return Form(_spread(rows, form.left, width, axis=3))


def inside(form: Form, shape: Shape) -> Form:
    """`form` with zeros where its windows leave the layer; dense if they cover all of it."""
    if form.top is None or form.left is None:
        return form
    height, width = form.size
    if height >= shape[-2] and width >= shape[-1]:
        return dense(form, shape)
    rows = form.top[:, None] + torch.arange(height, device=form.top.device)
    columns = form.left[:, None] + torch.arange(width, device=form.left.device)
    valid_rows = ((rows >= 0) & (rows < shape[-2]))[:, None, :, None]
    valid_columns = ((columns >= 0) & (columns < shape[-1]))[:, None, None, :]
    return form.with_coef(form.coef * (valid_rows & valid_columns))


def add(a: Form, b: Form, shape: Shape) -> Form:
    """a + b; windows that differ by one offset for all rows are joined, others written out."""
    if a.top is None or b.top is None or a.left is None or b.left is None:
        return Form(dense(a, shape).coef + dense(b, shape).coef)
    down, right = b.top - a.top, b.left - a.left
    if bool((down != down[0]).any()) or bool((right != right[0]).any()):
        return Form(dense(a, shape).coef + dense(b, shape).coef)
    top, bottom = _union(a.size[0], b.size[0], int(down[0]))
    left, end = _union(a.size[1], b.size[1], int(right[0]))
    width, height = end - left, bottom - top
    coef = _place(a.coef, -top, -left, height, width)
    coef = coef + _place(b.coef, int(down[0]) - top, int(right[0]) - left, height, width)
    return inside(Form(coef, a.top + top, a.left + left), shape)


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
