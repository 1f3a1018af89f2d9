"""Classification losses that tolerate wrong labels, written from their definitions, and what all losses of this family share.

With logits f `[B, K]`, labels y `[B]`, p = softmax(f), margins c and d_k = f_k - f_y + c [k != y]; `reduction` as in torch:

    mae         2 - 2 p_y                                          Ghosh, Kumar, Sastry 2017, arXiv 1712.09482
    gce         (1 - p_y^q) / q                                    Zhang, Sabuncu 2018, arXiv 1805.07836
    sce         alpha CE - beta A (1 - p_y)   (log 0 := A < 0)     Wang et al. 2019, arXiv 1908.06112
    rll         log((a+1)/a) - log(a + p_y) + mean_{k!=y} log(a + p_k)   Patel, Sastry 2021, arXiv 2107.09957
    nce_rce     alpha log p_y / sum_k log p_k - beta A (1 - p_y)   Ma et al. 2020, arXiv 2006.13554
    js          [w KL(e_y||m) + (1-w) KL(p||m)] / Z,  m = w e_y + (1-w) p,  Z = -(1-w) log(1-w)   Englesson, Azizpour 2021, arXiv 2105.04522
    cs          max_k d_k                                          Crammer, Singer 2001
    ww          sum_{k!=y} max(0, d_k)                             Weston, Watkins 1999
    bootstrap   -sum_k (w [k=y] + (1-w) p_k) log p_k               Reed et al. 2015, arXiv 1412.6596 (soft)
    smoothing   cross-entropy with label smoothing                 Szegedy et al. 2016, arXiv 1512.00567

mae and rll are symmetric (their sum over the labels is constant), which makes them robust to uniform noise and hard to train
when classes are many. Each `...Loss` is a module around `...(logits, target)`; `RobustLoss` trains with any of them by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.core.task import Task
from surefoot.core.treatment import Batch, Treatment
from surefoot.errors import check, check_choice, check_non_negative, check_open_unit, check_positive

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")
L = TypeVar("L", bound=nn.Module)


def check_batch(
    logits: Tensor,  # [B, K]
    target: Tensor,  # int64 [B]
    *,
    num_classes: int | None = None,
    index: Tensor | None = None,  # integers [B]
    num_samples: int | None = None,
    values: bool = True,
) -> None:
    """One clear sentence for a batch that a loss cannot take. Values are read from the device once, whatever is checked; with
    `values=False` only shapes and dtypes are looked at, and the device is not waited for."""
    shape = tuple(logits.shape)
    check(logits.dim() == 2 and logits.is_floating_point(), f"logits must be floating point [B, K], got {shape} {logits.dtype}.")  # fmt: skip
    check(shape[0] > 0, "logits hold an empty batch; give at least one example.")
    check(shape[1] >= 2, f"logits must have at least 2 classes, got K = {shape[1]}.")
    check(num_classes in (None, shape[1]), f"logits have {shape[1]} classes, and the loss was made for {num_classes}.")
    check(target.dtype == torch.int64 and target.dim() == 1, f"target must be int64 class indices [B], got {tuple(target.shape)} {target.dtype}.")  # fmt: skip
    check(len(target) == shape[0], f"target has {len(target)} labels for {shape[0]} rows of logits.")
    if not values:
        return
    total = logits.detach().sum(dtype=torch.promote_types(logits.dtype, torch.float32))  # finite only if every entry is
    facts = [torch.isfinite(total), target.min(), target.max()]
    if index is not None:
        facts += [index.min(), index.max()]
    finite, low, high, *ends = torch.stack([fact.to(total.device, torch.int64) for fact in facts]).tolist()
    if not finite:
        rows = (~torch.isfinite(logits).all(1)).nonzero().flatten().tolist()
        check(not rows, f"logits are NaN or infinite in row {rows[0] if rows else None}.")
    check(low >= 0 and high < shape[1], f"target must lie in [0, {shape[1]}), got values from {low} to {high}.")
    if ends and num_samples is not None:
        check(ends[0] >= 0 and ends[1] < num_samples, f"index must lie in [0, {num_samples}), the samples the loss was made for, got values from {ends[0]} to {ends[1]}.")  # fmt: skip


def check_index(index: Any, batch: int) -> None:
    """The form of a sample index: integers, one a row."""
    check(index is not None, "index is missing: this loss keeps a state per training sample; give each row's position in the data set.")  # fmt: skip
    integer = isinstance(index, Tensor) and not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)  # fmt: skip
    check(integer, f"index must be an integer tensor [B] of positions in the data set, got {getattr(index, 'dtype', type(index).__name__)}.")  # fmt: skip
    check(index.dim() == 1 and len(index) == batch, f"index must hold one position for each of the {batch} rows of logits, got shape {tuple(index.shape)}.")  # fmt: skip


def reduce_loss(loss: Tensor, reduction: Reduction) -> Tensor:
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


def _picked(values: Tensor, target: Tensor) -> Tensor:
    return values.gather(1, target.unsqueeze(1)).squeeze(1)


def margin_differences(
    logits: Tensor,  # [B, K]
    target: Tensor,  # int64 [B]
    margin: float,
) -> Tensor:  # [B, K]
    """d_k = f_k - f_y + margin [k != y]; d_y = 0 exactly."""
    column = target.unsqueeze(1)
    return (logits - logits.gather(1, column) + margin).scatter(1, column, 0.0)


def mae(logits: Tensor, target: Tensor) -> Tensor:
    return 2 - 2 * _picked(logits.softmax(1), target)


def gce(logits: Tensor, target: Tensor, *, q: float = 0.7) -> Tensor:
    """q -> 0 is cross-entropy, q = 1 is mae / 2. The power is taken in log space: no infinite gradient at p_y = 0."""
    return -torch.expm1(q * _picked(logits.log_softmax(1), target)) / q


def sce(logits: Tensor, target: Tensor, *, alpha: float = 0.1, beta: float = 1.0, log_zero: float = -4.0) -> Tensor:
    log_p = _picked(logits.log_softmax(1), target)
    return -alpha * log_p - beta * log_zero * (1 - log_p.exp())


def rll(logits: Tensor, target: Tensor, *, alpha: float = 0.01) -> Tensor:
    log_terms = (alpha + logits.softmax(1)).log()
    own = _picked(log_terms, target)
    return math.log((alpha + 1) / alpha) - own + (log_terms.sum(1) - own) / (logits.shape[1] - 1)


def nce_rce(logits: Tensor, target: Tensor, *, alpha: float = 1.0, beta: float = 1.0, log_zero: float = -4.0) -> Tensor:
    log_p = logits.log_softmax(1)
    own = _picked(log_p, target)
    return alpha * own / log_p.sum(1) - beta * log_zero * (1 - own.exp())


def js(logits: Tensor, target: Tensor, *, weight: float = 0.5) -> Tensor:
    log_own = _picked(logits.log_softmax(1), target)
    own = log_own.exp()
    mixed = weight + (1 - weight) * own
    # off the label m = (1-w) p, so KL(p||m) there is -log(1-w) times the mass off the label
    to_mixture = own * (log_own - mixed.log()) - math.log(1 - weight) * (1 - own)
    return (-weight * mixed.log() + (1 - weight) * to_mixture) / -((1 - weight) * math.log(1 - weight))


def cs(logits: Tensor, target: Tensor, *, margin: float = 1.0) -> Tensor:
    return margin_differences(logits, target, margin).amax(1)


def ww(logits: Tensor, target: Tensor, *, margin: float = 1.0) -> Tensor:
    return margin_differences(logits, target, margin).clamp_min(0.0).sum(1)


def bootstrap(logits: Tensor, target: Tensor, *, weight: float = 0.95) -> Tensor:
    log_p = logits.log_softmax(1)
    return -weight * _picked(log_p, target) - (1 - weight) * (log_p.exp() * log_p).sum(1)


def smoothing(logits: Tensor, target: Tensor, *, amount: float = 0.1) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none", label_smoothing=amount)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


class _Loss(nn.Module):
    """A per-sample loss as a module; `settings` are the keyword arguments of the function."""

    def __init__(self, function: Callable[..., Tensor], reduction: Reduction, **settings: float) -> None:
        super().__init__()
        check_choice("reduction", reduction, REDUCTIONS)
        self.function, self.settings = function, settings
        self.reduction: Reduction = reduction

    def forward(
        self,
        logits: Tensor,  # [B, K]
        target: Tensor,  # int64 [B]
    ) -> Tensor:  # scalar, or [B] with reduction "none"
        check_batch(logits, target)
        return reduce_loss(self.function(logits, target, **self.settings), self.reduction)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in {**self.settings, "reduction": self.reduction}.items())


class CELoss(_Loss):
    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__(cross_entropy, reduction)


class MAELoss(_Loss):
    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__(mae, reduction)


class GCELoss(_Loss):
    def __init__(self, q: float = 0.7, *, reduction: Reduction = "mean") -> None:
        check(0.0 < q <= 1.0, f"q must lie in (0, 1], got {q!r}.")
        super().__init__(gce, reduction, q=q)


class SCELoss(_Loss):
    def __init__(self, alpha: float = 0.1, beta: float = 1.0, *, log_zero: float = -4.0, reduction: Reduction = "mean") -> None:  # fmt: skip
        check_non_negative("alpha", alpha)
        check_non_negative("beta", beta)
        check(log_zero < 0, f"log_zero stands for log 0 and must be negative, got {log_zero!r}.")
        super().__init__(sce, reduction, alpha=alpha, beta=beta, log_zero=log_zero)


class RLLLoss(_Loss):
    def __init__(self, alpha: float = 0.01, *, reduction: Reduction = "mean") -> None:
        check_positive("alpha", alpha)
        super().__init__(rll, reduction, alpha=alpha)


class NCERCELoss(_Loss):
    def __init__(self, alpha: float = 1.0, beta: float = 1.0, *, log_zero: float = -4.0, reduction: Reduction = "mean") -> None:  # fmt: skip
        check_non_negative("alpha", alpha)
        check_non_negative("beta", beta)
        check(log_zero < 0, f"log_zero stands for log 0 and must be negative, got {log_zero!r}.")
        super().__init__(nce_rce, reduction, alpha=alpha, beta=beta, log_zero=log_zero)


class JSLoss(_Loss):
    def __init__(self, weight: float = 0.5, *, reduction: Reduction = "mean") -> None:
        check_open_unit("weight", weight)
        super().__init__(js, reduction, weight=weight)


class CSLoss(_Loss):
    def __init__(self, margin: float = 1.0, *, reduction: Reduction = "mean") -> None:
        check_non_negative("margin", margin)
        super().__init__(cs, reduction, margin=margin)


class WWLoss(_Loss):
    def __init__(self, margin: float = 1.0, *, reduction: Reduction = "mean") -> None:
        check_non_negative("margin", margin)
        super().__init__(ww, reduction, margin=margin)


class BootstrapLoss(_Loss):
    def __init__(self, weight: float = 0.95, *, reduction: Reduction = "mean") -> None:
        check(0.0 < weight <= 1.0, f"weight must lie in (0, 1], got {weight!r}.")
        super().__init__(bootstrap, reduction, weight=weight)


class LabelSmoothingLoss(_Loss):
    def __init__(self, amount: float = 0.1, *, reduction: Reduction = "mean") -> None:
        check(0.0 <= amount < 1.0, f"amount must lie in [0, 1), got {amount!r}.")
        super().__init__(smoothing, reduction, amount=amount)


LOSSES: Mapping[str, Callable[..., nn.Module]] = {
    "ce": CELoss,
    "mae": MAELoss,
    "gce": GCELoss,
    "sce": SCELoss,
    "rll": RLLLoss,
    "nce_rce": NCERCELoss,
    "js": JSLoss,
    "cs": CSLoss,
    "ww": WWLoss,
    "bootstrap": BootstrapLoss,
    "smoothing": LabelSmoothingLoss,
}


@dataclass
class RobustLoss(Treatment):
    """Train with one of `LOSSES`: the baselines of this family's trials, and usable as such."""

    name: str = "gce"
    options: Mapping[str, float] = field(default_factory=dict)
    slug = "robust_loss"

    def __post_init__(self) -> None:
        check_choice("name", self.name, tuple(LOSSES))

    def check(self, model: nn.Module, task: Task) -> None:
        LOSSES[self.name](**self.options)  # raises for bad options before anything is trained

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return LOSSES[self.name](**self.options)(model(batch.x), batch.y)


@dataclass
class PerSampleLoss(Treatment, Generic[L]):
    """Base of treatments whose loss `loss(logits, target, index)` keeps a state for each training sample, in its buffers."""

    loss_: L | None = field(default=None, init=False, repr=False, compare=False)

    def make_loss(self, num_samples: int, num_classes: int) -> L:
        """The loss with the treatment's settings; raises for bad ones."""
        raise NotImplementedError

    def check(self, model: nn.Module, task: Task) -> None:
        check(task.train.y is not None and len(task.train) > 0, f"{self.slug} needs training examples with labels.")
        self.make_loss(1, 2)

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        self.loss_ = self.make_loss(len(task.train), task.num_classes).to(task.device)
        return model, task

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        assert self.loss_ is not None
        return self.loss_(model(batch.x), batch.y, batch.index)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.loss_ is None else self.loss_.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state and self.loss_ is not None:
            self.loss_.load_state_dict(dict(state))
