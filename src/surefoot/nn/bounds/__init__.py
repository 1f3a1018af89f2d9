"""Bound propagation: sound bounds of a network's outputs over a box or ball of inputs (IBP, CROWN, alpha-CROWN), and proofs.

    interval_bounds(model, lower, upper)                 logits between lower and upper, by intervals
    linear_bounds(model, x, eps, rows=..., method=...)   linear forms of the logits
    margin_bounds(model, x, y, eps, method=...)          lower bounds of f_y - f_j
    verified(model, x, y, eps, method=...)               proofs, in float64
    decide_margins(model, lower, upper, label)           proof or counterexample for a small net (LP, then MILP)

In a training loop: `program = Program(model)` once, then `propagate(program, box, clean=x)` and `interval_margins`.
`operators.py` holds one class an operator, `rules.py` the table of torch operations, `graph.py` the walk forward, `linear.py`
the walk backward, `statements.py` the functions above, `complete.py`, `encoding.py` and `phases.py` complete verification,
`kernels.py` what training needs to be fast.
"""

from surefoot.nn.bounds.complete import Decision, Limits, Status, decide, decide_margins
from surefoot.nn.bounds.graph import Bounds, Program, Step, propagate, supported
from surefoot.nn.bounds.linear import Region, crown_refiner, lower_bound, pull_back
from surefoot.nn.bounds.operators import Box, Convolution, Dense, Rectifier, Scale
from surefoot.nn.bounds.phases import Phases, phase_bounds, preactivations, rectifier_shapes
from surefoot.nn.bounds.statements import (
    METHODS,
    TOLERANCE,
    Method,
    Norm,
    evaluating,
    interval_bounds,
    interval_margins,
    linear_bounds,
    margin_bounds,
    margin_rows,
    region_around,
    robust_cross_entropy,
    specification_bound,
    verified,
)  # fmt: skip

__all__ = [
    "METHODS", "TOLERANCE", "Bounds", "Box", "Convolution", "Decision", "Dense", "Limits", "Method", "Norm", "Phases", "Program",
    "Rectifier", "Region", "Scale", "Status", "Step", "crown_refiner", "decide", "decide_margins", "evaluating", "interval_bounds",
    "interval_margins", "linear_bounds", "lower_bound", "margin_bounds", "margin_rows", "phase_bounds", "preactivations",
    "propagate", "pull_back", "rectifier_shapes", "region_around", "robust_cross_entropy", "specification_bound", "supported",
    "verified",
]  # fmt: skip
