"""The noise grid, how fine it is along the training, and the rate of the target network's moving average."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from surefoot.errors import check, check_at_least, check_open_unit, check_positive


def karras_sigmas(n: int, tmin: float = 0.002, tmax: float = 80.0, rho: float = 7.0) -> Tensor:  # float64 [n]
    """Noise levels from tmax (i = 0) down to tmin (i = n - 1): equal steps in t^(1/rho)."""
    check_at_least("n", n, 2)
    check_positive("tmin", tmin)
    check_positive("rho", rho)
    check(tmin < tmax, f"tmin must be smaller than tmax, got {tmin!r} and {tmax!r}.")
    share = torch.arange(n, dtype=torch.float64) / (n - 1)
    return (tmax ** (1 / rho) + share * (tmin ** (1 / rho) - tmax ** (1 / rho))) ** rho


def nearest_time(
    grid: Tensor,  # [N], noise levels on [-1, 1] pixels
    sigma: float,
) -> float:
    """The grid point nearest to 2 sigma: smoothing noise sigma on [0, 1] pixels is t = 2 sigma on [-1, 1] pixels."""
    check_positive("sigma", sigma)
    low, high = float(grid.min()), float(grid.max())
    check(low <= 2 * sigma <= high, f"sigma must lie in [{low / 2:g}, {high / 2:g}] (half the noise grid), got {sigma!r}.")  # fmt: skip
    return float(grid[(grid - 2 * sigma).abs().argmin()])


@dataclass(frozen=True)
class RRCMSchedule:
    """How the grid refines and the target slows down over K = `total_steps` steps.

    N(k) = min(start 2^ceil(k/K'), end) + 1 with K' = ceil(K / log2(ceil(end/start) + 1)). The target's rate goes from
    `ema_start` to `ema_end` along c = 2/(1 + exp(-15 (e - ema_start)/(ema_end - ema_start))) - 1, rate = c ema_end +
    (1 - c) ema_start, e(k) = sqrt(k/K (ema_end^2 - ema_start^2) + ema_start^2). Published: 20, 80, .99, .9999 for 300,000
    steps; a run of hundreds of steps needs smaller rates, or the target never leaves its initial weights.
    """

    total_steps: int
    start_scales: int = 20
    end_scales: int = 80
    ema_start: float = 0.99
    ema_end: float = 0.9999

    def __post_init__(self) -> None:
        check_at_least("total_steps", self.total_steps, 1)
        check_at_least("start_scales", self.start_scales, 1)
        check_at_least("end_scales", self.end_scales, self.start_scales)
        check_open_unit("ema_start", self.ema_start)
        check_open_unit("ema_end", self.ema_end)
        check(self.ema_start < self.ema_end, f"ema_start must be below ema_end, got {self.ema_start} and {self.ema_end}.")  # fmt: skip

    def num_scales(self, step: int) -> int:
        """N(k): the number of grid points at step k, at least 2."""
        doublings = math.log2(math.ceil(self.end_scales / self.start_scales) + 1)
        period = math.ceil(self.total_steps / doublings)
        return min(self.start_scales * 2 ** math.ceil(step / period), self.end_scales) + 1

    def target_rate(self, step: int) -> float:
        """The share of the old target kept at step k."""
        low, high = self.ema_start, self.ema_end
        e = math.sqrt(step / self.total_steps * (high**2 - low**2) + low**2)
        c = 2.0 / (1.0 + math.exp(-15.0 * (e - low) / (high - low))) - 1.0
        return c * high + (1.0 - c) * low
