"""Two steps of training on bounds whose plain form is bound by memory, as autograd functions with one short pass each way.

Both give the values and gradients of the plain form in `operators.py` and `rules.py` (up to rounding); neither has a second derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LARGE = 31 << 20  # bytes; just below 32 MB, where glibc stops learning


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step. A step on bounds frees some ten mid-sized tensors at its end; by default the C library
    hands them back to the system at once, and the next step takes them page by page again: a fifth of a step's time on a CPU.

    The library sets its limits by the largest block it has seen freed, so one untouched block is enough (microseconds; no memory
    is used). It then holds for the whole process, as it would after any tensor of that size. Elsewhere than on glibc nothing happens.
    """
    torch.empty(LARGE, dtype=torch.uint8, device="cpu")


class RectifiedPair(torch.autograd.Function):
    """ReLU of a box from (c, r) to (c', r'), with a backward pass that keeps nothing but its results: the step of a training

    loop that is bound by memory. An unstable neuron has c' = r' = u/2 exactly, so that c' > r' marks l > 0, and c' > 0 marks u > 0.
    """

    @staticmethod
    def forward(ctx: Any, centre: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        lower, upper = (centre - radius).relu_(), (centre + radius).relu_()
        centre = lower.lerp_(upper, 0.5)
        radius = upper.sub_(centre)
        ctx.save_for_backward(centre, radius)
        return centre, radius

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (centre, radius), (by_centre, by_radius) = ctx.saved_tensors, gradients
        mask = torch.ops.aten.threshold_backward.grad_input  # in place: fresh memory is what costs here
        upper, lower = by_centre + by_radius, by_centre - by_radius
        mask(upper, centre, 0, grad_input=upper)
        mask(lower, centre - radius, 0, grad_input=lower)
        by_centre = lower.lerp_(upper, 0.5)
        return by_centre, upper.sub_(by_centre)


class BatchStatistics(torch.autograd.Function):
    """Batch-norm of the clean batch together with its mean and 1/std as differentiable outputs, `[C]` each.

    One kernel each way where separate statistics would take several passes over memory; the running statistics move here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, pace: float, eps: float):  # type: ignore[override]  # fmt: skip
        output, mean, inverse = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, pace, eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps = eps
        return output, mean, inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor):  # type: ignore[override]
        (x, weight, mean, inverse), (by_output, by_mean, by_inverse) = ctx.saved_tensors, gradients
        wanted = [True, weight is not None and ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
        by_x, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            by_output.contiguous(), x, weight, None, None, mean, inverse, True, ctx.eps, wanted
        )
        n, shape = x.numel() // x.shape[1], (1, -1) + (1,) * (x.dim() - 2)
        slope = -by_inverse * inverse**3 / n  # d inverse / dx = -inverse^3 (x - mean) / n
        by_x.addcmul_(x, slope.reshape(shape)).add_((by_mean / n - slope * mean).reshape(shape))
        return by_x, by_weight, by_bias, None, None, None, None
