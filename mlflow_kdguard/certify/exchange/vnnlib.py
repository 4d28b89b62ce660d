"""The question "is p_S,k - p_R,k >= delta anywhere in this box?" as VNN-LIB 1.0 and 2.0.

As in VNN-COMP, a query describes the counterexample: `unsat` proves the property, `sat` refutes
it. Every number is the exact decimal expansion of a float64, never shortened, so that a reader with
exact arithmetic, and one that rounds to float64, both see the very box that was given.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Sign = Literal["plus", "minus"]
SIGNS: tuple[Sign, ...] = ("plus", "minus")
"""plus: the student is more confident than the reference; minus: less."""


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """Is there an image in [lo, hi] with a difference of `delta` or more for one of `asked`?

    `lo`, `hi`: float64 C×H×W in [0, 1]. `asked`: (class, sign) pairs. `about`: comment lines.
    """

    lo: NDArray[np.float64]
    hi: NDArray[np.float64]
    classes: int
    delta: float
    asked: tuple[tuple[int, Sign], ...]
    about: tuple[str, ...] = ()


def decimal(value: float) -> str:
    """The exact value of a float64, without an exponent and with a decimal point."""
    text = format(Decimal(float(value)), "f") if value else "0"
    return text if "." in text else f"{text}.0"


def version1(query: Query) -> str:
    """For the product network: inputs X_i are the pixels row by row, outputs Y_k = p_S,k - p_R,k.

    One `declare-const` or `assert` a line, comparisons of one variable with one number, at most one
    disjunction (of conjunctions): what the readers of VNN-COMP accept.
    """
    lo, hi = query.lo.reshape(-1), query.hi.reshape(-1)
    lines = _comments(query, "VNN-LIB 1.0, for product.onnx or product-margins.onnx")
    lines += [f"(declare-const X_{i} Real)" for i in range(lo.size)]
    lines += [f"(declare-const Y_{k} Real)" for k in range(query.classes)]
    for i in range(lo.size):
        lines += [f"(assert (>= X_{i} {decimal(lo[i])}))", f"(assert (<= X_{i} {decimal(hi[i])}))"]
    asked = [_beyond(f"Y_{k}", sign, query.delta) for k, sign in query.asked]
    whole = "".join(f"(and {each})" for each in asked)
    lines.append(f"(assert {asked[0]})" if len(asked) == 1 else f"(assert (or {whole}))")
    return "\n".join(lines) + "\n"


def version2(query: Query) -> str:
    """For two networks, `reference` and `student`, whose outputs are confidences.

    Their inputs are declared equal pixel by pixel, and both are given the box.
    """
    shape = ",".join(map(str, (1, *query.lo.shape)))
    lines = _comments(query, "VNN-LIB 2.0, for reference.onnx and student.onnx")
    lines.append("(vnnlib-version <2.0>)")
    for name in ("reference", "student"):
        lines += [
            f"(declare-network {name}",
            f"  (declare-input {name}_x Real [{shape}])",
            f"  (declare-output {name}_p Real [1,{query.classes}]))",
        ]
    lines += _shared_box(query)
    asked = [
        _beyond(f"(- student_p[0,{k}] reference_p[0,{k}])", sign, query.delta)
        for k, sign in query.asked
    ]
    whole = asked[0] if len(asked) == 1 else f"(or {' '.join(asked)})"
    lines.append(f"(assert {whole})")
    return "\n".join(lines) + "\n"


def _shared_box(query: Query) -> Iterator[str]:
    for place in product(*map(range, query.lo.shape)):
        at = "[0," + ",".join(map(str, place)) + "]"
        yield f"(assert (== reference_x{at} student_x{at}))"
        for name in ("reference_x", "student_x"):
            yield f"(assert (>= {name}{at} {decimal(query.lo[place])}))"
            yield f"(assert (<= {name}{at} {decimal(query.hi[place])}))"


def _beyond(variable: str, sign: Sign, delta: float) -> str:
    if sign == "plus":
        return f"(>= {variable} {decimal(delta)})"
    return f"(<= {variable} {decimal(-delta)})"


def _comments(query: Query, what: str) -> list[str]:
    return [f"; {line}" for line in (what, *query.about)]
