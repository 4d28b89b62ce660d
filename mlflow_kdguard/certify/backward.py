"""The backward pass: a functional of any layers, as one linear bound in the image.

CROWN (arXiv 1811.00866) on a graph: functionals are pulled from the last operation to the image,
and each bent operation is replaced by the line above or below it, by the sign of the coefficient.
Functionals of both networks share the pass and add up at the image *before* the largest value on
the ball is taken.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from mlflow_kdguard.certify import ops
from mlflow_kdguard.certify.ball import Ball
from mlflow_kdguard.certify.forms import Form, add, clean, dense, inner
from mlflow_kdguard.certify.joint import Index, Joint
from mlflow_kdguard.certify.keep import Kept
from mlflow_kdguard.certify.lines import Lines
from mlflow_kdguard.certify.parallel import go_on
from mlflow_kdguard.certify.rounding import TINY, UNDERFLOW, gamma, up

Seed = tuple[Index, Form]
"""A functional of one operation's value."""

_FEW = 64
"""Images up to which products with all of them cost less than a copy of its own for every row."""
CHUNK_BYTES = 8 << 20
"""Bytes that the widest layer may take for all rows of one pass."""


@dataclass(frozen=True, slots=True, eq=False)
class Relaxed:
    """A graph with what is known about each operation around B images.

    boxes: bounds of each operation's value; scales: B numbers for each operation that its rounding
    errors are proportional to (largest Σ|W||x| + |b|); lines: around each bent operation.
    For a search: `pushes`, non-negative multipliers times the sign that a switch is known to have
    (β-CROWN, arXiv 2103.06624), and `trace`, which receives the coefficients of each bent
    operation's value. Both need functionals that are written out. `each`: where every row has
    lines and pushes of its own, their numbers (int64 N). `kept`: notes for a proof, if asked for.
    `go_on` is called now and then by what takes long, and raises where that is to end.
    """

    joint: Joint
    ball: Ball
    boxes: list[ops.Box]
    scales: list[Tensor]
    lines: dict[Index, Lines]
    pushes: dict[Index, Tensor] = field(default_factory=dict)
    trace: dict[Index, Tensor] | None = None
    each: Tensor | None = None
    kept: Kept | None = None
    go_on: Callable[[], None] = go_on


@dataclass(frozen=True, slots=True, eq=False)
class Plane:
    """functional(x) <= coef · x + shift for every x in the ball: `form` on the image, shift N.

    `shift` contains the a-priori rounding error of the whole pass and of evaluating the plane.
    """

    form: Form
    shift: Tensor
    image: Tensor

    def highest(self, ball: Ball) -> Tensor:
        """Upper bound of the plane on each row's ball: N."""
        form, image = self.form, self.image
        rises, falls = form.coef.clamp(min=0.0), form.coef.clamp(max=0.0)
        if form.places is None and len(ball.centre) <= _FEW:
            best = _of_image(rises, ball.hi, image) + _of_image(falls, ball.lo, image)
        else:
            best = inner(rises, form.read(ball.hi, image)) + inner(falls, form.read(ball.lo, image))
        if ball.norm == "l2":
            known = clean(form, tuple(ball.centre.shape[1:])).coef
            unit = known.flatten(1).abs().amax(1).clamp(min=TINY)  # squares would underflow
            length = unit * torch.linalg.vector_norm(known.flatten(1) / unit[:, None], dim=1)
            best = torch.minimum(best, form.dot(ball.centre, image) + ball.eps * length)
        return up(best + self.shift)

    def corner(self, ball: Ball) -> Tensor:
        """The point of each row's box at which the plane is highest: N×C×H×W."""
        coef = dense(self.form, tuple(ball.centre.shape[1:])).coef
        return torch.where(coef > 0.0, ball.hi[self.image], ball.lo[self.image])


def _of_image(coef: Tensor, maps: Tensor, image: Tensor) -> Tensor:
    """Row-wise inner products with each row's image: one matrix product with all of them."""
    return (coef.flatten(1) @ maps.flatten(1).T).gather(1, image[:, None])[:, 0]


def backward(relaxed: Relaxed, seeds: Sequence[Seed], image: Tensor) -> Plane:
    """The sum of the seeds' functionals, bounded from above by a plane in the image.

    `image`: int64 N, the image whose ball each row speaks of.
    """
    go_on()
    joint = relaxed.joint
    waiting: dict[Index, Form] = {}
    for index, form in seeds:
        _push(joint, waiting, index, form)
    error_rate = gamma(joint.terms)
    shift = torch.zeros(len(image), dtype=torch.float64, device=image.device)
    error = torch.full_like(shift, TINY)
    for index in range(max(waiting), -1, -1):
        if index not in waiting:
            continue
        form = waiting.pop(index)
        error = error + form.norm1() * relaxed.scales[index][image]
        shift = shift + UNDERFLOW * relaxed.scales[index][image]
        if index == 0:
            waiting[0] = form
            break
        forms, constant = _pull(relaxed, index, form, image)
        shift = shift + constant
        for source, part in zip(joint.ops[index].inputs, forms, strict=True):
            _push(joint, waiting, source, part)
    image_form = waiting.get(0)
    if image_form is None:
        image_form = Form(shift.new_zeros((len(image), *joint.input_shape)))
    return Plane(image_form, up(shift + error_rate * error), image)


def _push(joint: Joint, waiting: dict[Index, Form], index: Index, form: Form) -> None:
    known = waiting.get(index)
    waiting[index] = form if known is None else add(known, form, joint.ops[index].shape)


def _pull(
    relaxed: Relaxed, index: Index, form: Form, image: Tensor
) -> tuple[tuple[Form, ...], Tensor]:
    """One operation backwards: a functional for each input, and the constant part (N)."""
    op = relaxed.joint.ops[index]
    nothing = torch.zeros(len(image), dtype=torch.float64, device=image.device)
    if isinstance(op, ops.Linear):
        offset = op.offset
        return op.pull(form), nothing if offset is None else form.dot(offset, image)
    if isinstance(op, ops.Extreme):
        side = 1.0 if op.largest else -1.0
        form = clean(form, op.shape)
        switch, constant = _bend(relaxed, index, form.with_coef(side * form.coef), image)
        bent = form.with_coef(side * switch.coef)
        rest = form.with_coef(form.coef - bent.coef)
        return ((bent, rest) if op.largest else (rest, bent)), constant
    bent, constant = _bend(relaxed, index, form, image)
    return (bent,), constant


def _bend(relaxed: Relaxed, index: Index, form: Form, image: Tensor) -> tuple[Form, Tensor]:
    """A functional of a switch function's value as one of the switch, and the constant part."""
    if relaxed.trace is not None:
        relaxed.trace[index] = form.coef.detach()
    which = image if relaxed.each is None else relaxed.each
    bent, constant = relaxed.lines[index].pull(form, which)
    push = relaxed.pushes.get(index)
    return (bent if push is None else bent.with_coef(bent.coef + push)), constant


def highest(relaxed: Relaxed, image: Tensor, seeds: Callable[[slice], Sequence[Seed]]) -> Tensor:
    """Upper bounds of many functionals, in chunks that fit in memory: N.

    `seeds(part)` makes the functionals of the rows in `part`.
    """
    widest = max(prod(op.shape) for op in relaxed.joint.ops)
    step = max(16, CHUNK_BYTES // (8 * widest))
    bounds = []
    for start in range(0, len(image), step):
        part = slice(start, start + step)
        bounds.append(backward(relaxed, seeds(part), image[part]).highest(relaxed.ball))
    return torch.cat(bounds) if bounds else torch.zeros(0, dtype=torch.float64, device=image.device)


def written_out(plane: Plane, shape: tuple[int, ...]) -> Tensor:
    """The plane's coefficients as N×C×H×W."""
    return dense(plane.form, shape).coef
