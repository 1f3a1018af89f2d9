"""LDR: distributionally robust losses over labels, with one knob between cross-entropy (trusting) and hinge or mean losses.

With logits f `[B, K]` (normalised or not), labels y, margins c and d_k = f_k - f_y + c [k != y]:

    LDR-KL   max_p sum_k p_k d_k - lam KL(p || 1/K)  =  lam log( (1/K) sum_k exp(d_k / lam) )
    ALDR-KL  max_{p, lam} sum_k p_k d_k - lam KL(p || 1/K) - alpha log K / (2 lam0) (lam - lam0)^2

lam = 1, c = 0 is cross-entropy - log K; lam -> 0 is Crammer-Singer's max_k d_k; lam -> inf the (symmetric) mean_k d_k. ALDR-KL
keeps a temperature lam_i per training sample and takes one step of block ascent at each visit, without gradient:

    p = softmax(d / lam_i),  lam_i <- lam0 (1 - KL(p || 1/K) / (alpha log K))   in [lam0 (1 - 1/alpha), lam0], so alpha > 1

An unsure prediction keeps lam_i near lam0 (a soft, noise-tolerant loss); a sure one, right *or wrong*, lowers it. Hence lam_i is
a poor detector of wrong labels (its direction even turns with lam0): suspect by the loss, see `label_suspicion`.

Logits must not grow without bound or lam loses its meaning, so ALDR-KL normalises them: "l1" divides by their mean absolute
value, "softplus" takes softplus first. The last layer is then scale-free (weight decay only changes its effective step), and
lam0 must be tuned: with normalised logits lam0 <= 1 is steep and fits the noise, lam0 = 10 is what works at heavy noise.

Source: Dixian Zhu, Yiming Ying, Tianbao Yang, "Label Distributionally Robust Losses for Multi-class Classification:
Consistency, Robustness and Adaptivity", ICML 2023, arXiv 2112.14869.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import InvalidInput, check, check_at_least, check_choice, check_non_negative, check_positive
from surefoot.noisy_labels.losses import (
    REDUCTIONS,
    PerSampleLoss,
    Reduction,
    check_batch,
    check_index,
    margin_differences,
    reduce_loss,
)

Normalize = Literal["none", "l1", "softplus"]
NORMALIZE = ("none", "l1", "softplus")


def normalize_logits(
    logits: Tensor,  # [B, K]
    normalize: Normalize,
) -> Tensor:  # [B, K]
    """f, or f / mean_k |f_k|, the latter after softplus or not; the denominator carries gradient."""
    if normalize == "none":
        return logits
    values = F.softplus(logits) if normalize == "softplus" else logits
    return values / _row_scale(values)


def _row_scale(logits: Tensor, out: Tensor | None = None, *, validate: bool = True) -> Tensor:  # [B, 1]
    scale = torch.abs(logits, out=out).mean(1, keepdim=True)
    if validate and not bool(scale.detach().amin() > 0):
        row = int((scale.flatten() == 0).nonzero()[0])
        raise InvalidInput(f"Row {row} of the logits is all zero, so it cannot be normalised; pass normalize='none' or 'softplus'.")  # fmt: skip
    return scale


def ldr_kl_loss(
    logits: Tensor,  # [B, K]
    target: Tensor,  # int64 [B]
    *,
    lam: float | Tensor = 1.0,  # a temperature, or one a row [B]
    margin: float = 0.1,
    normalize: Normalize = "none",
    reduction: Reduction = "mean",
) -> Tensor:  # scalar, or [B] with reduction "none"
    """lam log( mean_k exp(d_k / lam) ); between mean_k d_k and max_k d_k, and falling in lam."""
    check_choice("normalize", normalize, NORMALIZE)
    check_choice("reduction", reduction, REDUCTIONS)
    check_non_negative("margin", margin)
    if not isinstance(lam, Tensor):
        check_positive("lam", lam)
    check_batch(logits, target)
    d = margin_differences(normalize_logits(logits, normalize), target, margin)
    column = lam.unsqueeze(1) if isinstance(lam, Tensor) else lam
    return reduce_loss(lam * ((d / column).logsumexp(1) - math.log(d.shape[1])), reduction)


@torch.no_grad()
def adapted_temperature(
    d: Tensor,  # [B, K]
    lam: Tensor,  # [B]
    lam0: float,
    alpha: float,
) -> Tensor:  # [B]
    """One step of block ascent: the best lam for p = softmax(d / lam)."""
    log_p = (d / lam.unsqueeze(1)).log_softmax(1)
    log_k = math.log(d.shape[1])
    divergence = ((log_p.exp() * log_p).sum(1) + log_k).clamp(0.0, log_k)
    return lam0 * (1 - divergence / (alpha * log_k))


class _AdaptiveLDR(torch.autograd.Function):
    """`adapted_temperature` and the loss at it, with the gradient written out (none through lam).

    The same numbers as the plain functions above, which the tests compare it with, at a quarter of their time: two
    exponentials in all, and every pass in one of two buffers, because fresh memory costs more than the arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, lam: Tensor, lam0: float, alpha: float, margin: float, l1: bool, validate: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
        column, classes = target.unsqueeze(1), logits.shape[1]
        log_k = math.log(classes)
        u, grad = torch.empty_like(logits), torch.empty_like(logits)
        scale = _row_scale(logits, out=u, validate=validate) if l1 else lam.new_ones(len(lam), 1)
        rate = 1 / (scale * lam.unsqueeze(1))
        torch.addcmul(-rate * logits.amax(1, keepdim=True), logits, rate, out=u)  # d / lam up to a constant of the row
        u.scatter_add_(1, column, (-margin / lam).unsqueeze(1))
        top, p = u.amax(1), torch.softmax(u, 1, out=grad)
        log_p_top = p.amax(1).log()
        divergence = p.mul_(u).sum(1) - top + log_p_top + log_k
        new = lam0 * (1 - divergence.clamp_(0.0, log_k) / (alpha * log_k))
        factor = lam / new
        torch.softmax(u.mul_(factor.unsqueeze(1)), 1, out=grad)
        loss = new * (top * factor - grad.amax(1).log() - u.gather(1, column).squeeze(1) - log_k)
        grad.scatter_add_(1, column, grad.new_full((), -1.0).expand_as(column))
        if l1:
            along = torch.mul(grad, logits, out=u).sum(1, keepdim=True) / (scale * classes)
            grad.addcmul_(torch.sign(logits, out=u), along, value=-1.0)
        ctx.save_for_backward(grad, scale)
        ctx.mark_non_differentiable(new)
        return loss - alpha * log_k / (2 * lam0) * (new - lam0) ** 2, new

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad, scale = ctx.saved_tensors
        return grad * (grads[0].unsqueeze(1) / scale), None, None, None, None, None, None, None


class LDRKLLoss(nn.Module):
    """`ldr_kl_loss` as a module."""

    def __init__(self, lam: float = 1.0, margin: float = 0.1, normalize: Normalize = "none", reduction: Reduction = "mean") -> None:  # fmt: skip
        super().__init__()
        check_positive("lam", lam)
        check_non_negative("margin", margin)
        check_choice("normalize", normalize, NORMALIZE)
        check_choice("reduction", reduction, REDUCTIONS)
        self.lam, self.margin = lam, margin
        self.normalize: Normalize = normalize
        self.reduction: Reduction = reduction

    def forward(
        self,
        logits: Tensor,  # [B, K]
        target: Tensor,  # int64 [B]
    ) -> Tensor:  # scalar, or [B] with reduction "none"
        return ldr_kl_loss(logits, target, lam=self.lam, margin=self.margin, normalize=self.normalize, reduction=self.reduction)  # fmt: skip

    def extra_repr(self) -> str:
        return f"lam={self.lam}, margin={self.margin}, normalize={self.normalize!r}"


class ALDRKLLoss(nn.Module):
    """The adaptive loss; `temperatures` `[N]` hold lam_i, lam0 at first. They change in training mode only.

    `adapt=False` freezes them (LDR-KL at lam0). `paper_code=True` updates them as the released code does: from the logits
    *without* margin, with 1e-5 added to each probability; the quadratic term then no longer matches the maximum over lam.
    `validate=False` trusts the values of a batch, so that adaptive training never waits for a GPU.
    """

    temperatures: Tensor

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        lam0: float = 1.0,
        alpha: float = 2.0,
        margin: float = 0.1,
        normalize: Normalize = "l1",
        reduction: Reduction = "mean",
        adapt: bool = True,
        paper_code: bool = False,
        validate: bool = True,
    ) -> None:
        super().__init__()
        check_at_least("num_samples", num_samples, 1)
        check_at_least("num_classes", num_classes, 2)
        check_positive("lam0", lam0)
        check(math.isfinite(alpha) and alpha > 1.0, f"alpha must be above 1, else a temperature may reach zero; got {alpha!r}.")  # fmt: skip
        check_non_negative("margin", margin)
        check_choice("normalize", normalize, NORMALIZE)
        check_choice("reduction", reduction, REDUCTIONS)
        self.num_samples, self.num_classes = num_samples, num_classes
        self.lam0, self.alpha, self.margin, self.adapt, self.paper_code, self.validate = (
            lam0,
            alpha,
            margin,
            adapt,
            paper_code,
            validate,
        )
        self.normalize: Normalize = normalize
        self.reduction: Reduction = reduction
        self.register_buffer("temperatures", torch.full((num_samples,), float(lam0)))

    def forward(
        self,
        logits: Tensor,  # [B, K]
        target: Tensor,  # int64 [B]
        index: Tensor,  # integers [B], positions in the data set
    ) -> Tensor:  # scalar, or [B] with reduction "none"
        check_index(index, len(logits))
        check_batch(logits, target, num_classes=self.num_classes, index=index, num_samples=self.num_samples, values=self.validate)  # fmt: skip
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if self.temperatures.dtype != logits.dtype:
            self.temperatures = self.temperatures.to(logits.dtype)
        where = index.to(self.temperatures.device, torch.int64)
        lam = self.temperatures[where].to(logits.device)
        if self.training and self.adapt and not self.paper_code:
            if self.normalize == "softplus":
                logits = F.softplus(logits)
            loss, new = _AdaptiveLDR.apply(logits, target, lam, self.lam0, self.alpha, self.margin, self.normalize != "none", self.validate)  # type: ignore[misc]  # fmt: skip
            self.temperatures[where] = new.to(self.temperatures.device)
            return reduce_loss(loss, self.reduction)
        values = normalize_logits(logits, self.normalize)
        if self.training and self.adapt:
            lam = self._released_update(values.detach(), lam)
            self.temperatures[where] = lam.to(self.temperatures.device)
        log_k = math.log(self.num_classes)
        loss = ldr_kl_loss(values, target, lam=lam, margin=self.margin, reduction="none")
        pull = self.alpha * log_k / (2 * self.lam0) * (lam - self.lam0) ** 2
        return reduce_loss(loss - pull, self.reduction)

    def _released_update(self, values: Tensor, lam: Tensor) -> Tensor:
        p = F.normalize((values / lam.unsqueeze(1)).softmax(1) + 1e-5, p=1.0, dim=1)
        log_k = math.log(self.num_classes)
        return self.lam0 * (1 - ((p * p.log()).sum(1) + log_k).clamp(0.0, log_k) / (self.alpha * log_k))

    def reset(self) -> None:
        """Back to lam0 everywhere."""
        self.temperatures.fill_(self.lam0)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(prefix + "temperatures")
        if saved is not None:
            check(saved.shape == self.temperatures.shape, f"The saved state is for {len(saved)} samples, and this loss was made for {self.num_samples} samples.")  # fmt: skip
            self.temperatures = self.temperatures.to(saved.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{self.num_samples}, {self.num_classes}, lam0={self.lam0}, alpha={self.alpha}, margin={self.margin}, normalize={self.normalize!r}"  # fmt: skip


def label_suspicion(
    losses: Tensor,  # [N], per-sample losses
    temperatures: Tensor,  # [N]
) -> Tensor:  # float64 [N], in (0, 1]
    """How suspect each label is among the N: the rank of its loss, over N; the temperature only breaks ties.

    The loss comes first because the temperature is the weaker witness and its direction depends on lam0 (a sure prediction,
    right or wrong, lowers it). Equal losses and temperatures share their mean rank.
    """
    check(losses.dim() == 1 and losses.shape == temperatures.shape, f"losses and temperatures must both be [N], got {tuple(losses.shape)} and {tuple(temperatures.shape)}.")  # fmt: skip
    check(bool(torch.isfinite(losses).all()), "losses must be finite.")
    pairs = torch.stack([losses.double(), temperatures.double()], dim=1)
    _, group, counts = pairs.unique(dim=0, return_inverse=True, return_counts=True)  # sorted by loss, then temperature
    last = counts.cumsum(0)
    return ((last - (counts - 1) / 2.0) / len(losses))[group]


@dataclass
class LDR(PerSampleLoss[ALDRKLLoss]):
    """Label-distributionally robust loss in the training loop: adaptive (ALDR-KL), or LDR-KL at lam0 with `adaptive=False`.

    lam0 = 10 and not the paper's 1, because with normalised logits 1 fits the noise and 10 costs nothing on clean labels.
    """

    slug = "ldr"
    lam0: float = 10.0
    alpha: float = 2.0
    margin: float = 0.1
    normalize: Normalize = "l1"
    adaptive: bool = True

    def make_loss(self, num_samples: int, num_classes: int) -> ALDRKLLoss:
        return ALDRKLLoss(num_samples, num_classes, lam0=self.lam0, alpha=self.alpha, margin=self.margin, normalize=self.normalize, adapt=self.adaptive)  # fmt: skip
