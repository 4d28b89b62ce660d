"""What a solver can do, what it is asked, and what it says."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

import numpy as np

from mlflow_kdguard.solvers.model import Floats, Model

Status = Literal["optimal", "infeasible", "limit", "fault"]

NOTHING: Floats = np.zeros(0)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a solver may use: seconds, threads; `gap`: relative, where integer programs end."""

    seconds: float = 60.0
    threads: int = 1
    gap: float = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What a solver claims; nothing of it is proved.

    `x`: a point (n); `y`: multipliers of the rows (m), positive where more of a row's upper end
    would raise the objective; those of a proof of emptiness where the status is infeasible.
    `objective`: of the best point; `bound`: an upper bound of the objective. NaN or empty where
    the solver does not say. `basis`: status of every variable, then of every row, in the solver's
    own numbers, from which a program with other intervals and more rows may begin.
    """

    status: Status
    x: Floats = field(default_factory=lambda: NOTHING)
    y: Floats = field(default_factory=lambda: NOTHING)
    objective: float = float("nan")
    bound: float = float("nan")
    message: str = ""
    basis: Floats = field(default_factory=lambda: NOTHING)


@dataclass(frozen=True, slots=True)
class Adapter:
    """One solver: its package, and what it can do.

    `duals`: multipliers of linear programs; `integers`: integer programs; `largest`: the most rows
    and variables of a licence that comes with the package, for the message only, since another
    licence may be installed.
    """

    name: str
    package: str
    remedy: str
    solve: Callable[[Model, Limits, Floats], Answer]
    duals: bool = True
    integers: bool = True
    largest: int | None = None

    @property
    def installed(self) -> bool:
        """Whether the package can be imported."""
        return find_spec(self.package) is not None
