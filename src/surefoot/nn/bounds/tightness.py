"""How much intervals lose at one activation pattern: exact against layer-wise radius of a piecewise linear net.

With the pattern's gates D (1 active, 0 or the leaky slope otherwise) in place of each ReLU, for an input box of radius r,

    r* = |C W_L D ... D W_1| r        exact           r_IBP = |C W_L| D ... D |W_1| r        layer by layer

tau = r*/r_IBP per row of the specification C is 1 where intervals lose nothing. Offsets play no role. A row with r_IBP = 0 is dead:
its tau is NaN, not 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from surefoot.errors import UnsupportedOp
from surefoot.nn.bounds.graph import Program, Step, propagate
from surefoot.nn.bounds.linear import pull_back
from surefoot.nn.bounds.operators import Box, Dense, Rectifier, inner

Pattern = Literal["local", "center"]


@dataclass(frozen=True, eq=False)
class Gated:
    """A net at one activation pattern a sample: steps whose boxes are [-r, r], layer by layer, and the gates of its ReLUs."""

    steps: tuple[Step, ...]
    end: int
    gates: dict[int, Tensor]  # rectifier step -> [B, ...]

    def radii(self, start: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Exact and layer-wise radius `[B, R]` of linear forms `[B or 1, R, ...]` of one step; rows are folded into its layer."""
        met, _ = pull_back(self.steps, start, rows, self.gates)
        radius = self.steps[0].box.radius
        exact = inner(met[0].abs(), radius) if 0 in met else radius.new_zeros(len(radius), rows.shape[1])
        step = self.steps[start]
        if isinstance(step.op, Dense):
            below = self.steps[step.parents[0]].box
            return exact, inner(step.op.pull(rows, [below.shape])[0].abs(), below.radius)
        return exact, inner(rows.abs(), step.box.radius)

    def entries(self, start: int, at_most: int) -> Tensor:
        """One-hot rows `[1, R, ...]` of at most that many evenly spaced entries of a step."""
        features = self.steps[start].box.shape[1:]
        many = min(at_most, features.numel())
        chosen = torch.linspace(0, features.numel() - 1, many, device=self.steps[0].box.radius.device).round().long()
        rows = self.steps[0].box.radius.new_zeros(many, features.numel())
        rows[torch.arange(many, device=rows.device), chosen] = 1.0
        return rows.reshape(1, many, *features)


def gated(
    program: Program,
    box: Box,  # [B, ...] input box
    at: Tensor | None,  # [B, ...] the input whose pattern is taken; None: every ReLU is the identity
) -> Gated:
    """Fix the pattern and propagate radii; differentiable in the weights. A neuron is active iff z >= 0.

    Raises `UnsupportedOp` for nonlinearities other than ReLU and leaky ReLU.
    """
    point = box.centre if at is None else at
    walked = propagate(program, Box(point, point), clean=point if program.needs_clean else None)
    zero = torch.zeros_like(box.radius)
    steps: list[Step] = [replace(walked.steps[0], box=Box.around(zero, box.radius))]
    gates: dict[int, Tensor] = {}
    for index, step in enumerate(walked.steps[1:], 1):
        assert step.op is not None
        boxes = [steps[p].box for p in step.parents]
        if isinstance(step.op, Rectifier):
            z = walked.steps[step.parents[0]].box.centre
            gates[index] = torch.where(z >= 0, torch.ones_like(z), 1.0 if at is None else step.op.slope)
            radius = gates[index] * boxes[0].radius
        elif step.op.affine:
            radius = step.op.interval(*boxes).radius
        else:
            raise UnsupportedOp(
                f"Tightness needs ReLUs, and node '{step.name}' is another nonlinearity; replace it by a ReLU."
            )
        steps.append(replace(step, box=Box.around(torch.zeros_like(radius), radius)))
    return Gated(tuple(steps), walked.end, gates)


def weight_layers(steps: Sequence[Step], end: int) -> list[int]:
    """Steps that hold a layer's result: the input of every rectifier, and the output."""
    before = [s.parents[0] for s in steps if isinstance(s.op, Rectifier)]
    return [*dict.fromkeys(before), end]
