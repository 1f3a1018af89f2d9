"""HiGHS by its own Python interface: silent, and 0-1 programmes solved to a gap of zero."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np


@cache
def silent_highs() -> Any:
    """The HiGHS class without its banner, which `highspy.Highs()` prints when it turns callbacks on, before any option can be set."""
    import highspy

    class Silent(highspy.Highs):
        def enableCallbacks(self) -> None:
            self.setOptionValue("output_flag", False)
            super().enableCallbacks()

    return Silent


def binary_programme(
    cost: np.ndarray,  # float64 [n]
    matrix: Any,  # scipy CSR [m, n]
    low: np.ndarray,  # float64 [m]
    high: np.ndarray,  # float64 [m]
) -> np.ndarray | None:  # bool [n]
    """The x in {0, 1}^n of least cost with low <= matrix x <= high, no gap left; None where there is none.

    Not by `scipy.optimize.milp`: the HiGHS inside of it writes to the standard output in the middle of some solves.
    """
    import highspy

    model, count = highspy.HighsLp(), len(cost)
    model.num_col_, model.num_row_ = count, len(low)
    model.col_cost_, model.col_lower_, model.col_upper_ = cost, np.zeros(count), np.ones(count)
    model.row_lower_, model.row_upper_ = low, high
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_, model.a_matrix_.index_ = matrix.indptr, matrix.indices
    model.a_matrix_.value_ = matrix.data
    model.integrality_ = [highspy.HighsVarType.kInteger] * count
    solver = silent_highs()()
    for name, value in {"output_flag": False, "parallel": "off", "random_seed": 0, "mip_rel_gap": 0.0, "mip_abs_gap": 0.0}.items():  # fmt: skip
        solver.setOptionValue(name, value)
    solver.passModel(model)
    solver.run()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    return np.asarray(solver.getSolution().col_value) > 0.5
