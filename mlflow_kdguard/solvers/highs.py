"""HiGHS (MIT licence), the default solver."""

from typing import Any

import numpy as np

from mlflow_kdguard.solvers.adapter import NOTHING, Adapter, Answer, Limits, Status
from mlflow_kdguard.solvers.model import Floats, Model


def solve(model: Model, limits: Limits, start: Floats = NOTHING) -> Answer:
    """Solve with one call; multipliers for linear programs only. `start`: an earlier basis."""
    import highspy

    solver = highspy.Highs()
    for option, value in (
        ("output_flag", False),
        ("threads", limits.threads),
        ("time_limit", limits.seconds),
        ("mip_rel_gap", limits.gap),
        ("mip_heuristic_run_feasibility_jump", False),
        ("mip_heuristic_run_rins", False),
        ("mip_heuristic_run_rens", False),
    ):
        solver.setOptionValue(option, value)
    solver.passModel(_program(model))
    if model.shape[1] < len(start) <= sum(model.shape):
        solver.setBasis(_basis(model, start))
    solver.run()
    kinds: dict[object, Status] = {
        highspy.HighsModelStatus.kOptimal: "optimal",
        highspy.HighsModelStatus.kInfeasible: "infeasible",
        highspy.HighsModelStatus.kTimeLimit: "limit",
    }
    said = solver.getModelStatus()
    status, info, found = kinds.get(said, "fault"), solver.getInfo(), solver.getSolution()
    integers = bool(model.integer.any())
    y = NOTHING
    if status == "infeasible" and not integers:
        _, has, ray = solver.getDualRay()
        y = np.asarray(ray, dtype=float) if has else NOTHING
    elif found.dual_valid and not integers:
        y = np.asarray(found.row_dual, dtype=float)
    x = np.asarray(found.col_value, dtype=float) if found.value_valid else NOTHING
    bound = info.mip_dual_bound if integers else info.objective_function_value
    message = solver.modelStatusToString(said)
    basis = solver.getBasis()
    statuses = [int(each) for each in (*basis.col_status, *basis.row_status)]
    left = np.array(statuses, dtype=float) if basis.valid and not integers else NOTHING
    return Answer(status, x, y, info.objective_function_value, bound, message, left)


def _basis(model: Model, start: Floats) -> Any:
    """An earlier basis; rows that are new are basic."""
    import highspy

    kinds = {int(each): each for each in highspy.HighsBasisStatus.__members__.values()}
    statuses = [kinds[int(each)] for each in start]
    fresh = [highspy.HighsBasisStatus.kBasic] * (sum(model.shape) - len(start))
    basis = highspy.HighsBasis()
    basis.col_status = statuses[: model.shape[1]]
    basis.row_status = statuses[model.shape[1] :] + fresh
    basis.valid = True
    return basis


def _program(model: Model) -> Any:
    import highspy

    lp = highspy.HighsLp()
    lp.num_row_, lp.num_col_ = model.shape
    lp.sense_ = highspy.ObjSense.kMaximize
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = model.cost, model.lo, model.hi
    lp.row_lower_, lp.row_upper_ = model.row_lo, model.row_hi
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.num_row_, lp.a_matrix_.num_col_ = model.shape
    lp.a_matrix_.start_ = model.matrix.indptr
    lp.a_matrix_.index_ = model.matrix.indices
    lp.a_matrix_.value_ = model.matrix.data
    if model.integer.any():
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        lp.integrality_ = [kinds[int(flag)] for flag in model.integer]
    return lp


ADAPTER = Adapter("highs", "highspy", "Install it: pip install 'highspy>=1.15.1'.", solve)
