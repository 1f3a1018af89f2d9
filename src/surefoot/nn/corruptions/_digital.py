"""Digital: contrast, colour, elastic displacement, and what files do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from surefoot.nn.corruptions._jpeg import LUMA, jpeg
from surefoot.nn.corruptions._pieces import cell_means, length, normal, side, smooth, strength, warp


def contrast(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    keep = strength(x, severity, (0.75, 0.50, 0.40, 0.30, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05))
    mean = x.mean((2, 3), keepdim=True)
    return mean + keep * (x - mean)


def saturate(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Stronger colours: the distance of each channel from the luma grows."""
    factor = (1.5, 2.0, 3.0, 5.0, 10.0)[severity - 1]
    luma = (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    return luma + factor * (x - luma)


def elastic_transform(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Each point moves by a smooth random field; severity is the root mean square of the move."""
    move = length(x, severity, (0.45, 0.65, 0.85, 1.1, 1.4), (2.5, 3.5, 4.5, 6.0, 8.0))
    noise = normal((len(x), 2, *x.shape[2:]), x, generator)
    field = smooth(noise, max(side(x), 16) / 16)
    return warp(x, move * field / field.square().mean((1, 2, 3), keepdim=True).sqrt())


def pixelate(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Fewer pixels: the mean over cells of k x k; a cell side between two integers mixes both."""
    cell = strength(x, severity, (1.25, 1.4, 1.6, 1.8, 2.2), (1.7, 2.0, 2.5, 3.3, 4.0))
    return torch.lerp(cell_means(x, math.floor(cell)), cell_means(x, math.floor(cell) + 1), cell % 1)


def jpeg_compression(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    return jpeg(x, round(strength(x, severity, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7))))
