"""ELR: train on partly wrong labels without memorising them, with one loss object that needs only the sample index.

A network first learns from the right labels and later memorises the wrong ones. ELR keeps, for every training sample i, a
temporal ensemble t_i of the model's own probabilities (the early learning) and pulls the model towards it. With logits
z `[B, K]`, p = clamp(softmax(z), eps, 1 - eps), labels y and q = p / sum(p) without gradient:

    t_i  <- beta t_i + (1 - beta) q_i                       before use; t starts at 0, so that sum(t_i) = 1 - beta^visits
    loss =  CE(z, y) + lam log(1 - <p, t>)                  no gradient through t
    d/dz_c log(1 - <p, t>) = p_c / (1 - <p, t>) * sum_k (t_k - t_c) p_k      (without the clamp)

The regulariser is negative and smallest where p agrees with t; for a false label its gradient cancels cross-entropy's. ELR+
adds a second network, weight-averaged teachers that exchange targets, and mixup (`surefoot.noisy_labels.elr_plus`).

Check the indices: they must be positions in the *data set*, whatever the shuffling or subsetting (once, before training: does
`labels_of_the_data_set[index]` equal the batch's labels?). Wrong ones raise no error: t then averages over other samples, and
training behaves like plain cross-entropy. Another silent failure is beta = 0, which puts p in t's place: at lam = 3 it collapses.
The state takes N K floats; `state_dtype=torch.float16` halves it, and it may live on another device than the logits. With ranks
that exchange samples pass `all_ranks=True`, so that every rank sees every visit.

Source: Sheng Liu, Jonathan Niles-Weed, Narges Razavian, Carlos Fernandez-Granda, "Early-Learning Regularization Prevents
Memorization of Noisy Labels", NeurIPS 2020, arXiv 2007.00151.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import check, check_at_least, check_choice, check_non_negative
from surefoot.noisy_labels.losses import (
    REDUCTIONS,
    PerSampleLoss,
    Reduction,
    check_batch,
    check_index,
    reduce_loss,
)


class TemporalEnsemble(nn.Module):
    """The targets t `[N, K]`: a running mean of the probabilities each sample got, and what may be read off them."""

    targets: Tensor

    def __init__(self, num_samples: int, num_classes: int, *, lam: float, beta: float, clamp: float, reduction: Reduction, state_dtype: torch.dtype | None, all_ranks: bool) -> None:  # fmt: skip
        super().__init__()
        check_at_least("num_samples", num_samples, 1)
        check_at_least("num_classes", num_classes, 2)
        check_non_negative("lam", lam)
        check(0.0 <= beta < 1.0, f"beta must lie in [0, 1), got {beta!r}.")
        check(0.0 < clamp < 1.0 / num_classes, f"clamp must lie between 0 and 1/{num_classes}, got {clamp!r}.")
        check_choice("reduction", reduction, REDUCTIONS)
        self.num_samples, self.num_classes = num_samples, num_classes
        self.lam, self.beta, self.clamp, self.all_ranks = lam, beta, clamp, all_ranks
        self.reduction: Reduction = reduction
        self.state_dtype = state_dtype
        self.register_buffer("targets", torch.zeros(num_samples, num_classes, dtype=state_dtype or torch.float32))

    @torch.no_grad()
    def update(
        self,
        probabilities: Tensor,  # [B, K], rows sum to 1
        index: Tensor,  # integers [B]
    ) -> Tensor:  # [B, K], the targets of the batch
        """t <- beta t + (1 - beta) q. A sample that occurs twice in a batch counts as one visit with its mean probabilities."""
        if self.state_dtype is None and self.targets.dtype != probabilities.dtype:
            self.targets = self.targets.to(probabilities.dtype)
        visits, seen = probabilities, index.to(self.targets.device, torch.int64)
        batch = seen
        if self.all_ranks:
            visits, seen = _gather(probabilities), _gather(seen)
        visits = _mean_visits(visits, seen)
        new = torch.lerp(visits.to(self.targets.device), self.targets[seen].to(visits.dtype), self.beta)
        self.targets[seen] = new.to(self.targets.dtype)
        return new.to(probabilities.device) if seen is batch else self.recall(batch, probabilities)

    def recall(self, index: Tensor, like: Tensor) -> Tensor:  # [B, K]
        """The stored targets of a batch, on the device and in the precision of `like`."""
        return self.targets[index.to(self.targets.device, torch.int64)].to(like.device, like.dtype)

    def reset(self) -> None:
        """Forget everything: t = 0."""
        self.targets.zero_()

    def suspected(self, labels: Tensor, k: int | None = None) -> Tensor:
        """See `suspected`."""
        return suspected(self.targets, labels, k)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(prefix + "targets")
        if saved is not None:
            check(saved.shape == self.targets.shape, f"The saved state is for {saved.shape[0]} samples and {saved.shape[1]} classes, and this loss was made for {self.num_samples} samples and {self.num_classes} classes.")  # fmt: skip
            if self.state_dtype is None:
                self.targets = self.targets.to(saved.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{self.num_samples}, {self.num_classes}, lam={self.lam}, beta={self.beta}, reduction={self.reduction!r}"


def _mean_visits(visits: Tensor, seen: Tensor) -> Tensor:  # [B, K], int64 [B] -> [B, K]
    """Each row replaced by the mean of all rows of its sample. Nothing here has a shape that hangs on values, so no device is waited for."""
    ordered, order = seen.sort(stable=True)
    starts = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).long()])
    group = torch.empty_like(order).index_copy_(0, order, starts.cumsum(0)).to(visits.device)
    total = torch.zeros_like(visits).index_add_(0, group, visits)
    counts = visits.new_zeros(len(visits)).index_add_(0, group, visits.new_ones(len(visits)))
    return total[group] / counts[group].unsqueeze(1)


def _gather(x: Tensor) -> Tensor:
    """The rows of all ranks (of equal number), one after the other."""
    import torch.distributed as dist

    check(dist.is_available() and dist.is_initialized(), "all_ranks=True needs torch.distributed to be initialised.")
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _full_precision(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


class ELRLoss(TemporalEnsemble):
    """Cross-entropy + lam log(1 - <p, t>) with per-sample targets t.

    Paper's settings: lam 3, beta .7 (CIFAR-10), lam 7, beta .9 (CIFAR-100). With few epochs keep beta small: t must have warmed
    up before memorisation sets in. t changes in training mode only; in evaluation mode the loss writes nothing. Looking at the values
    of a batch waits for the device, which on a GPU can cost a tenth of a small network's step; `validate=False` trusts them.
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        lam: float = 3.0,
        beta: float = 0.7,
        clamp: float = 1e-4,
        reduction: Reduction = "mean",
        state_dtype: torch.dtype | None = None,
        all_ranks: bool = False,
        validate: bool = True,
    ) -> None:
        super().__init__(num_samples, num_classes, lam=lam, beta=beta, clamp=clamp, reduction=reduction, state_dtype=state_dtype, all_ranks=all_ranks)  # fmt: skip
        self.validate = validate

    def forward(
        self,
        logits: Tensor,  # [B, K]
        target: Tensor,  # int64 [B]
        index: Tensor,  # integers [B], positions in the data set
    ) -> Tensor:  # scalar, or [B] with reduction "none"
        check_index(index, len(logits))
        check_batch(logits, target, num_classes=self.num_classes, index=index, num_samples=self.num_samples, values=self.validate)  # fmt: skip
        log_p = _full_precision(logits).log_softmax(1)
        p = log_p.exp().clamp(self.clamp, 1 - self.clamp)
        if self.training:
            q = p.detach()
            t = self.update(q / q.sum(1, keepdim=True), index)
        else:
            t = self.recall(index, p)
        agreement = torch.log1p(-(t * p).sum(1))
        return F.nll_loss(log_p, target, reduction=self.reduction) + self.lam * reduce_loss(agreement, self.reduction)


def sigmoid_rampup(step: int, length: int) -> float:
    """exp(-5 (1 - step/length)^2) up to `length`, then 1."""
    return 1.0 if length == 0 else math.exp(-5.0 * (1.0 - min(max(step, 0), length) / length) ** 2)


class ELRPlusLoss(TemporalEnsemble):
    """ELR's loss on mixed-up batches, with targets from a teacher: `update_targets`, then `forward`.

    `coef_step` ramps lam up over so many steps; `filter_labels` multiplies the soft label by the target before the
    cross-entropy (the released code does so for 100 classes).
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        lam: float = 3.0,
        beta: float = 0.7,
        clamp: float = 1e-4,
        coef_step: int = 0,
        filter_labels: bool = False,
        reduction: Reduction = "mean",
        state_dtype: torch.dtype | None = None,
        all_ranks: bool = False,
    ) -> None:
        super().__init__(num_samples, num_classes, lam=lam, beta=beta, clamp=clamp, reduction=reduction, state_dtype=state_dtype, all_ranks=all_ranks)  # fmt: skip
        check_at_least("coef_step", coef_step, 0)
        self.coef_step, self.filter_labels = coef_step, filter_labels
        self.mixed: Tensor | None = None  # [B, K], the targets of the batch that comes next

    def update_targets(
        self,
        ema_logits: Tensor,  # [B, K], the teacher on the inputs before mixup
        index: Tensor,  # integers [B]
        perm: Tensor | None = None,  # int64 [B], the partner of each row in mixup
        l: float = 1.0,  # noqa: E741  the paper's mixing weight
    ) -> Tensor:  # [B, K]
        """Write the teacher's probabilities into t; returns and keeps the mixed targets l t + (1 - l) t[perm]."""
        check_index(index, len(ema_logits))
        check_batch(ema_logits, torch.zeros(len(ema_logits), dtype=torch.int64), num_classes=self.num_classes, index=index, num_samples=self.num_samples)  # fmt: skip
        check(perm is not None or l == 1.0, f"l = {l!r} mixes pairs; give perm, the partner of each row.")
        q = _full_precision(ema_logits.detach()).softmax(1)
        t = self.update(q, index) if self.training else self.recall(index, q)
        self.mixed = t if perm is None else l * t + (1 - l) * t[perm]
        return self.mixed

    def forward(
        self,
        logits: Tensor,  # [B, K], the network on the mixed inputs
        soft_target: Tensor,  # [B, K], mixed one-hot labels
        step: int = 0,
    ) -> Tensor:
        check(self.mixed is not None and self.mixed.shape == logits.shape, "Call update_targets for this batch before the loss.")  # fmt: skip
        check(soft_target.shape == logits.shape, f"soft_target must be [B, K] like the logits {tuple(logits.shape)}, got {tuple(soft_target.shape)}.")  # fmt: skip
        assert self.mixed is not None
        log_p = _full_precision(logits).log_softmax(1)
        p = log_p.exp().clamp(self.clamp, 1 - self.clamp)
        if self.filter_labels:
            soft_target = soft_target * self.mixed
            soft_target = soft_target / soft_target.sum(1, keepdim=True)
        cross_entropy = -(soft_target * log_p).sum(1)
        weight = sigmoid_rampup(step, self.coef_step) * self.lam
        return reduce_loss(cross_entropy + weight * torch.log1p(-(self.mixed * p).sum(1)), self.reduction)


def suspected(
    targets: Tensor,  # [N, K], temporal ensembles
    labels: Tensor,  # int64 [N], as given
    k: int | None = None,
) -> Tensor:  # int64 [M]
    """Samples whose ensemble names another class than their label, the largest margin t_max - t_label first: a relabelling list.

    Never-visited samples are left out. `k` keeps the first k. The suggested label is `targets[i].argmax()`.
    """
    check(labels.shape == targets.shape[:1], f"labels must hold one label for each of the {len(targets)} samples, got shape {tuple(labels.shape)}.")  # fmt: skip
    check(k is None or k >= 0, f"k must be zero or more, got {k!r}.")
    t, labels = targets.double(), labels.to(targets.device)
    margin = t.amax(1) - t.gather(1, labels.unsqueeze(1)).squeeze(1)
    found = (margin > 0).nonzero().flatten()
    return found[margin[found].argsort(descending=True, stable=True)][:k]


@dataclass(frozen=True)
class MemorizationCurve:
    """Shares along training, epoch by epoch; the first two count falsely labelled samples only."""

    memorized: Tensor  # float64 [E]: predicted as their false label
    recovered: Tensor  # float64 [E]: predicted as their true class
    learned: Tensor  # float64 [E]: rightly labelled samples predicted as their label


def memorization_curve(
    predictions: Tensor | Sequence[Tensor],  # int64 [E, N], predicted classes of the training samples after each epoch
    labels: Tensor,  # int64 [N], as given
    true_labels: Tensor,  # int64 [N]
) -> MemorizationCurve:
    """How much of the label noise a run has memorised, and how much of it it sees through. NaN where no sample counts."""
    table = predictions if isinstance(predictions, Tensor) else torch.stack(list(predictions))
    check(table.dim() == 2 and table.shape[1:] == labels.shape == true_labels.shape, f"predictions must be [E, N] beside labels [N], got {tuple(table.shape)}, {tuple(labels.shape)} and {tuple(true_labels.shape)}.")  # fmt: skip
    false = labels != true_labels
    given, true = (table == labels).double(), (table == true_labels).double()
    return MemorizationCurve(given[:, false].mean(1), true[:, false].mean(1), given[:, ~false].mean(1))


@dataclass
class ELR(PerSampleLoss[ELRLoss]):
    """Early-learning regularisation in the training loop: replaces cross-entropy by `ELRLoss`."""

    slug = "elr"
    lam: float = 3.0
    beta: float = 0.7

    def make_loss(self, num_samples: int, num_classes: int) -> ELRLoss:
        return ELRLoss(num_samples, num_classes, lam=self.lam, beta=self.beta)
