"""Linear bounds (CROWN): walk the steps of a graph backwards with coefficients A of a linear form on their outputs.

At a rectifier with coefficients A, split into A+ = max(A, 0) and A- = min(A, 0): for a lower bound A+ takes the line below
and A- the line above. At an affine step A <- A W and constant += A b. At a join A goes to every parent, and a step is
handled only when the coefficients of all its consumers are summed. Steps without lines (max-pooling, tanh) stop the
walk: their own box is taken. At the input, A x + k is minimised over the region. An upper bound of a row is minus the
lower bound of its negative.

Source: Zhang et al., "Efficient Neural Network Robustness Certification with General Activation Functions", 2018, arXiv
1811.00866; general graphs: Xu et al. 2020, arXiv 2002.12920; optimised slopes: Xu et al. 2021, arXiv 2011.13824.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surefoot.errors import UnsupportedOp
from surefoot.nn.bounds.graph import Refine, Step
from surefoot.nn.bounds.operators import Box, Dense, Op, Rectifier, inner

Slopes = Mapping[int, Tensor]  # step -> slope of the line below, [B, R, ...]


@dataclass(frozen=True, eq=False)
class Region:
    """The inputs a statement is about: a box, or a Euclidean ball (around the centre) cut off by a box.

    `radius` is the ball's, None for a plain box.
    """

    box: Box
    centre: Tensor | None = None
    radius: float | None = None

    def minimum(self, a: Tensor) -> Tensor:
        """A lower bound of <a, x> over the region, `[B, R]`; the exact minimum for a box and for a ball within its box."""
        over_box = self.box.minimum(a)
        if self.radius is None or self.centre is None:
            return over_box
        over_ball = inner(a, self.centre) - self.radius * a.flatten(2).norm(dim=2)
        return torch.maximum(over_box, over_ball)


def lower_bound(
    steps: Sequence[Step],
    start: int,
    a: Tensor,  # [Bz, R, ...] coefficients on the output of steps[start]
    region: Region,
    *,
    relax: bool = True,
    slopes: Slopes | None = None,
) -> Tensor:  # [B, R]
    """Lower bounds of the rows `a` of step `start` over the region. With `relax=False` every rectifier stops the walk (IBP)."""
    pending = {start: a}
    total: Tensor | float = 0.0
    for index in range(start, 0, -1):
        coefficients = pending.pop(index, None)
        if coefficients is None:
            continue
        step = steps[index]
        assert step.op is not None
        if step.op.affine:
            pulled = step.op.pull(coefficients, [steps[p].box.shape for p in step.parents])
            total = total + step.op.offset(coefficients)
        elif relax and isinstance(step.op, Rectifier):
            box = steps[step.parents[0]].box
            below = None if slopes is None else slopes.get(index)
            through, constant = _through_rectifier(step.op, coefficients, box, below)
            pulled, total = (through,), total + constant
        else:
            total = total + step.box.minimum(coefficients)
            continue
        for parent, part in zip(step.parents, pulled, strict=True):
            pending[parent] = pending[parent] + part if parent in pending else part
    if 0 in pending:
        total = total + region.minimum(pending[0])
    assert isinstance(total, Tensor)
    return total


def pull_back(
    steps: Sequence[Step],
    start: int,
    a: Tensor,  # [Bz, R, ...] coefficients on the output of steps[start]
    gates: Mapping[int, Tensor],  # rectifier step -> the slope it lets through, [B, ...]
) -> tuple[dict[int, Tensor], Tensor]:
    """The linear form written on the input and on the rectifiers' outputs: (coefficients by step, constant `[B, R]`).

    A rectifier in `gates` keeps the coefficients on its own output and also passes them on times its gate: 1 where it is
    active, 0 where inactive, and 0 where a caller keeps its output as a variable. With the gates of one activation pattern the
    coefficients at step 0 are the Jacobian's rows.
    """
    pending, met = {start: a}, {}
    constant = steps[0].box.lower.new_zeros(len(steps[0].box.lower), a.shape[1])
    for index in range(start, 0, -1):
        coefficients = pending.pop(index, None)
        if coefficients is None:
            continue
        step = steps[index]
        assert step.op is not None
        if step.op.affine:
            pulled = step.op.pull(coefficients, [steps[p].box.shape for p in step.parents])
            constant = constant + step.op.offset(coefficients)
        elif index in gates:
            met[index] = coefficients
            pulled = (coefficients * gates[index].unsqueeze(1),)
        else:
            raise UnsupportedOp(
                f"Node '{step.name}' is not piecewise linear by a pattern of ReLUs; replace it by a ReLU."
            )
        for parent, part in zip(step.parents, pulled, strict=True):
            pending[parent] = pending[parent] + part if parent in pending else part
    if 0 in pending:
        met[0] = pending[0]
    return met, constant


def _through_rectifier(op: Rectifier, a: Tensor, box: Box, below: Tensor | None) -> tuple[Tensor, Tensor]:
    adaptive, above, intercept = op.lines(box)
    below = adaptive.unsqueeze(1) if below is None else below
    positive, negative = a.clamp(min=0), a.clamp(max=0)
    return positive * below + negative * above.unsqueeze(1), inner(negative, intercept)


def chunks(rows: int, steps: Sequence[Step], memory_mb: float) -> list[slice]:
    """Cut the rows of a specification so that one tensor of coefficients stays under `memory_mb`."""
    widest = max(step.box.shape.numel() for step in steps)
    size = torch.finfo(steps[0].box.lower.dtype).bits // 8
    many = max(1, int(memory_mb * 2**20 / (widest * size)))
    return [slice(i, min(i + many, rows)) for i in range(0, rows, many)]


def crown_refiner(region: Region, *, intersect: bool = True, memory_mb: float = 256.0) -> Refine:
    """A `refine` for `propagate`: boxes before nonlinearities by CROWN, cut with the interval box.

    With the cut, only neurons that the interval box leaves unstable are worked on; others have exact lines anyway.
    `intersect=False` gives plain CROWN for every neuron.
    """

    def refine(steps: list[Step], index: int, reader: Op) -> Box:
        step = steps[index]
        if index == 0 or (step.depth <= 1 and region.radius is None):
            return step.box  # one weight layer: the interval box is exact
        low, high = step.box.lower.flatten(1), step.box.upper.flatten(1)
        rows = torch.arange(low.shape[1], device=low.device)
        if intersect and isinstance(reader, Rectifier):
            rows = rows[((low < 0) & (high > 0)).any(0)]
        lows, highs = [], []
        for part in chunks(len(rows), steps, memory_mb / 2):
            below, above = _row_bounds(steps, index, rows[part], region)
            lows.append(below)
            highs.append(above)
        if not lows:
            return step.box
        below, above = torch.cat(lows, 1), torch.cat(highs, 1)
        if intersect:  # fmax and fmin pass over a NaN that an infinite box may have led to
            below, above = torch.fmax(below, low[:, rows]), torch.fmin(above, high[:, rows])
        above = torch.maximum(above, below)  # rounding may cross them where both are exact
        shape = step.box.shape
        return Box(low.index_copy(1, rows, below).reshape(shape), high.index_copy(1, rows, above).reshape(shape))

    return refine


def _row_bounds(steps: Sequence[Step], index: int, rows: Tensor, region: Region) -> tuple[Tensor, Tensor]:
    """Lower and upper CROWN bounds `[B, R]` of chosen entries of one step's output."""
    step = steps[index]
    offset: Tensor | float = 0.0
    if isinstance(step.op, Dense) and len(step.box.shape) == 2:  # identity rows times W are rows of W
        a, start = step.op.weight[rows].unsqueeze(0), step.parents[0]
        offset = 0.0 if step.op.bias is None else step.op.bias[rows]
    else:
        features = step.box.shape[1:]
        a = step.box.lower.new_zeros(len(rows), features.numel())
        a[torch.arange(len(rows), device=rows.device), rows] = 1.0
        a, start = a.reshape(1, len(rows), *features), index
    both = lower_bound(steps, start, torch.cat([a, -a], 1), region)
    return both[:, : len(rows)] + offset, offset - both[:, len(rows) :]


def optimised_lower_bound(
    steps: Sequence[Step], start: int, a: Tensor, region: Region, *, iterations: int = 20, lr: float = 0.1
) -> Tensor:
    """alpha-CROWN: raise the bound of each row over its own slopes below with Adam; the best value met is kept.

    Starts from the adaptive slopes, so it is never below plain CROWN. Boxes before nonlinearities stay as they are.
    """
    best = lower_bound(steps, start, a, region).detach()
    slopes: dict[int, Tensor] = {}
    floor: dict[int, float] = {}
    for index, step in enumerate(steps[: start + 1]):
        if isinstance(step.op, Rectifier):
            box = steps[step.parents[0]].box
            below = step.op.lines(box)[0].detach().unsqueeze(1)
            slopes[index] = below.expand(-1, a.shape[1], *below.shape[2:]).clone().requires_grad_()
            floor[index] = step.op.slope
    if not slopes:
        return best
    stable = {i: _stable(steps[steps[i].parents[0]].box) for i in slopes}
    adam = torch.optim.Adam(list(slopes.values()), lr)
    with torch.enable_grad():
        for _ in range(iterations):
            bound = lower_bound(steps, start, a.detach(), region, slopes=slopes)
            best = torch.fmax(best, bound.detach())
            gradients = torch.autograd.grad(-bound.sum(), list(slopes.values()), allow_unused=True)
            for (index, slope), gradient in zip(slopes.items(), gradients, strict=True):
                slope.grad = None if gradient is None else gradient.masked_fill(stable[index], 0.0)
            adam.step()
            with torch.no_grad():
                for index, slope in slopes.items():
                    slope.clamp_(floor[index], 1.0)
        last = lower_bound(steps, start, a.detach(), region, slopes=slopes).detach()
    return torch.fmax(best, last)


def _stable(box: Box) -> Tensor:
    return ((box.lower >= 0) | (box.upper <= 0)).unsqueeze(1)
