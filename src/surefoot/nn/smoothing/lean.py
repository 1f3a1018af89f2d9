"""A leaner private form of a network for thousands of forward passes on a CPU: the same function up to rounding.

What smoothing runs is a chain of steps. Where the chain is known from the outside (exact `nn.Sequential`s, nested or not, without
hooks; a class of ours names its own in a method `lean_steps()` beside its `forward`), three things follow without a look at any
custom code; a step with the attribute `is_linear_map = True` promises L(a + b) = L(a) + L(b):

    fold      batch-norm in evaluation mode behind a convolution is that convolution with other weights: w' = w g / sqrt(v + eps)
    in place  a ReLU may overwrite what the step before it has just made
    split     a first step that is linear takes input and noise apart: L(x + sigma e) + b = (L x + b) + L(sigma e), and noise that
              many inputs share needs L once

Any other model (custom code, hooks, parametrisations, autocast, a GPU) is left as it is and runs the ordinary way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.nn.utils.fusion import fuse_conv_bn_eval

Model = nn.Module | Callable[[Tensor], Tensor]
FRESH = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)  # steps whose output nobody else holds


@dataclass(frozen=True)
class Split:
    """A model as `rest(linear(x) + bias)`; `bias` broadcasts over one example's features, None where there is none."""

    linear: Callable[[Tensor], Tensor]
    bias: Tensor | None
    rest: Model


def lean(model: Model, x: Tensor) -> Model:
    """`model` with batch-norm folded and ReLUs in place where that is certain, else `model` itself. Evaluation mode is assumed."""
    steps = _steps(model, x)
    if len(steps) < 2:
        return model
    out: list[nn.Module] = []
    for step in steps:
        before = out[-1] if out else None
        if isinstance(before, nn.Conv2d) and isinstance(step, nn.BatchNorm2d) and _can_fold(before, step):
            out[-1] = fuse_conv_bn_eval(before, step)  # copies both
        elif _is(step, nn.ReLU) and before is not None and type(before) in FRESH and _is(before, type(before)):
            out.append(nn.ReLU(inplace=True))
        else:
            out.append(step)
    return nn.Sequential(*out)


def split(model: Model, x: Tensor) -> Split:
    """The model's first step taken apart, where it is a convolution or linear layer (behind steps that are linear, a Flatten, say)."""
    steps = _steps(model, x)
    ahead = next((i for i, step in enumerate(steps) if not _is_linear_map(step)), 0)
    before, first, rest = nn.Sequential(*steps[:ahead]), steps[ahead] if steps else None, steps[ahead + 1 :]
    if rest and _is(rest[0], nn.ReLU):  # the sum of both parts is a buffer, which it may overwrite
        rest = [nn.ReLU(inplace=True), *rest[1:]]
    if isinstance(first, nn.Conv2d) and _is(first, nn.Conv2d) and x.dim() == 4:
        conv, bias = first, None if first.bias is None else first.bias[:, None, None]
        return Split(lambda z: conv._conv_forward(before(z), conv.weight, None), bias, nn.Sequential(*rest))
    if isinstance(first, nn.Linear) and _is(first, nn.Linear):
        weight = first.weight
        return Split(lambda z: F.linear(before(z), weight), first.bias, nn.Sequential(*rest))
    return Split(lambda z: z, None, model)


def _steps(model: Model, x: Tensor) -> list[nn.Module]:
    """The chain of steps, [] where nothing may be changed: not a CPU's float32 or float64, or hooks on every module."""
    if not isinstance(model, nn.Module) or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return []
    if torch.is_autocast_enabled("cpu") or torch_module._has_any_global_hook():
        return []
    return _unpacked(model)


def _unpacked(part: nn.Module) -> list[nn.Module]:
    if isinstance(part, nn.Sequential) and _is(part, nn.Sequential):
        return [step for child in part for step in _unpacked(child)]
    own = vars(type(part))  # a subclass with another forward inherits `lean_steps`, too, and must not be believed
    if "lean_steps" in own and "forward" in own and _is(part, type(part)):
        return [step for child in own["lean_steps"](part) for step in _unpacked(child)]
    return [part]


def _is(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Exactly this class, so its forward is known, and nothing hangs on it (hooks carry pruning and weight normalisation, too)."""
    return type(part) is kind and not (part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))


def _is_linear_map(step: nn.Module) -> bool:
    return _is(step, nn.Flatten) or getattr(step, "is_linear_map", False) is True


def _can_fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    known = _is(conv, nn.Conv2d) and _is(norm, nn.BatchNorm2d) and not norm.training
    return known and norm.running_mean is not None and norm.running_mean.dtype == conv.weight.dtype
