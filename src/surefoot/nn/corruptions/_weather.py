"""Weather: snow, frost, fog, water on the lens, light."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from surefoot.nn.corruptions._pieces import (
    coarse_noise,
    fractal_noise,
    normal,
    normal_quantile,
    normal_score,
    pixel_grid,
    side,
    smooth,
    strength,
    uniform,
    warp,
)


def snow(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Flakes driven by the wind, on a picture gone pale."""
    cover, pale = ((0.03, 0.10), (0.05, 0.16), (0.08, 0.22), (0.11, 0.28), (0.14, 0.35))[severity - 1]
    grain = max(side(x) / 75, 1.0)
    field = normal_score(coarse_noise(x, grain, generator))
    flakes = ((field - normal_quantile(cover)) / 0.6 + 0.5).clamp(0, 1)
    angle = (uniform((len(x), 1, 1), x, generator) * 0.5 + 0.25) * math.pi  # mostly downwards
    drift = [
        warp(flakes, (torch.stack([angle.cos(), angle.sin()], 1) * (step * grain)).expand(-1, -1, *x.shape[2:]))
        for step in (-1.0, -0.5, 0.0, 0.5, 1.0)
    ]
    grey = x.mean(1, keepdim=True) * 0.5 + 0.5
    return torch.lerp(x, torch.maximum(x, grey), pale) + 0.9 * torch.stack(drift).mean(0)


def frost(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Ice on the pane: bright ridges of a fractal field, denser towards the edge."""
    keep, ice = ((0.95, 0.35), (0.88, 0.45), (0.80, 0.55), (0.74, 0.65), (0.66, 0.75))[severity - 1]
    field = normal_score(fractal_noise(x, 1.6, generator))
    ridges = (1 - field.abs() / 1.2).clamp_min(0).square()
    edge = pixel_grid(x).abs().amax(-1)[:, None]  # 0 in the middle, 1 at the edge
    return keep * x + ice * (ridges * (0.4 + 0.6 * edge) + 0.15 * edge)


def fog(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Haze as a fractal field in [0, 1]; the picture is scaled so that its brightest point stays where it was."""
    density = strength(x, severity, (0.2, 0.5, 0.75, 1.0, 1.5), (1.5, 2.0, 2.5, 3.0, 3.5))
    field = fractal_noise(x, 1.8, generator)
    low, high = field.amin((2, 3), keepdim=True), field.amax((2, 3), keepdim=True)
    most = x.amax((1, 2, 3), keepdim=True).clamp_min(1e-3)
    return (x + density * (field - low) / (high - low)) * most / (most + density)


def spatter(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Drops of water on the lens: the blobs of a smooth random field, opaque to a growing share."""
    cover, opacity = ((0.03, 0.5), (0.06, 0.6), (0.10, 0.65), (0.15, 0.7), (0.22, 0.8))[severity - 1]
    field = normal_score(smooth(normal((len(x), 1, *x.shape[2:]), x, generator), max(side(x) / 40, 0.8)))
    drops = opacity * ((field - normal_quantile(cover)) / 0.3 + 0.5).clamp(0, 1)
    water = x.new_tensor((0.69, 0.93, 0.93) if x.shape[1] == 3 else (0.88,)).view(1, -1, 1, 1)
    return torch.lerp(x, water.expand_as(x), drops.expand_as(x))


def brightness(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """More light: the value of the HSV colour rises, hue and saturation stay."""
    more = strength(x, severity, (0.05, 0.10, 0.15, 0.20, 0.30), (0.1, 0.2, 0.3, 0.4, 0.5))
    value = x.amax(1, keepdim=True)
    lifted = (value + more).clamp_max(1.0)
    return torch.where(value > 0, x * (lifted / value.clamp_min(1e-6)), lifted)
