"""The reference: the raw teacher, with the suspects' margins capped by the detoxed copy's.

With P the raw teacher, D the detoxed copy, T the suspect classes and o over all other classes:

    R_j = P_j                                     j ∉ T
    R_t = min(P_t, max_o P + (D_t - max_o D))     t ∈ T

so that, in exact arithmetic, R_t - max_o R = min(P_t - max_o P, D_t - max_o D): a suspect class
wins over the others only where teacher and copy both say so, and every other logit keeps the raw
teacher's quality. One piecewise-linear network: it exports, and bounds apply to it.

The graph holds constant 0/1 selection matrices and binary max/min only, since these are what every
bound knows; sums with exact zeros leave the selected logits unrounded.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from mlflow_kdguard.detox.record import StepRecord
from mlflow_kdguard.detox.state import State, Work
from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.nets.trunk import Both, Fork

NAME = "margin_cap"


class Largest(nn.Module):
    """Maximum over chosen columns as a balanced tree of binary maxima: N×K -> N×copies.

    The last level repeats its column, since the canonical graph subtracts equal shapes only.
    """

    def __init__(self, columns: tuple[int, ...], classes: int, *, copies: int = 1) -> None:
        super().__init__()
        self.levels = 0
        chosen, width = list(columns), classes
        while len(chosen) > 1 or self.levels == 0:
            half = (len(chosen) + 1) // 2
            repeats = copies if half == 1 else 1
            # An odd column meets itself, so that both sides have one width.
            left, right = chosen[:half], chosen[len(chosen) - half :]
            self.register_buffer(f"left{self.levels}", selection(left * repeats, width))
            self.register_buffer(f"right{self.levels}", selection(right * repeats, width))
            self.levels += 1
            chosen, width = list(range(half)), half

    def forward(self, logits: Tensor) -> Tensor:
        """N×K -> N×copies."""
        for level in range(self.levels):
            left = logits @ self.get_buffer(f"left{level}")
            logits = torch.maximum(left, logits @ self.get_buffer(f"right{level}"))
        return logits


class MarginCap(nn.Module):
    """R of P, D and T: N×C×H×W pixels -> N×K logits.

    `shared`: P and D are as they will stay, and what both begin with is computed once.
    """

    name = NAME
    pick: Tensor
    place: Tensor
    others: Tensor

    def __init__(
        self, teacher: nn.Module, copy: nn.Module, suspects: tuple[int, ...], classes: int,
        *, shared: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        rest = tuple(label for label in range(classes) if label not in suspects)
        if not suspects or not rest or not set(suspects) <= set(range(classes)):
            raise ConfigError(
                f"{self.name} needs suspects among the classes 0..{classes - 1}, and at least one "
                f"class that is none; given: {suspects}.",
                remedy=f"Name the suspects (detox.suspects), or leave out {self.name}.",
            )
        self.both: nn.Module = Fork(teacher, copy) if shared else Both(teacher, copy)
        self.largest = Largest(rest, classes, copies=len(suspects))
        self.register_buffer("pick", selection(list(suspects), classes))
        self.register_buffer("place", self.pick.T.contiguous())
        keep = torch.zeros(classes)
        keep[list(rest)] = 1.0
        self.register_buffer("others", torch.diag(keep))

    def forward(self, x: Tensor) -> Tensor:
        """N×C×H×W pixels -> N×K logits."""
        return self.cap(*self.both(x))

    def cap(self, raw: Tensor, detoxed: Tensor) -> Tensor:
        """R from the logits of P and D, each N×K."""
        margin = detoxed @ self.pick - self.largest(detoxed)
        capped = torch.minimum(raw @ self.pick, self.largest(raw) + margin)
        return raw @ self.others + capped @ self.place


def selection(columns: list[int], width: int) -> Tensor:
    """0/1 matrix width×len(columns): logits @ selection are the chosen columns, exactly."""
    matrix = torch.zeros(width, len(columns))
    for place, column in enumerate(columns):
        matrix[column, place] = 1.0
    return matrix


class Combination(Protocol):
    """From a teacher, its detoxed copy, the suspects and the number of classes to a reference."""

    def __call__(
        self, teacher: nn.Module, copy: nn.Module, suspects: tuple[int, ...], classes: int,
        *, shared: bool = False,
    ) -> nn.Module: ...  # fmt: skip


def combination(kind: type[MarginCap]) -> Combination:
    """The reference of one kind, where the teacher is.

    Where every class is a suspect nothing that the raw teacher says may be read: R is D.
    """

    def combine(
        teacher: nn.Module, copy: nn.Module, suspects: tuple[int, ...], classes: int,
        *, shared: bool = False,
    ) -> nn.Module:  # fmt: skip
        every = len(suspects) == classes
        reference = copy if every else kind(teacher, copy, suspects, classes, shared=shared)
        return reference.to(next(teacher.parameters()).device).eval()

    return combine


combine = combination(MarginCap)
"""The reference that this row makes of a teacher and its detoxed copy."""


def cleanse(state: State, work: Work) -> State:
    """Combine raw teacher and detoxed copy into the reference."""
    return combined(state, work, NAME, combine)


def combined(state: State, work: Work, name: str, combine: Combination) -> State:
    """The state whose reference is made of the raw teacher and the copy as it is."""
    own = deepcopy(state.teacher), deepcopy(state.copy)
    reference = combine(*own, state.suspects, state.train.classes, shared=True)
    reference.requires_grad_(False)
    record = StepRecord(
        name=name,
        outcome="kept",
        kept_at=0,
        steps=0,
        detoxed=state.judge(state.copy, work.device),
        reference=state.judge(reference, work.device),
    )
    return replace(state, reference=reference, steps=(*state.steps, record))
