"""What makes a training step on bounds fast: layouts, and autograd functions with few passes over memory each way.

The functions give the values and gradients of the plain forms in `operators.py` and `rules.py` (up to rounding); they have no second derivative.
On a CPU the convolutions of a training walk run channels-last, whatever the layout of the model: oneDNN then copies less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def channels_last(weight: Tensor) -> Tensor:
    """A convolution's weight in the layout that makes the convolution, and all that follows it, run channels-last: in training on a CPU.

    A copy even of a weight that has it: with one input channel torch would take that for a contiguous one.
    """
    if not torch.is_grad_enabled() or weight.dim() != 4 or weight.device.type != "cpu":
        return weight
    plain = weight.dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available()
    return weight if plain else weight.clone(memory_format=torch.channels_last)


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


class _Contiguous(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous(memory_format=torch.channels_last)


def contiguous(x: Tensor) -> Tensor:
    """`x` ready for a reshape; the gradient of a channels-last tensor is channels-last again, since passes over mixed layouts are slow."""
    return _Contiguous.apply(x) if torch.is_grad_enabled() and _is_channels_last(x) else x


class RectifiedPair(torch.autograd.Function):
    """ReLU of a box from (c, r) to (c', r'), with a backward pass that keeps nothing but its results: the step of a training

    loop that is bound by memory. With u = c + r: r' = min(max(u/2, 0), r) and c' = max(c, r'), which is (c, r) exactly where l >= 0, and
    c' = r' = u/2 where the neuron is unstable, so that c' > r' marks l > 0, and c' > 0 marks u > 0.
    """

    @staticmethod
    def forward(ctx: Any, centre: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(centre.dtype, radius.dtype)  # autocast may have left them apart
        centre, radius = centre.to(dtype), radius.to(dtype)
        half = torch.lerp(centre, radius, 0.5).clamp_min_(0)
        radius = torch.minimum(half, radius, out=half)
        centre = torch.maximum(centre, radius)
        ctx.save_for_backward(centre, radius)
        return centre, radius

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (centre, radius), (by_centre, by_radius) = ctx.saved_tensors, gradients
        mask = torch.ops.aten.threshold_backward.grad_input
        # in place, and two new tensors: fresh memory is what costs here
        low, lower = centre - radius, by_centre - by_radius
        mask(lower, low, 0, grad_input=lower)
        upper = torch.add(by_centre, by_radius, out=low)
        mask(upper, centre, 0, grad_input=upper)
        by_centre = lower.lerp_(upper, 0.5)
        return by_centre, upper.sub_(by_centre)


class BatchStatistics(torch.autograd.Function):
    """Batch-norm of the clean batch, and its scale s = gamma/std and shift t = beta - s mean as differentiable outputs `[1, C, 1, ...]`.

    The running statistics move here. Backwards, s and t are like more outputs of the same layer: what arrives there adds to the gradients
    of gamma and beta, and with these totals, over the n entries of a channel and with x^ = (x - mean) / std,

        d gamma = sum(g x^) + (ds - mean dt) / std,      d beta = sum g + dt,      d x = s (g - x^ d gamma / n - d beta / n).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, pace: float, eps: float):  # fmt: skip
        ctx.eps, ctx.planar = eps, x.dtype == torch.float32 and x.device.type == "cpu" and _is_channels_last(x)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        gamma, beta = (None if p is None else p.view(shape) for p in (weight, bias))
        if ctx.planar:
            output, mean, inverse = _normalised(x, gamma, beta, running_mean, running_var, pace, eps)
        else:
            output, *flat = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, pace, eps)
            mean, inverse = (v.view(shape) for v in flat)
        scale = inverse.clone() if gamma is None else inverse * gamma
        shift = -mean * scale if beta is None else torch.addcmul(beta, mean, scale, value=-1)
        ctx.save_for_backward(x, weight, mean, inverse, scale)
        return output, scale, shift

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_output: Tensor, by_scale: Tensor, by_shift: Tensor):
        x, weight, mean, inverse, scale = ctx.saved_tensors
        layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
        by_output = by_output.contiguous(memory_format=layout)
        product = None
        if ctx.planar:
            by_beta = by_output.sum((0, 2, 3), keepdim=True)
            product = x * by_output  # also the memory of the result
            by_gamma = product.sum((0, 2, 3), keepdim=True).addcmul_(mean, by_beta, value=-1).mul_(inverse)
        else:
            flat = mean.flatten(), inverse.flatten()
            _, *sums = torch.ops.aten.native_batch_norm_backward(
                by_output, x, weight, None, None, *flat, True, ctx.eps, [False, True, True]
            )
            by_gamma, by_beta = (v.view(mean.shape) for v in sums)
        by_gamma.addcmul_(torch.addcmul(by_scale, by_shift, mean, value=-1), inverse)
        by_beta.add_(by_shift)
        share = scale * (-x.shape[1] / x.numel())  # -s / n
        slope = (share * inverse).mul_(by_gamma)
        level = share.mul_(by_beta).addcmul_(slope, mean, value=-1)
        by_x = torch.addcmul(level, x, slope, out=product).addcmul_(by_output, scale)
        wanted = [
            v.view(-1) if needed else None
            for v, needed in zip((by_gamma, by_beta), ctx.needs_input_grad[1:3], strict=True)
        ]
        return by_x, *wanted, None, None, None, None


def _normalised(x: Tensor, gamma: Any, beta: Any, running_mean: Any, running_var: Any, pace: float, eps: float):
    """`torch.native_batch_norm` of a channels-last batch on a CPU: torch sums plainly there, with errors fifty times larger, and slower."""
    n = x.numel() // x.shape[1]
    mean = x.sum((0, 2, 3), keepdim=True).div_(n)
    centred = x - mean
    var = (centred * centred).sum((0, 2, 3), keepdim=True).div_(n)
    inverse = (var + eps).rsqrt_()
    if running_mean is not None:
        running_mean.lerp_(mean.view(-1), pace)
        running_var.lerp_(var.view(-1) * (n / (n - 1)), pace)
    scale = inverse if gamma is None else inverse * gamma
    output = centred.mul_(scale) if beta is None else torch.addcmul(beta, centred, scale, out=centred)
    return output, mean, inverse
