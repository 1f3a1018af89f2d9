"""Uniform affine quantizers with straight-through gradients.

A quantizer of `b` bits keeps a range `R` and a lowest value `z` and rounds

    s = R / (2^b - 1)                                  step
    q = clamp(round((x - z) / s), 0, 2^b - 1)          code, an integer of b bits
    x_hat = q s + z

`z` is itself rounded to a multiple of `s`, so that a real 0 (a padded pixel, a pruned weight) is represented exactly.
Rounding is passed straight through by the gradient; `R` and `z` get theirs through the step and the clamp. Ranges are
per tensor, or per channel along the first dimension (the output channels of a weight).

Source: asymmetric uniform quantization as in Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", 2018, arXiv 1712.05877; straight-through gradient: Bengio et al., 2013, arXiv 1308.3432.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from surefoot.errors import check, check_at_least, check_choice

RangeRule = Literal["minmax", "mse"]
MAX_BITS = 16  # beyond this a float32 code loses its integer neighbours in q * s + z


class _RoundThrough(torch.autograd.Function):
    """Exact integers forward (`x + (round(x) - x).detach()` misses them by a float's last bit), identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _Quantize(torch.autograd.Function):
    """`clamp(round((x - z) / s), 0, top) s + z` and its straight-through gradient in a third of autograd's operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero: Tensor, top: int) -> Tensor:
        position = (x - zero).div_(step)
        code = position.round().clamp_(0, top)
        ctx.save_for_backward(position, code, step, zero)
        ctx.top = top
        return (code * step).add_(zero)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        position, code, step, zero = ctx.saved_tensors
        inner = gradients[0] * ((position >= 0) & (position <= ctx.top))
        to_step = (gradients[0] * code - inner * position).sum_to_size(step.shape) if ctx.needs_input_grad[1] else None
        to_zero = (gradients[0] - inner).sum_to_size(zero.shape) if ctx.needs_input_grad[2] else None
        return inner, to_step, to_zero, None


def round_through(x: Tensor) -> Tensor:
    """`round(x)` with the gradient of the identity."""
    return cast(Tensor, _RoundThrough.apply(x))


def _broadcast(value: Tensor, like: Tensor) -> Tensor:
    """A scalar as it is; `[C]` as `[C, 1, ...]` so that it meets the first dimension of `like`."""
    return value if value.ndim == 0 else value.reshape(-1, *([1] * (like.ndim - 1)))


def grid(width: Tensor, low: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step `s` and lowest value `z`, the latter moved to a multiple of the step; both keep their gradients."""
    step = width / (2**bits - 1)
    return step, round_through(low / step) * step


def quantize(x: Tensor, width: Tensor, low: Tensor, bits: int) -> Tensor:
    """`x_hat`: quantized and back to real values, straight-through gradient.

    Args:
        x: `[...]`, or `[C, ...]` with per-channel ranges.
        width: `R`, scalar or `[C]`, positive.
        low: `z` before it is put on the grid, scalar or `[C]`.
        bits: number of bits of a code.
    """
    step, zero = grid(_broadcast(width, x), _broadcast(low, x), bits)
    return cast(Tensor, _Quantize.apply(x, step, zero, 2**bits - 1))


@torch.no_grad()
def codes(x: Tensor, width: Tensor, low: Tensor, bits: int) -> Tensor:
    """The integers `q` in `[0, 2^bits - 1]`, int64, of the shape of `x`."""
    step, zero = grid(_broadcast(width, x), _broadcast(low, x), bits)
    return ((x - zero) / step).round().clamp(0, 2**bits - 1).long()


@torch.no_grad()
def minmax_range(x: Tensor, per_channel: bool = False) -> tuple[Tensor, Tensor]:
    """`(R, z)` from the smallest and largest value, widened to hold 0; scalars, or `[C]` along the first dimension.

    A constant zero gets `R = 1`, which represents it exactly.
    """
    check(x.numel() > 0, "A range needs at least one value; the tensor is empty.")
    check(bool(torch.isfinite(x).all()), "A range cannot be measured on NaN or infinite values; look at the inputs.")
    flat = x.flatten(1) if per_channel else x.reshape(1, -1)
    low, high = flat.amin(1).clamp(max=0.0), flat.amax(1).clamp(min=0.0)
    width = high - low
    width = torch.where(width > 0, width, torch.ones_like(width))
    return (width, low) if per_channel else (width[0], low[0])


@torch.no_grad()
def mse_range(
    x: Tensor, bits: int, per_channel: bool = False, candidates: int = 40, at_most: int = 65_536
) -> tuple[Tensor, Tensor]:
    """`(R, z)` with the least squared rounding error among the min/max range shrunk by `1/candidates ... 1`.

    Few bits are better spent on the bulk of the values than on the tails. A tensor range looks at no more than about
    `at_most` evenly spaced values.
    """
    check_at_least("candidates", candidates, 1)
    width, low = minmax_range(x, per_channel)
    flat = x.flatten(1) if per_channel else x.reshape(1, -1)[:, :: max(1, x.numel() // at_most)]
    width, low = width.reshape(-1), low.reshape(-1)
    best = torch.full_like(width, float("inf"))
    best_width, best_low = width.clone(), low.clone()
    for step in range(candidates, 0, -1):  # from the full range down: ties keep the wider one
        share = step / candidates
        error = (quantize(flat, width * share, low * share, bits) - flat).square().mean(1)
        better = error < best
        best = torch.where(better, error, best)
        best_width = torch.where(better, width * share, best_width)
        best_low = torch.where(better, low * share, best_low)
    return (best_width, best_low) if per_channel else (best_width[0], best_low[0])


class AffineQuantizer(nn.Module):
    """A quantizer with its range as parameters, so that it can be learned, saved and loaded.

    Args:
        bits: bits of a code, 1 to 16.
        channels: `None` for one range for the tensor, else the size of the first dimension.

    Shapes: `width` and `low` are scalars or `[channels]`; `forward` keeps the shape of its input.
    """

    def __init__(
        self,
        bits: int,
        channels: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        check_at_least("bits", bits, 1)
        check(
            bits <= MAX_BITS,
            f"bits must be at most {MAX_BITS}, got {bits!r}; leave the layer in floating point instead.",
        )
        self.bits = bits
        shape = () if channels is None else (channels,)
        self.width = nn.Parameter(torch.ones(shape, dtype=dtype, device=device))
        self.low = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))

    @property
    def per_channel(self) -> bool:
        return self.width.ndim == 1

    @torch.no_grad()
    def measure(self, x: Tensor, rule: RangeRule = "minmax") -> None:
        """Set the range to that of `x`."""
        check_choice("rule", rule, ("minmax", "mse"))
        width, low = (
            minmax_range(x, self.per_channel) if rule == "minmax" else mse_range(x, self.bits, self.per_channel)
        )
        self.width.copy_(width)
        self.low.copy_(low)

    @torch.no_grad()
    def rescale_(self, factor: Tensor) -> None:
        """Multiply the grid by a positive factor: a tensor multiplied by the same factor keeps its codes."""
        self.width.mul_(factor)
        self.low.mul_(factor)

    @property
    def step(self) -> Tensor:
        """The step `s`, without gradient."""
        return self.width.detach() / (2**self.bits - 1)

    def codes(self, x: Tensor) -> Tensor:
        return codes(x, self.width, self.low, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        return quantize(x, self.width, self.low, self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, per_channel={self.per_channel}"
