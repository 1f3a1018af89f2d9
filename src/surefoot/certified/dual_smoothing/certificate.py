"""The certificate of two halves: radius (A + B) / sqrt(1/sigma_l^2 + 1/sigma_r^2), and what is kept of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from surefoot.errors import check, check_positive
from surefoot.nn.smoothing import Certificates


@dataclass(frozen=True)
class DualCertificate:
    """What dual smoothing guarantees for each of B inputs. All tensors are on the CPU."""

    prediction: Tensor  # int64 [B], ABSTAIN (-1) where nothing is certified
    radius: Tensor  # float64 [B], L2, 0 where nothing is certified
    p_left: Tensor  # float64 [B], lower bound of the left half's probability of the chosen class, level alpha/2
    p_right: Tensor  # float64 [B]
    abstained: Tensor  # bool [B]


def dual_radius(
    p_left: Tensor | float,
    p_right: Tensor | float,
    sigma_left: float,
    sigma_right: float | None = None,
) -> Tensor:  # float64 [...]
    """R = (Phi^-1(a) + Phi^-1(b)) / sqrt(1/sigma_l^2 + 1/sigma_r^2) where positive, else 0 (abstain).

    Not sqrt(r_l^2 + r_r^2), which is larger and broken by an attack; a half below 1/2 is not clipped at 0.
    """
    check_positive("sigma_left", sigma_left)
    sigma_right = sigma_left if sigma_right is None else sigma_right
    check_positive("sigma_right", sigma_right)
    a, b = (torch.as_tensor(p, dtype=torch.float64) for p in (p_left, p_right))
    for p in (a, b):
        check(bool(((p >= 0) & (p <= 1)).all()), "Probabilities must lie in [0, 1].")
    reach = torch.special.ndtri(a) + torch.special.ndtri(b)  # NaN for (0, 1): nothing is known, abstain
    return torch.where(reach > 0, reach / math.hypot(1.0 / sigma_left, 1.0 / sigma_right), 0.0)


def as_certificates(dual: DualCertificate, draws: int = 0) -> Certificates:
    """The same certificates in the shape of plain smoothing's; `p_lower` is the mean of the two bounds (half of G's)."""
    p = (dual.p_left + dual.p_right) / 2
    return Certificates(dual.prediction, dual.radius, p, torch.full_like(dual.prediction, draws))
