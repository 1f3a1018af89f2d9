"""Blur: focus, glass, motion and zoom."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from surefoot.nn.corruptions._pieces import (
    fine_positions,
    length,
    mirror_pad,
    pixel_grid,
    sample,
    smooth,
    strength,
    uniform,
    warp,
)


def gaussian_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    return smooth(x, length(x, severity, (0.4, 0.55, 0.7, 0.85, 1.1), (1, 2, 3, 4, 6)))


def defocus_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A lens out of focus: the mean over a disc."""
    radius = length(x, severity, (0.5, 0.7, 0.9, 1.2, 1.6), (3, 4, 6, 8, 10))
    fine, spread = fine_positions(radius, x)
    disc = (fine[:, None] ** 2 + fine**2 <= radius**2).to(x.dtype)
    kernel = spread @ disc @ spread.T
    return F.conv2d(mirror_pad(x, len(kernel) // 2).flatten(0, 1)[:, None], (kernel / kernel.sum())[None, None]).view(
        x.shape
    )


def glass_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Each pixel is fetched from a random place nearby, between two faint blurs."""
    shake = length(x, severity, (0.6, 0.8, 1.0, 1.25, 1.6), (1.0, 1.5, 2.0, 3.0, 4.0))
    offset = uniform((len(x), 2, *x.shape[2:]), x, generator) * 2 - 1
    return smooth(warp(smooth(x, 0.3 * shake), shake * offset), 0.3 * shake)


def motion_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """The mean along a line at an angle of each image's own, within 45 degrees of the horizontal."""
    reach = length(x, severity, (2.0, 2.5, 3.2, 4.0, 5.0), (10, 14, 18, 23, 28)) / 2
    angle = (uniform((len(x), 1, 1), x, generator) - 0.5) * (math.pi / 2)
    count = 2 * math.ceil(reach) + 1
    total = torch.zeros_like(x)
    for step in torch.linspace(-reach, reach, count).tolist():
        shift = torch.stack([angle.cos() * step, angle.sin() * step], 1)  # [B, 2, 1, 1]
        total += warp(x, shift.expand(-1, -1, *x.shape[2:]))
    return total / count


def zoom_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """The mean over a zoom into the middle of the image."""
    most = strength(x, severity, (0.06, 0.11, 0.16, 0.21, 0.26), (0.11, 0.16, 0.21, 0.26, 0.33))
    grid = pixel_grid(x)
    zooms = torch.linspace(0.0, most, 9).tolist()
    return sum(sample(x, grid / (1 + zoom)) for zoom in zooms) / len(zooms)  # type: ignore[return-value]
