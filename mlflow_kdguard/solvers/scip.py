"""SCIP (Apache licence), optional."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlflow_kdguard.solvers.adapter import NOTHING, Adapter, Answer, Limits, Status
from mlflow_kdguard.solvers.model import Floats, Model


def solve(model: Model, limits: Limits, start: Floats = NOTHING) -> Answer:
    """Solve with one call. Multipliers are those of the linear program, with presolve off."""
    import pyscipopt as scip

    program = scip.Model()
    program.hideOutput()
    program.setParams({"limits/time": limits.seconds, "limits/gap": limits.gap})
    program.setParam("lp/threads", limits.threads)
    integers = bool(model.integer.any())
    if not integers:
        program.setPresolve(scip.SCIP_PARAMSETTING.OFF)
        program.setHeuristics(scip.SCIP_PARAMSETTING.OFF)
        program.disablePropagation()
    v = [
        program.addVar(lb=lo, ub=hi, obj=cost, vtype="B" if flag else "C")
        for lo, hi, cost, flag in zip(model.lo, model.hi, model.cost, model.integer, strict=True)
    ]
    program.setMaximize()
    rows = [_row(program, model, v, i) for i in range(model.shape[0])]
    program.optimize()
    known: dict[str, Status] = {
        "optimal": "optimal", "gaplimit": "optimal", "infeasible": "infeasible",
        "timelimit": "limit",
    }  # fmt: skip
    status = known.get(program.getStatus(), "fault")
    y: Floats = NOTHING
    if status == "optimal" and not integers:
        # SCIP minimises the negative.
        y = -np.array([program.getDualsolLinear(row) for row in rows])
    elif status == "infeasible" and not integers:
        y = np.array([program.getDualfarkasLinear(row) for row in rows])
    best = program.getBestSol() if program.getNSols() else None
    x = np.array([program.getSolVal(best, each) for each in v]) if best is not None else NOTHING
    objective = program.getObjVal() if best is not None else float("nan")
    return Answer(status, x, y, objective, program.getDualbound(), program.getStatus())


def _row(program: Any, model: Model, v: Sequence[Any], i: int) -> Any:
    import pyscipopt as scip

    part = slice(model.matrix.indptr[i], model.matrix.indptr[i + 1])
    pairs = zip(model.matrix.indices[part], model.matrix.data[part], strict=True)
    terms = scip.quicksum(value * v[column] for column, value in pairs)
    low, high = model.row_lo[i], model.row_hi[i]
    if low == high:
        return program.addCons(terms == low)
    if np.isinf(low):
        return program.addCons(terms <= high)
    if np.isinf(high):
        return program.addCons(terms >= low)
    return program.addCons(scip.ExprCons(terms, lhs=low, rhs=high))


ADAPTER = Adapter("scip", "pyscipopt", "Install it: pip install 'mlflow-kdguard[scip]'.", solve)
