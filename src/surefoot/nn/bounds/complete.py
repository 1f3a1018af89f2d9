"""Complete verification of small ReLU nets: a proof, a counterexample, or an honest "unknown".

The question is whether every row of a specification, rows C f(x) + c_0 > 0, holds for all x of a box that follow given phases of
chosen neurons ("active": z > 0, "inactive": z <= 0). In this order, each only for the rows that the one before left open:

1. interval and linear bounds (CROWN), with l = max(l, 0) for active and u = min(u, 0) for inactive neurons
2. the LP relaxation, whose point is also tried as a counterexample, with a short gradient descent from it
3. the mixed-integer program, with a binary d for each neuron whose sign is still open, z = W x + b, y = max(z, s z):

    y >= z,   y >= s z,   y <= z - (1 - s) l (1 - d),   y <= s z + (1 - s) u d,   d in {0, 1}

   and C f + c_0 <= tol as one more row: the solver only looks for violations, so that "infeasible" is the proof and the first
   point it finds is a candidate. No margin is solved to its optimum.

The program uses the closed phases z >= 0 and z <= 0, an outer approximation, so that a proof covers the phases as stated. A
counterexample counts once the torch model itself confirms it in float64, phases included; at the edge of a phase the search is
repeated 1e-5 inside. A region that no input reaches is reported as empty, never as verified.

Source: Tjeng, Xiao & Tedrake 2019, arXiv 1711.07356 (the program); Salman et al. 2019, arXiv 1902.08722 (its relaxation).
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surefoot.errors import UnsupportedOp, check, check_at_least, check_positive
from surefoot.nn.bounds.encoding import Encoding, LinearProgram, Outcome
from surefoot.nn.bounds.graph import Bounds, Program
from surefoot.nn.bounds.linear import Region
from surefoot.nn.bounds.operators import Box, Rectifier
from surefoot.nn.bounds.phases import Phases, check_phases, phase_walk, plain_walk, preactivations
from surefoot.nn.bounds.statements import TOLERANCE, margin_rows, specification_bound

Status = Literal["verified", "falsified", "unknown", "empty_region"]

INSET = 1e-5  # how far inside the phases the second search for a counterexample stays
DESCENT_STEPS = 20


@dataclass(frozen=True, eq=False)
class Decision:
    """What complete verification found. `margins` are proven lower bounds, `[R]`; -inf where a row is open."""

    status: Status
    margins: Tensor
    by: Literal["bounds", "lp", "milp"]  # the strongest method that was needed
    counterexample: Tensor | None = None  # [1, ...]; replayed through the torch model
    row: int | None = None  # the row it violates
    binaries: int = 0
    nodes: int = 0  # of branch and bound
    seconds: float = 0.0
    reason: str = ""  # why it is unknown

    @property
    def verified(self) -> bool:
        return self.status == "verified"


@dataclass(frozen=True)
class Limits:
    """`max_nodes` is the limit that gives the same answer on every machine; `time_limit` is the one that always holds."""

    time_limit: float = 60.0  # seconds, over all rows
    max_nodes: int | None = None  # of branch and bound, per row
    max_binaries: int = 500  # 0: stop after the linear program
    tol: float = 1e-6  # a margin must exceed it to count as proven by a solver

    def __post_init__(self) -> None:
        check_positive("time_limit", self.time_limit)
        check_positive("tol", self.tol)
        check(self.max_binaries >= 0, f"max_binaries must not be negative, got {self.max_binaries!r}.")
        if self.max_nodes is not None:
            check_at_least("max_nodes", self.max_nodes, 1)


def decide_margins(
    model: nn.Module,
    lower: Tensor,  # [1, ...]
    upper: Tensor,  # [1, ...]
    label: int,
    *,
    competitors: tuple[int, ...] | None = None,
    phases: Phases | None = None,
    witness: Tensor | None = None,
    limits: Limits | None = None,
) -> Decision:
    """Does f_label exceed f_k for all `competitors` k (None: all others) wherever lower <= x <= upper and the phases hold?

    See `decide`. Ties are violations. Raises `InvalidInput`, `UnsupportedOp`.
    """
    with torch.no_grad():
        classes = copy.deepcopy(model).double().eval()(lower.double()).shape[1]
    rows = margin_rows(torch.tensor([label], device=lower.device), classes, torch.float64)[0]
    if competitors is not None:
        check(len(competitors) > 0, "competitors must name at least one class.")
        others = [k for k in range(classes) if k != label]
        known = all(k in others for k in competitors)
        check(known, f"competitors must be classes from 0 to {classes - 1} other than {label}, got {competitors}.")
        rows = rows[[others.index(k) for k in competitors]]
    return decide(model, lower, upper, rows, phases=phases, witness=witness, limits=limits)


@torch.no_grad()
def decide(
    model: nn.Module,
    lower: Tensor,  # [1, ...]
    upper: Tensor,  # [1, ...]
    rows: Tensor,  # [R, K]; R = 0 asks only whether the region is empty
    *,
    phases: Phases | None = None,
    witness: Tensor
    | None = None,  # [N, ...] inputs that may lie in the region, tried first to show that it is not empty
    limits: Limits | None = None,
) -> Decision:
    """Are all `rows` of the logits positive wherever lower <= x <= upper and the phases hold? In float64, on a copy.

    Works on every net of affine operators and ReLUs (leaky ones too) that bound propagation knows. Raises `UnsupportedOp` for
    other nonlinearities, `InvalidInput` for a bad region or phases of another net.
    """
    started = time.perf_counter()
    limits = limits or Limits()
    _check_region(lower, upper, rows)
    problem = _Problem(model, lower.double(), upper.double(), rows.double(), phases)
    decision = _decide(problem, witness, limits, started)
    return replace(decision, seconds=time.perf_counter() - started)


def _check_region(lower: Tensor, upper: Tensor, rows: Tensor) -> None:
    check(lower.shape == upper.shape, f"lower {tuple(lower.shape)} and upper {tuple(upper.shape)} must have one shape.")
    check(len(lower) == 1, f"lower and upper must hold one region [1, ...], got {len(lower)}.")
    finite = bool(torch.isfinite(lower).all() and torch.isfinite(upper).all())
    check(finite, "lower and upper must be finite; intersect the region with the input's domain.")
    check(bool((lower <= upper).all()), "lower exceeds upper somewhere: the region is empty as given.")
    check(rows.dim() == 2, f"rows must have the shape [R, K], got {tuple(rows.shape)}.")


class _Problem:
    """The model in float64, its bounded steps, and the questions that the ladder asks about a point."""

    def __init__(self, model: nn.Module, lower: Tensor, upper: Tensor, rows: Tensor, phases: Phases | None) -> None:
        self.model = copy.deepcopy(model).double().eval()
        self.program = Program(self.model)
        self.region, self.rows = Region(Box(lower, upper)), rows
        self.plain = plain = plain_walk(self.program, self.region)
        shape = plain.output.shape
        check(len(shape) == 2, f"The model must return logits [B, K], got the shape {tuple(shape)}.")
        check(rows.shape[1] == shape[1], f"rows must have the shape [R, {shape[1]}], got {tuple(rows.shape)}.")
        finite = bool(torch.isfinite(plain.output.lower).all() and torch.isfinite(plain.output.upper).all())
        check(finite, "The model's logits must be finite over the region, got NaN or infinity.")
        for step in plain.steps:
            if step.op is not None and not step.op.affine and not isinstance(step.op, Rectifier):
                raise UnsupportedOp(
                    f"Complete verification knows ReLUs only, and node '{step.name}' is another nonlinearity; use `verified`."
                )
        self.phases = check_phases(plain, phases or {})

    @property
    def constrained(self) -> bool:
        return any(bool(sign.any()) for sign in self.phases.values())

    def walk(self) -> Bounds | None:
        """Bounds of everything that follows the phases; None where they cross, which proves that nothing does."""
        return phase_walk(self.program, self.region, self.plain, self.phases) if self.constrained else self.plain

    def follows(self, points: Tensor) -> Tensor:
        """Which points `[N, ...]` lie in the region and follow the phases strictly, as the torch model computes them; `[N]`."""
        inside = ((points >= self.region.box.lower) & (points <= self.region.box.upper)).flatten(1).all(1)
        if not self.constrained:
            return inside
        _, inputs = preactivations(self.program, points)
        for name, sign in self.phases.items():
            z = inputs[name]
            inside &= ((sign <= 0) | (z > 0)).flatten(1).all(1) & ((sign >= 0) | (z <= 0)).flatten(1).all(1)
        return inside

    def values(self, points: Tensor) -> Tensor:
        """The rows `[N, R]` by the torch model's own forward."""
        return self.model(points) @ self.rows.mT

    def confirm(self, point: Tensor) -> int | None:
        """The row that a point of the region violates, if it does."""
        if not bool(self.follows(point)):
            return None
        value, row = self.values(point)[0].min(0)
        return int(row) if value <= 0 else None

    def descend(self, point: Tensor, row: int) -> Tensor | None:
        """Sign-gradient descent on one row from `point`; the first confirmed counterexample `[1, ...]` on the way, if any."""
        box = self.region.box
        for k in range(DESCENT_STEPS + 1):
            if self.confirm(point) is not None:
                return point
            with torch.enable_grad():
                leaf = point.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self.values(leaf)[0, row], leaf)
            pace = 0.5 * (1 - k / (DESCENT_STEPS + 1))
            point = torch.clamp(point - pace * box.radius * gradient.sign(), box.lower, box.upper)
        return None


def _decide(problem: _Problem, witness: Tensor | None, limits: Limits, started: float) -> Decision:
    walked = problem.walk()
    many = len(problem.rows)
    if walked is None:
        return Decision("empty_region", problem.rows.new_full((many,), float("inf")), "bounds")
    margins = problem.rows.new_full((many,), float("inf"))
    if many:
        margins = specification_bound(walked, problem.region, problem.rows.unsqueeze(0), method="crown")[0]
    scale = torch.maximum(walked.output.lower.abs(), walked.output.upper.abs()).max().item()
    open_rows = (~(margins > TOLERANCE * scale)).nonzero().flatten().tolist()
    search = _Search(problem, walked, limits, started)
    nonempty = not problem.constrained
    if not nonempty and witness is not None and len(witness):
        nonempty = bool(problem.follows(witness.to(problem.rows)).any())
    if not nonempty:
        status, reason = search.reachable()
        if status != "verified":
            return search.decision(status, margins, reason=reason)
    margins = margins.clone()
    for row in open_rows:
        margins[row] = float("-inf")
    for row in open_rows:
        found = search.row(row)
        if isinstance(found, Tensor):
            return search.decision("falsified", margins, counterexample=found, row=problem.confirm(found))
        margins[row] = found
    if bool(torch.isinf(margins).logical_and(margins < 0).any()):
        return search.decision("unknown", margins, reason=search.reason)
    return search.decision("verified", margins)


class _Search:
    """LP, then MILP, over one encoding of the region, with one clock."""

    def __init__(self, problem: _Problem, walked: Bounds, limits: Limits, started: float) -> None:
        self.problem, self.limits, self.ends = problem, limits, started + limits.time_limit
        self.walked = walked
        self.encodings: dict[float, Encoding] = {}
        self.by: Literal["bounds", "lp", "milp"] = "bounds"
        self.nodes, self.reason = 0, ""

    def encoding(self, inset: float = 0.0) -> Encoding:
        if inset not in self.encodings:
            self.encodings[inset] = Encoding(self.walked, self.problem.phases, inset)
        return self.encodings[inset]

    def decision(self, status: Status, margins: Tensor, **more: Any) -> Decision:
        binaries = self.encoding().binaries if self.by == "milp" else 0
        return Decision(status, margins, self.by, binaries=binaries, nodes=self.nodes, **more)

    def solve(self, row: Tensor | None, below: float, *, integer: bool, inset: float = 0.0) -> Outcome:
        """Minimise a row over the region where it is at most `below`; without a row, find any point."""
        left = self.ends - time.perf_counter()
        encoding = self.encoding(inset)
        if left <= 0:
            return Outcome("stopped", None, float("-inf"), "the time limit was reached")
        if integer and encoding.binaries > self.limits.max_binaries:
            why = f"{encoding.binaries} neurons are unstable, more than max_binaries={self.limits.max_binaries}"
            return Outcome("stopped", None, float("-inf"), why)
        self.by = "milp" if integer and encoding.binaries else ("milp" if self.by == "milp" else "lp")
        program: LinearProgram = encoding.program(row, below)
        outcome = program.solve(integer=integer, time_limit=left, max_nodes=self.limits.max_nodes)
        self.nodes += outcome.nodes
        return outcome

    def reachable(self) -> tuple[Status, str]:
        """Whether any input follows the phases ("verified": yes, with a point that the torch model confirms)."""
        reason = "inputs reach the region at its edge only"
        for inset, integer in ((INSET, False), (INSET, True), (0.0, True)):
            outcome = self.solve(None, 0.0, integer=integer, inset=inset)
            if outcome.state == "infeasible" and inset == 0.0:
                return "empty_region", ""
            if outcome.state == "stopped":
                reason = outcome.reason
            if outcome.point is not None and bool(self.problem.follows(outcome.point).any()):
                return "verified", ""
        return "unknown", f"the region was not shown to hold an input: {reason}"

    def row(self, row: int) -> float | Tensor:
        """A proven lower bound of a row, or a confirmed counterexample, or -inf (then `reason` says why)."""
        form, tol = self.problem.rows[row], self.limits.tol
        relaxed = self.solve(form, float("inf"), integer=False)
        if relaxed.bound > tol:
            return relaxed.bound
        if (found := self._try(relaxed, row)) is not None:
            return found
        exact = self.solve(form, tol, integer=True)
        if exact.state == "infeasible":
            return tol
        if (found := self._try(exact, row)) is not None:
            return found
        if exact.state == "stopped":
            self.reason = exact.reason
            return float("-inf")
        inner = self.solve(form, -tol, integer=True, inset=INSET if self.problem.constrained else 0.0)
        if (found := self._try(inner, row)) is not None:
            return found
        self.reason = (
            inner.reason or "the only violations lie within the tolerance of a tie or at the edge of the phases"
        )
        return float("-inf")

    def _try(self, outcome: Outcome, row: int) -> Tensor | None:
        return None if outcome.point is None else self.problem.descend(outcome.point, row)
