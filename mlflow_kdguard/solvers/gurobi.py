"""Gurobi (commercial). The licence that comes with the package takes 2,000 rows and variables."""

from typing import Any

import numpy as np

from mlflow_kdguard.solvers.adapter import NOTHING, Adapter, Answer, Limits, Status
from mlflow_kdguard.solvers.model import Floats, Model

_SIZE = 10010
"""Gurobi's number for a program that the licence does not take."""


def solve(model: Model, limits: Limits, start: Floats = NOTHING) -> Answer:
    """Solve with one call; ranges of rows are two rows each."""
    import gurobipy as gp

    try:
        with gp.Env(params={"OutputFlag": 0, "Threads": limits.threads}) as env:
            return _solved(model, limits, env)
    except gp.GurobiError as error:
        what = "the licence does not take a program of " if error.errno == _SIZE else ""
        size = f"{model.shape[0]} rows and {model.shape[1]} variables: " if what else ""
        return Answer("fault", message=f"{what}{size}{error}")


def _solved(model: Model, limits: Limits, env: Any) -> Answer:
    import gurobipy as gp

    low, high = np.isfinite(model.row_lo), np.isfinite(model.row_hi)
    matrix: Any = model.matrix
    with gp.Model(env=env) as program:
        program.Params.TimeLimit, program.Params.MIPGap = limits.seconds, limits.gap
        program.Params.InfUnbdInfo = 1
        kinds = np.where(model.integer, "I", "C")
        v = program.addMVar(model.shape[1], model.lo, model.hi, vtype=kinds)
        above = program.addMConstr(matrix[high], v, "<", model.row_hi[high])
        below = program.addMConstr(matrix[low], v, ">", model.row_lo[low])
        program.setObjective(model.cost @ v, gp.GRB.MAXIMIZE)
        program.optimize()
        known: dict[int, Status] = {2: "optimal", 3: "infeasible", 9: "limit"}
        status = known.get(program.Status, "fault")
        integers = bool(model.integer.any())
        y: Floats = NOTHING
        if status in {"optimal", "infeasible"} and not integers:
            name = "Pi" if status == "optimal" else "FarkasDual"
            y = np.zeros(model.shape[0])
            y[high] += getattr(above, name)
            y[low] += getattr(below, name)
        x = np.asarray(v.X) if program.SolCount else NOTHING
        objective = program.ObjVal if program.SolCount else float("nan")
        bound = program.ObjBound if integers else objective
        return Answer(status, x, y, objective, bound, f"status {program.Status}")


ADAPTER = Adapter(
    "gurobi", "gurobipy", "Install it: pip install gurobipy; a licence of your own takes more than "
    "2,000 rows and variables.", solve, largest=2_000,
)  # fmt: skip
