"""What the mixture inherits from its robust base: L2 radii within which no accurate base whatever can change the class.

f's class is h's wherever p1 - p2 >= (1 - a)/a, since g moves at most (1 - a) of the probability. With a the weight, or the lower
end of its range, and p1, p2 h's top two probabilities, f keeps that class within

    lipschitz  r = max(0, a (p1 - p2) + a - 1) / (2 a L)                      every p_i is L-Lipschitz
    rs         r = sigma/2 [Phi^-1(a p1) - Phi^-1(a p2 + 1 - a)]               h smoothed with N(0, sigma^2 I)
    tight      Phi(Phi^-1(p1) - r/sigma) - Phi(Phi^-1(p2) + r/sigma) = (1 - a)/a

`tight` is not in the paper: it follows at once from Phi^-1(p_i) being 1/sigma-Lipschitz (Salman et al. 2019, arXiv 1906.04584) and is
never below the others. A radius is zero unless the margin holds at x itself, so that where it is positive f and h agree.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.special import ndtr, ndtri

from surefoot.errors import check, check_at_least, check_choice, check_open_unit, check_positive
from surefoot.nn.smoothing import (
    ABSTAIN,
    Certificates,
    check_deterministic,
    lower_confidence_bound,
    upper_confidence_bound,
    vote_counts,
)

Method = Literal["tight", "rs", "lipschitz"]
FARTHEST = 64.0  # in sigma: beyond Phi^-1 of any float64 probability


def required_margin(alpha: float) -> float:
    """The margin p1 - p2 at which h alone decides the mixture's class: (1 - a)/a."""
    _check_weight(alpha)
    return (1.0 - alpha) / alpha


def _check_weight(alpha: float) -> None:
    check(0.5 <= alpha <= 1, f"A certificate needs alpha in [1/2, 1], got {alpha!r}; below 1/2 the accurate base alone can decide.")  # fmt: skip


def mixed_radius(
    p_top: Tensor | float,  # [...], lower bounds
    p_second: Tensor | float,  # [...], upper bounds; never more than 1 - p_top counts
    alpha: float,
    *,
    lipschitz: float | None = None,
    sigma: float | None = None,
    method: Method | None = None,
) -> Tensor:  # float64 [...]
    """L2 radius of the mixture; `method` is "tight" where `sigma` is given and "lipschitz" where `lipschitz` is.

    "lipschitz" with `sigma` uses 1/(sigma sqrt(2 pi)), the constant of smoothed functions into [0, 1]; the paper's sqrt(2/pi)/sigma,
    twice that, is for functions into [-1, 1].
    """
    _check_weight(alpha)
    check((lipschitz is None) != (sigma is None), "Give exactly one of lipschitz and sigma.")
    method = method or ("tight" if lipschitz is None else "lipschitz")
    check_choice("method", method, ("tight", "rs", "lipschitz"))
    check(method == "lipschitz" or sigma is not None, f"method={method!r} is for a smoothed base; give sigma.")
    first, second = (torch.as_tensor(p, dtype=torch.float64) for p in (p_top, p_second))
    for name, p in (("p_top", first), ("p_second", second)):
        check(bool(((p >= 0) & (p <= 1)).all()), f"{name} must hold probabilities in [0, 1].")
    second = torch.minimum(second, 1.0 - first)
    if method == "lipschitz":
        constant = lipschitz if sigma is None else 1.0 / (sigma * math.sqrt(2 * math.pi))
        check_positive("lipschitz", constant or 0.0)
        return (alpha * (first - second) + alpha - 1).clamp_min(0.0) / (2 * alpha * (constant or 1.0))
    assert sigma is not None
    check_positive("sigma", sigma)
    if method == "rs":
        return (0.5 * sigma * (ndtri(alpha * first) - ndtri(alpha * second + 1 - alpha))).clamp_min(0.0)
    return sigma * _tight(first, second, required_margin(alpha))


def _tight(first: Tensor, second: Tensor, margin: float) -> Tensor:
    """The root by bisection, from below, in units of sigma: at what is returned the margin still holds."""
    a, b = torch.broadcast_tensors(ndtri(first), ndtri(second))

    def holds(r: Tensor) -> Tensor:
        return ndtr(a - r) - ndtr(b + r) >= margin

    low, high = torch.zeros_like(a), torch.full_like(a, FARTHEST)
    endless = holds(high)  # h is certain, and nothing is asked of it or its rival is impossible
    for _ in range(70):
        middle = (low + high) / 2
        good = holds(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(endless, torch.inf, low)


def certify_mixed(
    robust: nn.Module,
    x: Tensor,  # float [B, ...], raw scale
    *,
    alpha: float,  # the weight, or the lower end of an adaptive one's range
    sigma: float,
    num_classes: int,
    generator: torch.Generator,
    n0: int = 100,
    n: int = 10_000,
    level: float = 0.001,
    method: Method = "tight",
    batch_size: int | None = None,
) -> Certificates:
    """Class and L2 radius of f = ln((1 - a) softmax(g) + a h), h the vote shares of `robust` under N(0, sigma^2 I), for every g.

    n0 draws choose the class; n fresh ones bound its share from below at level/2 and every other share from above at level/2
    together, so that a certificate is wrong with probability at most `level`. `p_lower` is the bound on the top share. It
    abstains where the radius is zero, which says nothing about f's class.
    """
    _check_weight(alpha)
    check_at_least("n0", n0, 1)
    check_at_least("n", n, 1)
    check_open_unit("level", level)
    check_deterministic(robust, x)
    options = {"sigma": sigma, "num_classes": num_classes, "generator": generator, "batch_size": batch_size}
    chosen = vote_counts(robust, x, n0, **options).argmax(1)
    counts = vote_counts(robust, x, n, **options)
    top = lower_confidence_bound(counts.gather(1, chosen[:, None])[:, 0], n, level / 2)
    others = upper_confidence_bound(counts, n, level / 2 / (num_classes - 1)).scatter(1, chosen[:, None], 0.0)
    radius = mixed_radius(top, others.amax(1), alpha, sigma=sigma, method=method)
    return Certificates(torch.where(radius > 0, chosen, ABSTAIN), radius, top, torch.full_like(chosen, n0 + n))
