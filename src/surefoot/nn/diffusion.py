"""Denoising diffusion in a few functions: noise schedules, the forward process, DDIM sampling, classifier-free guidance.

A schedule is the tensor `alphas_bar` `[T]`, decreasing in t; the forward process and the noise-prediction (epsilon) parametrisation are

    z_t = sqrt(abar_t) x + sqrt(1 - abar_t) e,   e ~ N(0, I),          training: E || e_theta(z_t, t, c) - e ||^2
    x0  = (z_t - sqrt(1 - abar_t) e_theta) / sqrt(abar_t)
    DDIM (eta = 0):   z_s = sqrt(abar_s) x0 + sqrt(1 - abar_s) e_theta,   s < t;   at the end abar_s = 1 and z_s = x0
    guidance:         e = e(z, t, '') + w (e(z, t, c) - e(z, t, ''))

Sources: Ho, Jain & Abbeel 2020, arXiv 2006.11239; Nichol & Dhariwal 2021, arXiv 2102.09672 (cosine); Song, Meng & Ermon 2021,
arXiv 2010.02502 (DDIM); Ho & Salimans 2022, arXiv 2207.12598 (guidance).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from surefoot.errors import check, check_at_least

Predict = Callable[[Tensor, Tensor], Tensor]  # (z [B, ...], t int64 [B]) -> noise [B, ...]


def linear_alphas_bar(steps: int = 1000, *, first: float = 1e-4, last: float = 2e-2) -> Tensor:
    """Betas in a straight line from `first` to `last` (for 1000 steps; scaled by 1000/steps otherwise). float32 `[steps]`."""
    check_at_least("steps", steps, 1)
    check(0 < first <= last, f"betas must satisfy 0 < first <= last, got {first} and {last}.")
    betas = torch.linspace(first, last, steps, dtype=torch.float64) * (1000 / steps)
    return torch.cumprod(1 - betas.clamp(max=0.999), 0).float()


def cosine_alphas_bar(steps: int = 1000, *, offset: float = 0.008) -> Tensor:
    """abar_t = cos^2((t/T + s)/(1 + s) pi/2), up to a constant, betas at most .999. float32 `[steps]`."""
    check_at_least("steps", steps, 1)
    grid = (torch.arange(steps + 1, dtype=torch.float64) / steps + offset) / (1 + offset)
    curve = torch.cos(grid * math.pi / 2) ** 2
    betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, 0).float()


def levels_of(alphas_bar: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """abar at the times `t` `[B]`, shaped to multiply `like` `[B, ...]`."""
    return alphas_bar.to(like.device, like.dtype)[t].view(-1, *[1] * (like.dim() - 1))


def noised(
    x: Tensor,  # [B, ...]
    t: Tensor,  # int64 [B]
    noise: Tensor,  # [B, ...]
    alphas_bar: Tensor,  # [T]
) -> Tensor:
    """z_t of the forward process."""
    level = levels_of(alphas_bar, t, x)
    return level.sqrt() * x + (1 - level).sqrt() * noise


def denoising_loss(
    predict: Predict, x: Tensor, alphas_bar: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    """Mean squared error of the predicted noise at times drawn uniformly; scalar."""
    device = x.device if generator is None else generator.device
    t = torch.randint(len(alphas_bar), (len(x),), generator=generator, device=device).to(x.device)
    noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
    return F.mse_loss(predict(noised(x, t, noise, alphas_bar), t), noise)


def guided(without: Tensor, given: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: `scale` 0 ignores the condition, 1 is the plain conditional prediction."""
    return without + scale * (given - without)


def ddim_times(num_times: int, steps: int) -> list[int]:
    """`steps` times from T - 1 downwards at equal distance ("trailing"), so that sampling starts at the noisiest level."""
    check(1 <= steps <= num_times, f"steps must lie between 1 and the schedule's {num_times}, got {steps}.")
    return [round(num_times * (steps - k) / steps) - 1 for k in range(steps)]


@dataclass(frozen=True)
class Level:
    """A sampler's state before it leaves time `t`: z_t, the noise predicted there, and the clean image that it implies."""

    t: int
    z: Tensor  # [B, ...]
    noise: Tensor  # [B, ...]
    x0: Tensor  # [B, ...]


def ddim(
    predict: Predict,
    z: Tensor,  # [B, ...] pure noise
    alphas_bar: Tensor,  # [T]
    *,
    steps: int,
    clip: float | None = None,
) -> Iterator[Level]:
    """Deterministic DDIM from pure noise, level by level; the sample is the last level's `x0`.

    `clip` bounds |x0| at every level (images in [-1, 1]: 1.0; latents: None), with the noise made consistent again.
    """
    times = ddim_times(len(alphas_bar), steps)
    table = alphas_bar.to(z.device, torch.promote_types(z.dtype, torch.float32))
    for place, t in enumerate(times):
        level = table[t]
        noise = predict(z, torch.full((len(z),), t, device=z.device))
        x0 = ((z - (1 - level).sqrt() * noise) / level.sqrt()).to(z.dtype)
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
            noise = ((z - level.sqrt() * x0) / (1 - level).sqrt()).to(z.dtype)
        yield Level(t, z, noise, x0)
        if place + 1 < len(times):
            below = table[times[place + 1]]
            z = (below.sqrt() * x0 + (1 - below).sqrt() * noise).to(z.dtype)


def ddim_sample(
    predict: Predict, z: Tensor, alphas_bar: Tensor, *, steps: int, clip: float | None = None
) -> Tensor:  # like z
    """The sample that `ddim` ends with."""
    sample = z
    for level in ddim(predict, z, alphas_bar, steps=steps, clip=clip):
        sample = level.x0
    return sample
