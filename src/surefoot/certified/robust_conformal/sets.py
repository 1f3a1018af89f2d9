"""Thresholds and sets: the quantile of the calibration means, and what the finite sample and the attack cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from surefoot.certified.robust_conformal.scores import SmoothedScores, check_scores, level_of_two_betas
from surefoot.errors import check, check_at_least, check_choice, check_non_negative, check_open_unit
from surefoot.nn.conformal import conformal_quantile

Bound = Literal["bernstein", "hoeffding", "both", "none"]
BOUNDS = ("bernstein", "hoeffding", "both", "none")


@dataclass(frozen=True)
class PredictionSets:
    """Which labels each of N examples keeps, with the numbers that decided."""

    mask: Tensor  # bool [N, K]
    scores: Tensor  # float64 [N, K], Monte-Carlo means
    lower: Tensor  # float64 [N, K], lower bound of the smoothed score of the input as given

    @property
    def sizes(self) -> Tensor:  # int64 [N]
        return self.mask.sum(1)


def hoeffding_slack(n: int, beta: float) -> float:
    """sqrt(ln(1/beta) / (2n)): the mean of n scores in [0, 1] is that far from its expectation, on one side, at most beta of the time."""
    check_at_least("n", n, 1)
    check_open_unit("beta", beta)
    return math.sqrt(math.log(1.0 / beta) / (2 * n))


def bernstein_slack(variance: Tensor | float, n: int, beta: float) -> Tensor:  # float64 [...]
    """sqrt(2 V ln(2/beta) / n) + 7 ln(2/beta) / (3 (n - 1)), one side, V the unbiased sample variance.

    ln(2/beta), not ln(1/beta): half of beta pays for V, which is estimated too. Below Hoeffding's at n = 256 only if V < .0366.
    """
    check_at_least("n", n, 2)
    check_open_unit("beta", beta)
    log = math.log(2.0 / beta)
    spread = (torch.as_tensor(variance, dtype=torch.float64) * (2.0 * log / n)).sqrt()
    return spread + 7.0 * log / (3.0 * (n - 1))


def calibrate(
    true_means: Tensor,  # float64 [n], smoothed scores of the true labels of clean calibration examples
    *,
    alpha: float = 0.1,
    beta: float = 0.001,
    bound: Bound = "bernstein",
) -> float:
    """The ceil((n + 1)(1 - alpha + 2 beta))-th smallest; +inf (full sets) if n is too small; without bounds at level 1 - alpha."""
    check_choice("bound", bound, BOUNDS)
    check_open_unit("alpha", alpha)
    check(not bool(torch.isnan(true_means).any()), "scores hold NaN; a missing score must not enter the calibration.")
    check_scores(true_means)
    level = alpha if bound == "none" else level_of_two_betas(alpha, beta)
    return conformal_quantile(true_means.double(), level).item()


def robust_sets(
    scores: SmoothedScores,
    threshold: float,
    *,
    eps: float,
    sigma: float,
    beta: float = 0.001,
    bound: Bound = "bernstein",
) -> PredictionSets:
    """The labels that no attack of size eps can have pushed out; `bound="none"` is RSCP, without a guarantee.

    "both" takes the smaller of the two slacks for the test score, each at beta/2. With eps = sigma = 0 and no bound these are the
    plain split-conformal sets.
    """
    check_choice("bound", bound, BOUNDS)
    shift = noise_ratio(eps, sigma)
    check(
        threshold >= 0, f"threshold must be a score, or infinity for full sets, got {threshold!r}."
    )  # NaN too: it would empty every set
    up = 0.0 if bound == "none" or sigma == 0 else hoeffding_slack(scores.n, beta)
    lower = (scores.mean - _low_slack(scores, sigma, beta, bound)).clamp(min=0.0)
    upper = min(threshold + up, 1.0)
    if shift == 0:
        return PredictionSets(lower <= upper, scores.mean, lower)
    # -inf (a score bounded by 0) is always included, +inf only by a threshold of 1; both follow from IEEE comparison
    reach = torch.special.ndtri(lower) - shift
    return PredictionSets(reach <= torch.special.ndtri(torch.tensor(upper, dtype=torch.float64)), scores.mean, lower)


def noise_ratio(eps: float, sigma: float) -> float:
    """eps / sigma, 0 for eps = sigma = 0."""
    check_non_negative("eps", eps)
    check_non_negative("sigma", sigma)
    check(
        sigma > 0 or eps == 0, f"sigma = 0 adds no noise and gives no protection; it needs eps = 0, got eps = {eps:g}."
    )
    return eps / sigma if eps > 0 else 0.0


def _low_slack(scores: SmoothedScores, sigma: float, beta: float, bound: Bound) -> Tensor | float:
    if bound == "none" or sigma == 0:
        return 0.0
    if bound == "hoeffding":
        return hoeffding_slack(scores.n, beta)
    if bound == "bernstein":
        return bernstein_slack(scores.variance, scores.n, beta)
    return bernstein_slack(scores.variance, scores.n, beta / 2).clamp(max=hoeffding_slack(scores.n, beta / 2))
