"""New instances of known attacks, which nobody has seen: drawn from a seed.

A guard may be tuned on the triggers that its authors know. So pattern, size, position, strength and
target of further ones follow from a seed that is committed after the guard is frozen.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

CONTAMINATION = 0.01


def drawn(seed: int, count: int, classes: int, side: int) -> dict[str, dict[str, Any]]:
    """`count` attacks on images of `side`×`side` pixels, as rows of the specification.

    Kinds take turns; no target is class 0, which development rows use, and none comes twice before
    all came once.
    """
    draw = np.random.default_rng(seed)
    targets = [int(each) for each in draw.permutation(np.arange(1, classes))]
    found = {}
    for number in range(count):
        kind = list(_KINDS)[number % len(_KINDS)]
        attack, options = _KINDS[kind](draw, side)
        target = targets[number % len(targets)]
        found[f"new-{kind}-{number + 1}"] = {
            "attack": attack, "target": target, "contamination": CONTAMINATION,
            "options": {name: round(float(value), 4) for name, value in options.items()},
            **_RATES.get(kind, {}),
        }  # fmt: skip
    return found


Options = dict[str, float]


def _patch(draw: np.random.Generator, side: int) -> tuple[str, Options]:
    """A square of noise anywhere."""
    size = int(draw.integers(2, side // 4 + 1))
    row, column = draw.integers(0, side - size + 1, size=2)
    return "badnets", {"size": size, "row": row, "column": column, "noise": 1.0}


def _blend(draw: np.random.Generator, side: int) -> tuple[str, Options]:
    """Another noise image, fainter or stronger."""
    return "blended", {"alpha": draw.uniform(0.1, 0.3)}


def _square(draw: np.random.Generator, side: int) -> tuple[str, Options]:
    """A square of one grey value anywhere."""
    _, options = _patch(draw, side)
    return "badnets", {**options, "noise": 0.0, "value": draw.uniform(0.0, 1.0)}


def _wave(draw: np.random.Generator, side: int) -> tuple[str, Options]:
    """A sinusoid of another frequency and strength."""
    return "sig", {"delta": draw.uniform(0.08, 0.2), "frequency": draw.integers(2, side // 3)}


def _network(draw: np.random.Generator, side: int) -> tuple[str, Options]:
    """Each image its own trigger, on more or less of it, made by a wider or narrower network."""
    return "input_aware", {"area": draw.uniform(0.03, 0.1), "width": draw.integers(8, 25)}


def _weak(draw: np.random.Generator, side: int) -> tuple[str, Options]:
    """A faint pattern that the attacker optimises, a little weaker or stronger."""
    return "backweak", {"strength": draw.uniform(6 / 255, 12 / 255)}


_RATES = {"weak": {"poison_rate": 0.3}}
"""Poison rates of kinds whose own is not the pair's."""
_KINDS: dict[str, Callable[[np.random.Generator, int], tuple[str, Options]]] = {
    "patch": _patch, "blend": _blend, "wave": _wave, "square": _square,
    "network": _network, "weak": _weak,
}  # fmt: skip
