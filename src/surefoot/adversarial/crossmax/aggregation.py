"""CrossMax over predictors, its ties, and the smooth stand-in that an adaptive attack uses."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from surefoot.errors import InvalidInput, check, check_at_least

Rank = int | Literal["median"]


@overload
def crossmax(logits: Tensor, *, k: Rank = ..., dim: int = ..., return_ties: Literal[False] = ...) -> Tensor: ...
@overload
def crossmax(logits: Tensor, *, k: Rank = ..., dim: int = ..., return_ties: Literal[True]) -> tuple[Tensor, Tensor]: ...
def crossmax(
    logits: Tensor,  # [B, N, K] logits (not probabilities) of N predictors; or N at `dim`, classes last
    *,
    k: Rank = "median",
    dim: int = 1,
    return_ties: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # [B, K], all <= 0; bool [B]
    """The median (of an even number: mean of the middle two) or the `k`-th largest over predictors, after both subtractions.

    Needs three predictors: of two, each is half of the median. k = 1 gives ties (some predictor holds 0 for every class), k = N
    lets one predictor veto. `return_ties` says where the best class is not alone, in 2 of a hundred random draws of 8
    predictors and ten classes with k = 3, and always where all predictors agree exactly: the classes are ranked by disagreement alone.
    """
    check(logits.dim() >= 2 and logits.is_floating_point(), f"logits must be floating [B, N, K], got {list(logits.shape)}.")  # fmt: skip
    dim = dim % logits.dim()
    check(dim != logits.dim() - 1, "dim names the predictors; the classes come last.")
    count = logits.shape[dim]
    if count < 3:
        raise InvalidInput(f"CrossMax needs at least 3 predictors, got {count}; add layers or models.")
    if k != "median":
        check_at_least("k", k, 1)
        check(k <= count, f"k must not exceed the {count} predictors, got {k}.")
    z = logits - logits.amax(-1, keepdim=True)
    z = z - z.amax(dim, keepdim=True)
    if k == "median":
        top = z.topk(count // 2 + 1, dim).values
        last = top.narrow(dim, count // 2, 1)
        values = (last if count % 2 else (last + top.narrow(dim, count // 2 - 1, 1)) / 2).squeeze(dim)
    else:
        values = z.topk(k, dim).values.select(dim, k - 1)
    if not return_ties:
        return values
    best = values.amax(-1, keepdim=True)
    return values, (values == best).sum(-1) > 1


def break_ties(
    values: Tensor,  # [B, K] from crossmax
    logits: Tensor,  # [B, N, K]
    *,
    dim: int = 1,
) -> Tensor:  # [B, K]
    """Among classes that share the largest value, the one of greatest mean log-probability keeps it; the rest lose the least
    amount that changes the order. Not in the paper; without it argmax takes the first of them."""
    best = values == values.amax(-1, keepdim=True)
    mean = mean_log_probs(logits, dim=dim)
    winner = torch.where(best, mean, -torch.inf).argmax(-1, keepdim=True)
    loses = best.scatter(-1, winner, False)
    step = torch.finfo(values.dtype).eps * (1 + values.abs())
    return torch.where(loses, values - step, values)


def mean_log_probs(logits: Tensor, *, dim: int = 1) -> Tensor:  # [B, K]
    """Mean log-softmax over predictors: the plain ensemble, and the smooth surrogate of CrossMax for an attack."""
    return logits.log_softmax(-1).mean(dim)
