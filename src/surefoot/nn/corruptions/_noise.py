"""Noise: of the sensor, of counting, of broken pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from surefoot.nn.corruptions._pieces import normal, strength, uniform


def gaussian_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    sigma = strength(x, severity, (0.04, 0.06, 0.08, 0.10, 0.12), (0.08, 0.12, 0.18, 0.26, 0.38))
    return x + sigma * normal(x.shape, x, generator)


def shot_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Counting noise: Poisson(photons x) / photons."""
    photons = strength(x, severity, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3))
    counts = torch.poisson((x.clamp_min(0) * photons).to(generator.device), generator=generator).to(x.device)
    return counts / photons


def impulse_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Salt and pepper on a share of the values."""
    share = strength(x, severity, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27))
    lot = uniform(x.shape, x, generator)
    return torch.where(lot < share / 2, 0.0, torch.where(lot > 1 - share / 2, 1.0, x))


def speckle_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Noise in proportion to the value."""
    sigma = strength(x, severity, (0.06, 0.10, 0.12, 0.16, 0.20), (0.15, 0.20, 0.35, 0.45, 0.60))
    return x + x * sigma * normal(x.shape, x, generator)
