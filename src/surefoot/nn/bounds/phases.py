"""Phases of neurons: which ReLUs of a net must be active (z > 0) or inactive (z <= 0), and the bounds of what follows them.

    l = max(l, 0) for active, u = min(u, 0) for inactive neurons; l > u proves that nothing follows

Neurons are named by their ReLU's node in the traced model and by position, one value each, -1, 0 or +1; z is the ReLU's own input, after
any batch-norm.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from surefoot.errors import InvalidInput, check
from surefoot.nn.bounds.graph import Bounds, Program, Step, propagate
from surefoot.nn.bounds.linear import Region, crown_refiner
from surefoot.nn.bounds.operators import Box, Op, Rectifier

Phases = Mapping[str, Tensor]  # rectifier's name -> +1 active, -1 inactive, 0 free, one value a neuron


def rectifier_shapes(model: nn.Module, example: Tensor) -> dict[str, torch.Size]:
    """Name and shape `[...]` (one example) of every ReLU of a net, in order: the keys and shapes of `Phases`."""
    exact = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        walked = propagate(Program(exact), Box(example.double(), example.double()))
    return {name: box.shape[1:] for name, box in walked.rectifiers}


@torch.no_grad()
def preactivations(model: nn.Module | Program, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits `[B, K]` and the input of every ReLU by its name, `[B, ...]`, as the model computes them in the mode it is in."""
    program = model if isinstance(model, Program) else Program(model)
    walked = propagate(program, Box(x, x))
    return walked.output.centre, {name: box.centre for name, box in walked.rectifiers}


def check_phases(walked: Bounds, phases: Phases) -> dict[str, Tensor]:
    """Phases as float64 `[1, ...]` by rectifier; refuses names, shapes and values that are not this net's."""
    boxes = dict(walked.rectifiers)
    checked = {}
    for name, sign in phases.items():
        if name not in boxes:
            raise InvalidInput(f"The net has no ReLU '{name}'; it has {', '.join(boxes) or 'none'}.")
        shape = boxes[name].shape[1:]
        check(sign.shape == shape, f"Phases of '{name}' must have the shape {tuple(shape)}, got {tuple(sign.shape)}.")
        check(bool(((sign == 0) | (sign.abs() == 1)).all()), f"Phases of '{name}' must be -1, 0 or 1.")
        checked[name] = sign.to(boxes[name].lower).unsqueeze(0)
    return checked


def plain_walk(program: Program, region: Region) -> Bounds:
    return propagate(program, region.box, refine=crown_refiner(region))


def phase_walk(program: Program, region: Region, plain: Bounds, phases: Mapping[str, Tensor]) -> Bounds | None:
    """Bounds of everything that follows `phases` `[1, ...]`, nowhere wider than `plain`; None where they cross: nothing does.

    Boxes are cut with the plain ones and by the phases, then by CROWN for what stays open.
    """
    signs: dict[int, list[Tensor]] = {}
    for step in plain.steps:
        if isinstance(step.op, Rectifier) and step.name in phases:
            signs.setdefault(step.parents[0], []).append(phases[step.name])
    by_crown = crown_refiner(region)

    def refine(steps: list[Step], index: int, reader: Op) -> Box:
        lower = torch.maximum(steps[index].box.lower, plain.steps[index].box.lower)
        upper = torch.minimum(steps[index].box.upper, plain.steps[index].box.upper)
        upper = torch.maximum(lower, upper)  # rounding may cross them where both are exact
        for sign in signs.get(index, ()):
            lower, upper = lower.clamp(min=0).where(sign > 0, lower), upper.clamp(max=0).where(sign < 0, upper)
        if bool((lower > upper).any()):
            raise _EmptyRegion
        steps[index] = replace(steps[index], box=Box(lower, upper))
        return by_crown(steps, index, reader)

    try:
        return propagate(program, region.box, refine=refine)
    except _EmptyRegion:
        return None


class _EmptyRegion(Exception):
    """Raised inside a walk once bounds cross."""


@torch.no_grad()
def phase_bounds(model: nn.Module, lower: Tensor, upper: Tensor, phases: Phases) -> Bounds | None:
    """Bounds `[1, ...]` of a net over the inputs of a box that follow `phases`; None if they prove that there are none."""
    program, region = Program(copy.deepcopy(model).double().eval()), Region(Box(lower.double(), upper.double()))
    plain = plain_walk(program, region)
    return phase_walk(program, region, plain, check_phases(plain, phases))
