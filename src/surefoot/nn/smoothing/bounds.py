"""Confidence bounds of a probability from votes, the two-sided test of the top two classes, and the radius they give."""

from __future__ import annotations

import numpy as np
import torch
from scipy import special
from torch import Tensor

from surefoot.errors import check, check_open_unit, check_positive


def lower_confidence_bound(
    count: Tensor,  # int [...]
    n: int | Tensor,
    alpha: float,
) -> Tensor:  # float64 [...], on the CPU
    """Clopper-Pearson: p_low = BetaInv(alpha; k, n - k + 1), 0 for k = 0; P[p < p_low] <= alpha, one-sided."""
    k, total = _counts(count, n, alpha)
    inner = special.betaincinv(np.maximum(k, 1.0), total - k + 1.0, alpha)
    return torch.from_numpy(np.asarray(np.where(k == 0, 0.0, inner)))


def upper_confidence_bound(
    count: Tensor,  # int [...]
    n: int | Tensor,
    alpha: float,
) -> Tensor:  # float64 [...], on the CPU
    """Clopper-Pearson: p_up = BetaInv(1 - alpha; k + 1, n - k), 1 for k = n; P[p > p_up] <= alpha, one-sided."""
    k, total = _counts(count, n, alpha)
    return 1.0 - lower_confidence_bound(torch.from_numpy(np.asarray(total - k)), torch.from_numpy(total), alpha)


def smoothing_radius(p_lower: Tensor, sigma: float) -> Tensor:
    """sigma Phi^-1(p) where p > 1/2, else 0."""
    check_positive("sigma", sigma)
    p = p_lower.double()
    return torch.where(p > 0.5, sigma * torch.special.ndtri(p.clamp(0.5, 1.0)), 0.0)


def binomial_p_value(top: Tensor, runner_up: Tensor) -> Tensor:  # float64, on the CPU
    """Two-sided p-value of `top` successes in `top + runner_up` fair coin tosses, top >= runner_up."""
    k, rest = (np.asarray(t.cpu().double().numpy()) for t in (top, runner_up))
    tail = special.betainc(np.maximum(k, 1.0), rest + 1.0, 0.5)  # P[X >= k]
    return torch.from_numpy(np.asarray(np.where(k == 0, 1.0, np.minimum(1.0, 2.0 * tail))))


def _counts(count: Tensor, n: int | Tensor, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    check_open_unit("alpha", alpha)
    k = torch.as_tensor(count).cpu().double()
    total = torch.as_tensor(n).cpu().double().expand_as(k)
    check(bool((total >= 1).all()), f"n must be an integer of at least 1, got {n!r}.")
    check(bool(((k >= 0) & (k <= total)).all()), "counts must lie between 0 and n.")
    return np.asarray(k.numpy()), np.asarray(total.numpy()).copy()
