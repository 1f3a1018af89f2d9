"""A bounded ReLU net of one region as a (mixed-integer) linear program for HiGHS.

Variables are the inputs, the outputs y of neurons whose sign is open, and one binary d for each of these; every other tensor is an
affine form of the first two and is substituted. The forms come from the same backward walk as CROWN's, so whatever bound
propagation knows (convolutions, joins, batch-norm, pooling by averages) can be encoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from surefoot.nn.bounds.graph import Bounds
from surefoot.nn.bounds.linear import chunks, pull_back
from surefoot.nn.bounds.operators import Rectifier
from surefoot.nn.highs import silent_highs

FEASIBILITY = 1e-9  # of HiGHS, for rows and for integrality; a margin must exceed 1e-6 to count


@dataclass(frozen=True, eq=False)
class Outcome:
    """`optimal` and `found` carry a point `[1, ...]`; `bound` is the proven minimum, -inf where nothing is proven."""

    state: Literal["optimal", "found", "infeasible", "stopped"]
    point: Tensor | None
    bound: float
    reason: str = ""
    nodes: int = 0


class Encoding:
    """All constraints that do not depend on the question: the net, its phases (pulled `inset` inside), the input box."""

    def __init__(self, walked: Bounds, phases: dict[str, Tensor], inset: float) -> None:
        self.walked = walked
        box = walked.input
        self.shape, self.inputs = box.shape, box.shape[1:].numel()
        self.gates: dict[int, Tensor] = {}
        self.unstable: dict[int, np.ndarray] = {}  # rectifier step -> indices of its open neurons
        self.first: dict[int, int] = {}  # rectifier step -> column of its first open neuron
        lower, upper = [_flat(box.lower)], [_flat(box.upper)]
        column = self.inputs
        rectifiers = [(i, s, s.op) for i, s in enumerate(walked.steps) if isinstance(s.op, Rectifier)]
        for index, step, op in rectifiers:
            before = walked.steps[step.parents[0]].box
            low, high = before.lower, before.upper
            is_open = (low < 0) & (high > 0)
            self.gates[index] = torch.where(low >= 0, torch.ones_like(low), op.slope).masked_fill(is_open, 0.0)
            chosen = _flat(is_open).nonzero()[0]
            self.unstable[index], self.first[index] = chosen, column
            lower.append(op.slope * _flat(low)[chosen])
            upper.append(_flat(high)[chosen])
            column += len(chosen)
        self.continuous, self.binaries = column, column - self.inputs
        self.lower = np.concatenate([*lower, np.zeros(self.binaries)])
        self.upper = np.concatenate([*upper, np.ones(self.binaries)])
        self.blocks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # (matrix, row lower, row upper)
        for index, step, op in rectifiers:
            self._relu(index, step.parents[0], op)
            if step.name in phases:
                self._phases(step.parents[0], phases[step.name], inset)
        self.rows = _stack(self.blocks, len(self.lower))

    def forms(self, start: int, a: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Rows `[1, R, ...]` of step `start` as (matrix [R, columns], constant [R]) over inputs, outputs and binaries."""
        matrix = np.zeros((a.shape[1], self.continuous + self.binaries))
        met, constant = pull_back(self.walked.steps, start, a, self.gates)
        for index, coefficients in met.items():
            flat = coefficients[0].flatten(1).cpu().numpy()
            if index == 0:
                matrix[:, : self.inputs] = flat
            else:
                chosen, first = self.unstable[index], self.first[index]
                matrix[:, first : first + len(chosen)] = flat[:, chosen]
        return matrix, constant[0].cpu().numpy()

    def _neurons(self, index: int, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The forms of chosen entries of one step's output."""
        box = self.walked.steps[index].box
        pieces = [np.zeros((0, self.continuous + self.binaries))], [np.zeros(0)]
        for part in chunks(len(chosen), self.walked.steps, 256.0):
            rows = torch.zeros(len(chosen[part]), box.shape[1:].numel(), dtype=torch.float64, device=box.lower.device)
            rows[np.arange(len(rows)), chosen[part]] = 1.0
            for piece, value in zip(pieces, self.forms(index, rows.reshape(1, len(rows), *box.shape[1:])), strict=True):
                piece.append(value)
        return np.concatenate(pieces[0]), np.concatenate(pieces[1])

    def _relu(self, index: int, parent: int, op: Rectifier) -> None:
        """y >= z; y >= s z; y <= z - (1 - s) l (1 - d); y <= s z + (1 - s) u d, with z = Z v + k."""
        chosen, s = self.unstable[index], op.slope
        if not len(chosen):
            return
        z, k = self._neurons(parent, chosen)
        box = self.walked.steps[parent].box
        low, high = (1 - s) * _flat(box.lower)[chosen], (1 - s) * _flat(box.upper)[chosen]
        here = np.arange(len(chosen))
        y, d = np.zeros_like(z), np.zeros_like(z)
        y[here, self.first[index] + here] = 1.0
        d[here, self.first[index] + self.binaries + here] = 1.0
        infinite = np.full(len(chosen), np.inf)
        self.blocks.append((y - z, k, infinite))
        if s > 0:
            self.blocks.append((y - s * z, s * k, infinite))
        self.blocks.append((y - z - low[:, None] * d, -infinite, k - low))
        self.blocks.append((y - s * z - high[:, None] * d, -infinite, s * k))

    def _phases(self, parent: int, sign: Tensor, inset: float) -> None:
        flat = _flat(sign)
        for wanted in (1.0, -1.0):
            chosen = (flat == wanted).nonzero()[0]
            z, k = self._neurons(parent, chosen)
            self.blocks.append((wanted * z, inset - wanted * k, np.full(len(chosen), np.inf)))

    def program(self, row: Tensor | None, below: float) -> LinearProgram:
        """Minimise `row` `[K]` of the logits where it is at most `below`; without a row, any feasible point."""
        cost, offset, rows = np.zeros(len(self.lower)), 0.0, self.rows
        if row is not None:
            form, constant = self.forms(self.walked.end, row.reshape(1, 1, -1))
            cost, offset = form[0], float(constant[0])
            if np.isfinite(below):
                limit = (form, np.array([-np.inf]), np.array([below - offset]))
                rows = _stack([rows, limit], len(cost))
        return LinearProgram(self, cost, offset, rows)


def _stack(blocks: list[Any], columns: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """(sparse matrix, row lower, row upper) of all blocks."""
    from scipy import sparse

    matrices, lower, upper = zip((np.zeros((0, columns)), np.zeros(0), np.zeros(0)), *blocks, strict=True)
    matrix = sparse.vstack([sparse.csr_matrix(m) for m in matrices], format="csr")
    return matrix, np.concatenate(lower), np.concatenate(upper)


def _flat(values: Tensor) -> np.ndarray:
    return values[0].detach().flatten().cpu().numpy()


class LinearProgram:
    """One call of HiGHS. `integer=False` relaxes the binaries; an integer solve stops at its first feasible point."""

    def __init__(self, encoding: Encoding, cost: np.ndarray, offset: float, rows: Any) -> None:
        self.encoding, self.cost, self.offset, self.rows = encoding, cost, offset, rows

    def solve(self, *, integer: bool, time_limit: float, max_nodes: int | None = None) -> Outcome:
        import highspy

        integer = integer and self.encoding.binaries > 0
        solver = silent_highs()()
        options: dict[str, Any] = {"output_flag": False, "parallel": "off", "random_seed": 0, "time_limit": time_limit}
        options |= {"primal_feasibility_tolerance": FEASIBILITY, "mip_feasibility_tolerance": FEASIBILITY}
        if integer:
            options["mip_max_improving_sols"] = 1
            if max_nodes is not None:
                options["mip_max_nodes"] = max_nodes
        for name, value in options.items():
            solver.setOptionValue(name, value)
        solver.passModel(self._model(highspy, integer))
        solver.run()
        return self._read(highspy, solver, integer)

    def _model(self, highspy: Any, integer: bool) -> Any:
        matrix, lower, upper = self.rows
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = len(self.cost), len(lower)
        model.col_cost_, model.offset_ = self.cost, self.offset
        model.col_lower_, model.col_upper_ = self.encoding.lower, self.encoding.upper
        model.row_lower_, model.row_upper_ = lower, upper
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_, model.a_matrix_.index_ = matrix.indptr, matrix.indices
        model.a_matrix_.value_ = matrix.data
        if integer:
            kinds = [highspy.HighsVarType.kContinuous] * self.encoding.continuous
            model.integrality_ = kinds + [highspy.HighsVarType.kInteger] * self.encoding.binaries
        return model

    def _read(self, highspy: Any, solver: Any, integer: bool) -> Outcome:
        status, kinds = solver.getModelStatus(), highspy.HighsModelStatus
        info = solver.getInfo()
        nodes = max(0, int(info.mip_node_count)) if integer else 0
        if status in (kinds.kInfeasible, kinds.kUnboundedOrInfeasible):  # every variable is bounded: it is infeasible
            return Outcome("infeasible", None, float("inf"), nodes=nodes)
        point = None
        if info.primal_solution_status == highspy.kSolutionStatusFeasible:
            point = self._point(np.asarray(solver.getSolution().col_value))
        if status == kinds.kOptimal:
            bound = float(info.mip_dual_bound if integer else info.objective_function_value)
            return Outcome("optimal", point, bound, nodes=nodes)
        if point is not None:
            return Outcome("found", point, float("-inf"), nodes=nodes)
        words = {kinds.kTimeLimit: "the time limit was reached", kinds.kSolutionLimit: "the node limit was reached"}
        return Outcome("stopped", None, float("-inf"), words.get(status, f"HiGHS stopped with {status.name}"), nodes)

    def _point(self, values: np.ndarray) -> Tensor:
        box = self.encoding.walked.input
        x = torch.from_numpy(values[: self.encoding.inputs].copy()).to(box.lower).reshape(self.encoding.shape)
        return torch.clamp(x, box.lower, box.upper)  # the solver may leave a bound by its tolerance
