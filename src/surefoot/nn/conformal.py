"""Split-conformal prediction: a threshold on scores of held-out examples that keeps a coverage promise exactly.

With calibration scores s_1..s_n (larger = stranger) exchangeable with the test score s, the threshold
q = the ceil((n + 1)(1 - alpha))-th smallest (+inf where that index exceeds n) gives P[s <= q] >= 1 - alpha, and at most
1 - alpha + 1/(n + 1) without ties. An interpolated quantile (the default of numpy and torch) falls short of the promise.

LAC sets (least ambiguous classifier; Sadinle, Lei, Wasserman 2019, arXiv 1609.00451): s(x, y) = 1 - p_y(x), and the set of
x is {y : 1 - p_y(x) <= q}. Source of the method: Vovk, Gammerman, Shafer 2005; Lei et al. 2018, arXiv 1604.04173.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from surefoot.errors import check, check_at_least, check_open_unit


def conformal_index(n: int, alpha: float) -> int:
    """ceil((n + 1)(1 - alpha)), counted from 1. n + 1 means: no finite threshold keeps the promise.

    Binary rounding must not turn an exact integer into the next one, hence the guard (it costs 1e-9 / n of coverage).
    """
    check_at_least("n", n, 1)
    check_open_unit("alpha", alpha)
    return max(1, math.ceil((n + 1) * (1.0 - alpha) - 1e-9))


def conformal_quantile(
    scores: Tensor,  # float [..., n], larger = stranger
    alpha: float,
) -> Tensor:  # float [...]
    """The split-conformal threshold over the last dimension: an order statistic, never interpolated; +inf if n is too small."""
    check(scores.is_floating_point() and scores.dim() >= 1, "scores must be a floating-point tensor [..., n].")
    check(scores.shape[-1] > 0, "scores are empty; give at least one calibration example.")
    check(not bool(torch.isnan(scores).any()), "scores hold NaN; a missing score must not enter the calibration.")
    index = conformal_index(scores.shape[-1], alpha)
    if index > scores.shape[-1]:
        return scores.new_full(scores.shape[:-1], math.inf)
    return scores.kthvalue(index, dim=-1).values


def lac_scores(
    probabilities: Tensor,  # float [N, K]
    y: Tensor,  # int64 [N]
) -> Tensor:  # float [N]
    """1 - p_y."""
    _check_probabilities(probabilities)
    check(y.dtype == torch.int64 and y.shape == probabilities.shape[:1], "y must hold one int64 label per row.")
    check(bool(((y >= 0) & (y < probabilities.shape[1])).all()), f"y must lie in [0, {probabilities.shape[1]}).")
    return 1.0 - probabilities.gather(1, y[:, None])[:, 0]


def lac_sets(
    probabilities: Tensor,  # float [N, K]
    threshold: float | Tensor,
) -> Tensor:  # bool [N, K]
    """{y : 1 - p_y <= threshold}. The same arithmetic as `lac_scores`, so that a tie is a member."""
    _check_probabilities(probabilities)
    return (1.0 - probabilities) <= threshold


def set_coverage(sets: Tensor, y: Tensor) -> Tensor:  # bool [N]
    """Whether each set (bool `[N, K]`) holds the label; the mean is the coverage."""
    return sets.gather(1, y[:, None])[:, 0]


def _check_probabilities(probabilities: Tensor) -> None:
    check(probabilities.dim() == 2, f"probabilities must be [N, K], got shape {tuple(probabilities.shape)}.")
    check(bool(((probabilities >= 0) & (probabilities <= 1 + 1e-5)).all()), "probabilities must lie in [0, 1] (and not be NaN); give softmax outputs.")  # fmt: skip
