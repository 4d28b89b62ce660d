"""A batch of images: a bound from above, a witness from below, and what float32 adds."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mlflow_kdguard import graph
from mlflow_kdguard.certify.ball import Ball
from mlflow_kdguard.certify.budget import Aim, Limit, Limits
from mlflow_kdguard.certify.joint import Joint
from mlflow_kdguard.certify.keep import Kept
from mlflow_kdguard.certify.proofs import Folder
from mlflow_kdguard.certify.relax import ANYTIME, PROVABLE, Bound, Bounds
from mlflow_kdguard.certify.report import SKIPPED, Judged, Question
from mlflow_kdguard.certify.witness import Effort, attained, search, softmax
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.errors import SoundnessError
from mlflow_kdguard.graph import float32

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """The two networks as the bounds and as the witness search see them, and where proofs go."""

    reference: graph.Graph
    student: graph.Graph
    joint: Joint
    quick: Joint
    folder: Folder | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """One batch: which images, balls around them, the class that is asked for (None: all)."""

    indices: tuple[int, ...]
    pixels: NDArray[np.float32]
    ball: Ball
    top: torch.Tensor | None
    limits: Limits


@dataclass(frozen=True, slots=True, eq=False)
class Judge:
    """Bounds images of `data` with `bound`."""

    pair: Pair
    data: Dataset
    question: Question
    bound: Bound

    def batch(self, indices: tuple[int, ...], limits: Limits) -> list[Judged]:
        """Both bounds of some images; where it is too late to begin, they stay undecided.

        Raises SoundnessError where a witness beats the bound.
        """
        began, nothing = time.perf_counter(), np.zeros(len(indices))
        x, labels = self.data.batch(indices)
        confidences = softmax(graph.evaluate(self.pair.reference, x.astype(np.float64)))
        asked = self._asked(indices, x, confidences.argmax(1), limits)
        # No limit ends this; so it comes before what they end.
        margin = self._float32_margin(asked) if limits.late() is None else nothing
        late, lower, upper, nodes = limits.late(), nothing, nothing + 1.0, 0
        stopped: tuple[Limit | None, ...] = (late,) * len(indices)
        if late is None:
            lower, upper, found = self._bounds(asked)
            nodes, stopped = found.nodes, found.stopped or stopped
        seconds = (time.perf_counter() - began) / len(indices)
        method = self.question.method if late is None else SKIPPED
        return [
            Judged(int(i), int(label), p, float(lo), float(hi), float(off), method, nodes, seconds,
                   limit)
            for i, label, p, lo, hi, off, limit in zip(
                indices, labels, confidences, lower, upper, margin, stopped, strict=True
            )
        ]  # fmt: skip

    def _asked(
        self, indices: tuple[int, ...], x: NDArray[np.float32], top: Indices, limits: Limits
    ) -> _Asked:
        config, place = self.question.config, torch.device(self.question.device)
        ball = Ball.around(torch.from_numpy(x).to(place), eps=config.eps, norm=config.norm)
        one = torch.from_numpy(top).to(place) if config.classes == "top" else None
        return _Asked(indices, x, ball, one, limits)

    def _bounds(self, asked: _Asked) -> tuple[Floats, Floats, Bounds]:
        """Witnesses and bounds (float64 B each), and what the bounds came from."""
        folder = self.pair.folder
        kept = None if folder is None else Kept()
        found = self._upper(asked, kept)
        lower, upper = self._witness(asked, found), found.upper.cpu().numpy()
        if folder is not None and kept is not None and not asked.limits.interrupted():
            upper = folder.write(kept, asked.indices, asked.pixels)
        _check_sound(asked.indices, lower, upper, self.question.method)
        return lower, upper, found

    def _upper(self, asked: _Asked, kept: Kept | None) -> Bounds:
        """The bounds; `kept` receives what a proof of them needs."""
        of = self.pair.joint, asked.ball, asked.top, self.question.config.nodes
        method = self.question.method
        if method in ANYTIME:
            aim = Aim(self.question.config.relative_gap, self.question.config.absolute_gap)
            return ANYTIME[method](*of, kept=kept, limits=asked.limits, aim=aim)
        return self.bound(*of) if kept is None else PROVABLE[method](*of, kept=kept)

    def _witness(self, asked: _Asked, found: Bounds) -> Floats:
        """The largest gaps found: float64 B, each attained at a point of its ball.

        After Ctrl-C only those that are known already.
        """
        pair, question, ball = self.pair, self.question, asked.ball
        if asked.limits.interrupted():
            points = ball.centre if found.worst is None else ball.nearest(found.worst)
        else:
            points = search(
                pair.quick, ball, asked.top,
                effort=Effort(question.config.pgd_steps, question.config.restarts),
                generator=torch.Generator().manual_seed(question.seed(asked.indices[0])),
                hints=found.worst,
            )  # fmt: skip
        return attained(pair.reference, pair.student, ball, points, asked.top)

    def _float32_margin(self, asked: _Asked) -> Floats:
        """What onnxruntime's rounding may add to the gap, anywhere in each ball: float64 B."""
        ends = asked.ball.lo.cpu().numpy(), asked.ball.hi.cpu().numpy()
        margins = float32.gap_margin(self.pair.reference, self.pair.student, *ends)
        if asked.top is None:
            largest: Floats = margins.max(1)
            return largest
        chosen: Floats = margins[np.arange(len(margins)), asked.top.cpu().numpy()]
        return chosen


def _check_sound(
    part: tuple[int, ...], lower: NDArray[np.float64], upper: NDArray[np.float64], method: str
) -> None:
    if not bool((upper >= lower).all()):
        worst = int((lower - upper).argmax())
        raise SoundnessError(
            f"image {part[worst]}: a point of the ball has a gap of {lower[worst]:.17g}, above the "
            f"bound {upper[worst]:.17g} of {method!r}.",
            remedy="This is a bug in the bound; please report it with both models.",
        )
