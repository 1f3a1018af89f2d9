"""Scores of single training examples, read off a model's logits: how hard, how doubtful, how likely mislabelled.

With p = softmax(logits), e_y the one-hot label and the margin of a wrong class k written m_k = p_k - p_y:

    el2n     ||p - e_y||_2        in [0, sqrt 2]      (Paul, Ganguli, Dziugaite 2021, arXiv 2107.07075)
    error_l1 ||p - e_y||_1        in [0, 2]
    margins  max_k m_k            in [-1, 1]          or, summed, 1 - K p_y in [1 - K, 1]

All are larger for a more doubtful example. Logits may carry leading run dimensions; the labels then broadcast, and the mean
over runs is the mean *of the scores*, never the score of the mean probability.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from surefoot.errors import check, check_choice


def check_labels(
    logits: Tensor,  # [..., B, K]
    y: Tensor,  # int64 [B]
) -> None:
    """One clear sentence for logits and labels that do not belong together."""
    check(logits.dim() >= 2 and logits.is_floating_point(), f"logits must be floating point [..., B, K], got {tuple(logits.shape)} {logits.dtype}.")  # fmt: skip
    check(y.dtype == torch.int64 and y.dim() == 1, f"y must be int64 class indices [B], got {tuple(y.shape)} {y.dtype}.")  # fmt: skip
    rows, classes = logits.shape[-2:]
    check(len(y) == rows, f"y has {len(y)} labels for {rows} rows of logits.")
    check(len(y) == 0 or bool((y.min() >= 0) & (y.max() < classes)), f"y must lie in [0, {classes}), the width of the logits.")  # fmt: skip
    finite = torch.isfinite(logits).all(-1)
    check(bool(finite.all()), f"logits are not finite in row {int((~finite).nonzero()[0, -1]) if not finite.all() else -1}.")  # fmt: skip


def _errors(logits: Tensor, y: Tensor) -> Tensor:
    """p - onehot(y), of the shape of the logits."""
    check_labels(logits, y)
    index = y.expand(logits.shape[:-1]).unsqueeze(-1)
    p = logits.softmax(-1)
    return p.scatter_add(-1, index, p.new_full((), -1.0).expand(index.shape))


def el2n(
    logits: Tensor,  # [..., B, K]
    y: Tensor,  # int64 [B]
) -> Tensor:  # [..., B]
    """The norm of the error vector, ||softmax(logits) - onehot(y)||_2."""
    return torch.linalg.vector_norm(_errors(logits, y), dim=-1)


def error_l1(
    logits: Tensor,  # [..., B, K]
    y: Tensor,  # int64 [B]
) -> Tensor:  # [..., B]
    """||softmax(logits) - onehot(y)||_1 = 2 (1 - p_y)."""
    return _errors(logits, y).abs().sum(-1)


def margins(
    logits: Tensor,  # [..., B, K]
    y: Tensor,  # int64 [B]
    *,
    reduce: Literal["max", "sum"] = "max",
) -> Tensor:  # [..., B]
    """Probability margins, wrong minus right: of the strongest wrong class, or summed over all of them."""
    check_choice("reduce", reduce, ("max", "sum"))
    check_labels(logits, y)
    p = logits.softmax(-1)
    index = y.expand(logits.shape[:-1]).unsqueeze(-1)
    right = p.gather(-1, index).squeeze(-1)
    if reduce == "sum":
        return 1 - logits.shape[-1] * right
    return p.scatter(-1, index, -torch.inf).amax(-1) - right
