"""Base scores, the post-training transformation, and their averages over Gaussian noise.

Scores are strange when large and lie in [0, 1]; the Monte-Carlo corrections hold for nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from surefoot.errors import (  # fmt: skip
    InvalidInput,
    check,
    check_at_least,
    check_choice,
    check_non_negative,
    check_open_unit,
    check_positive,
)
from surefoot.nn.modes import evaluating
from surefoot.nn.smoothing import noisy_batches

Score = Literal["hps", "aps"]
MEMORY = 2**22  # probabilities held at a time while averaging


def hps_score(probs: Tensor) -> Tensor:  # float [..., K] -> float [..., K]
    """Homogeneous prediction sets: 1 - p_y for every label y."""
    _check_probs(probs)
    return (1.0 - probs).clamp_(min=0.0)


def aps_score(
    probs: Tensor,  # float [..., K]
    u: Tensor,  # float [...], broadcasting over the leading dimensions: uniform in [0, 1], one per *example*
) -> Tensor:  # float [..., K]
    """Adaptive prediction sets: the sum of the larger probabilities + u p_y. Ties count in the order of the labels.

    u is one number for all labels and all noise draws of an example, else the score of a label is not one random variable.
    """
    _check_probs(probs)
    check(bool(((u >= 0) & (u <= 1)).all()), "u must lie in [0, 1].")
    ordered, order = torch.sort(probs, dim=-1, descending=True, stable=True)
    above = ordered.cumsum(-1).sub_(ordered)
    return torch.empty_like(probs).scatter_(-1, order, above.addcmul_(ordered, u[..., None])).clamp_(0.0, 1.0)


@dataclass(frozen=True)
class PostTrainingTransform:
    """PTT: Q(s) = 1 / (1 + exp(-(rank(s) - bias) / temperature)), rank(s) = share of held-out scores <= s.

    Monotone, so that a larger score stays at least as large; in [0, 1]. It goes inside the average over noise: applied to
    the average it would change nothing but the slack.
    """

    holdout: Tensor  # float64 [H], ascending
    temperature: float = 1 / 400
    bias: float = 0.9

    @classmethod
    def fit(cls, holdout_scores: Tensor, *, temperature: float = 1 / 400, bias: float = 0.9) -> PostTrainingTransform:
        """`holdout_scores` `[H]`: scores of the true labels of examples that are neither calibration nor test, one noise draw each.

        `bias` is where it is steepest; 1 - alpha is the natural choice.
        """
        check_positive("temperature", temperature)
        check_open_unit("bias", bias)
        check(holdout_scores.dim() == 1 and len(holdout_scores) > 0, "holdout_scores must be a list of at least one score.")  # fmt: skip
        check_scores(holdout_scores)
        return cls(holdout_scores.double().sort().values, temperature, bias)

    def __call__(self, scores: Tensor) -> Tensor:  # float [...] -> float64 [...]
        holdout = self.holdout.to(scores.device)
        rank = torch.searchsorted(holdout, scores.double().contiguous(), right=True).double() / len(holdout)
        return torch.sigmoid((rank - self.bias) / self.temperature)


@dataclass(frozen=True)
class SmoothedScores:
    """Means of n scores of every example and label, with the unbiased variance of those scores."""

    mean: Tensor  # float64 [N, K]
    variance: Tensor  # float64 [N, K]
    n: int

    def take(self, index: Tensor | slice) -> SmoothedScores:
        return SmoothedScores(self.mean[index], self.variance[index], self.n)


def noisy_probabilities(
    model: nn.Module,
    x: Tensor,  # float [N, ...], raw scale
    n: int,
    *,
    sigma: float,
    generator: torch.Generator,
    batch_size: int | None = None,
) -> Tensor:  # float64 [N, n, K], on the CPU
    """Softmax outputs at n noisy draws of each input; sigma = 0 gives one exact draw (`[N, 1, K]`).

    Noise is drawn once per example and draw and shared by all labels. Probabilities are formed in float64: in float32, 1 - p
    of a confident network is mostly rounding.
    """
    check_non_negative("sigma", sigma)
    check_at_least("n", n, 1)
    check(x.is_floating_point() and x.dim() >= 2 and len(x) > 0, "x must be a floating-point batch [N, ...] of at least one input.")  # fmt: skip
    check(bool(torch.isfinite(x).all()), "x holds NaN or infinite values; clean the data first.")
    draws = n if sigma > 0 else 1
    rows = []
    with evaluating(model), torch.inference_mode():
        if sigma > 0:
            batches = (z for _, z in noisy_batches(x, n, sigma=sigma, generator=generator, batch_size=batch_size))
        else:
            batches = iter(x.split(batch_size or 512))
        for z in batches:
            logits = model(z.clone() if sigma == 0 else z)
            check(isinstance(logits, Tensor), f"The model must give logits [N, K], got {type(logits).__name__}.")
            rows.append(logits.cpu().double().softmax(-1))
    probs = torch.cat(rows).clone()
    if probs.dim() != 2 or not bool(torch.isfinite(probs).all()):
        raise InvalidInput(f"The model must give finite logits [N, K]; it gave {'NaN' if probs.dim() == 2 else list(probs.shape)}.")  # fmt: skip
    return probs.view(len(x), draws, -1)


def smooth_scores(
    probs: Tensor,  # float [N, n, K]
    *,
    score: Score = "hps",
    u: Tensor | None = None,  # float [N], for "aps"
    transform: PostTrainingTransform | None = None,
) -> SmoothedScores:
    """Mean and variance over the draws of Q(s(x + sigma e, y)), for every label."""
    check_choice("score", score, ("hps", "aps"))
    check(probs.dim() == 3 and probs.shape[1] > 0, f"probs must be [N, n, K], got {list(probs.shape)}.")
    step = max(1, MEMORY // max(probs[0].numel(), 1))
    parts = []
    for start in range(0, len(probs), step):
        part = probs[start : start + step].double()
        scores = (
            hps_score(part) if score == "hps" else aps_score(part, _uniform(u, len(probs))[start : start + step, None])
        )
        scores = scores if transform is None else transform(scores)
        parts.append(_average(scores))  # in [0, 1] by construction
    mean, variance = torch.cat([p.mean for p in parts]), torch.cat([p.variance for p in parts])
    return SmoothedScores(mean, variance, probs.shape[1])


def average_scores(scores: Tensor) -> SmoothedScores:  # float64 [N, n, K]
    """Mean and unbiased variance over the draws. Scores outside [0, 1] are refused: no bound here holds for them."""
    check_scores(scores)
    return _average(scores)


def _average(scores: Tensor) -> SmoothedScores:
    mean = scores.mean(1)
    return SmoothedScores(mean, scores.var(1) if scores.shape[1] > 1 else torch.zeros_like(mean), scores.shape[1])


def true_label(scores: Tensor, y: Tensor) -> Tensor:  # [..., K], int64 [...] -> [...]
    """Each example's entry at its label."""
    check(y.dtype == torch.int64 and y.shape == scores.shape[:1], "y must hold one int64 label per example.")
    check(bool(((y >= 0) & (y < scores.shape[-1])).all()), f"y must lie in [0, {scores.shape[-1]}).")
    return scores.gather(-1, y.view(-1, *[1] * (scores.dim() - 1)).expand(*scores.shape[:-1], 1))[..., 0]


def _uniform(u: Tensor | None, count: int) -> Tensor:
    if u is None:
        raise InvalidInput('score="aps" needs u, one uniform number per example.')
    check(u.shape == (count,), f"u must hold one number per example ({count}), got shape {list(u.shape)}.")
    return u.double()


def _check_probs(probs: Tensor) -> None:
    check(probs.is_floating_point() and probs.dim() >= 1, "probs must be floating-point probabilities [..., K].")
    check(bool(((probs >= 0) & (probs <= 1 + 1e-5)).all()), "probs must lie in [0, 1] (and not be NaN); give softmax outputs.")  # fmt: skip


def check_scores(scores: Tensor) -> None:
    inside = bool(((scores >= 0) & (scores <= 1)).all())
    check(
        inside, "Scores must lie in [0, 1], or the Monte-Carlo corrections do not hold; rescale them (RAPS exceeds 1)."
    )


def uniforms(count: int, generator: torch.Generator) -> Tensor:
    """One u per example, float64 on the CPU."""
    return torch.rand(count, dtype=torch.float64, device=generator.device, generator=generator).cpu()


def level_of_two_betas(alpha: float, beta: float) -> float:
    """alpha - 2 beta, the miscoverage left for the quantile after both Monte-Carlo events are paid."""
    check_open_unit("alpha", alpha)
    check_open_unit("beta", beta)
    check(2 * beta < alpha, f"2 beta = {2 * beta:g} must be smaller than alpha = {alpha:g}, or nothing is left for the quantile.")  # fmt: skip
    return math.fsum((alpha, -beta, -beta))
