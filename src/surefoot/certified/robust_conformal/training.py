"""RCT: train the last layer so that the robust sets of one half of a batch, calibrated on the other half, are small.

q_ik = Phi^-1(mean over noisy copies of p_k(x_i)), clipped to (1e-7, 1 - 1e-7)            conformity: larger = better
tau  = soft order statistic of q at the true labels of the first half, at alpha, minus eps/sigma
C_ik = sigmoid((q_ik - tau) / temperature)                                                soft set of the second half
loss = ln( mean_i (1 - C_iy) + size_weight mean_i relu(sum_k C_ik - target) + 1e-8 )
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor, nn

from surefoot.core.task import Task
from surefoot.core.treatment import Batch, Treatment
from surefoot.errors import (  # fmt: skip
    InvalidInput,
    Refused,
    check,
    check_at_least,
    check_non_negative,
    check_open_unit,
    check_positive,
)
from surefoot.nn.modes import evaluating
from surefoot.nn.smoothing import noisy_batches, noisy_loss

CLIP = 1e-7


def soft_order_statistic(
    values: Tensor,  # float [n]
    index: int,  # from 0, ascending
    dispersion: float = 0.1,
) -> Tensor:  # scalar
    """The entry at `index` of the L2 soft sort, differentiable in all values; the hard order statistic as dispersion -> 0.

    Soft sort is the projection of r = ranks / dispersion onto the permutahedron of the values. By isotonic regression, sorted
    neighbours that differ by more than 1 / dispersion are pooled; within a pool the entry is r_i - mean(r) + mean(values), so
    the gradient is spread evenly over the pool and sums to 1. Probits clipped as here differ by less than 10.4: at dispersion
    0.1, the default of the published code, this is all but always the hard order statistic.
    """
    check_positive("dispersion", dispersion)
    check(values.dim() == 1 and len(values) > 0, "values must be a list of at least one number.")
    check(0 <= index < len(values), f"index must lie in [0, {len(values)}), got {index}.")
    ordered = values.sort().values
    ranks = torch.arange(len(values), device=values.device, dtype=torch.float64) / dispersion
    # ascending: minimise ||v - (ranks - values)|| over increasing v; SciPy returns the pools of the minimiser
    target = (ranks - ordered.detach().double()).cpu().numpy()
    edges = isotonic_regression(np.asarray(target)).blocks
    pool = int(np.searchsorted(edges, index, side="right")) - 1
    inside = slice(int(edges[pool]), int(edges[pool + 1]))
    offset = (ranks[index] - ranks[inside].mean()).to(values.dtype)
    return ordered[inside].mean() + offset


def robust_conformal_loss(
    probs: Tensor,  # float [B, K], mean softmax over noisy copies; the first half calibrates, the second is predicted
    y: Tensor,  # int64 [B]
    *,
    alpha: float = 0.1,
    correction: float = 0.5,
    temperature: float = 0.1,
    size_weight: float = 1.0,
    target_size: float = 1.0,
    dispersion: float = 0.1,
) -> Tensor:  # scalar
    """RCT's loss; `correction` is eps/sigma. The class loss is 1 - C_iy (the identity as K x K loss matrix)."""
    check(probs.dim() == 2 and len(probs) == len(y), "probs must be [B, K] with one label per row.")
    check(len(probs) % 2 == 0, f"The batch is split into halves, so its size must be even, got {len(probs)}.")
    check(y.dtype == torch.int64, f"y must hold int64 labels, got {y.dtype}.")
    half = len(probs) // 2
    check(half >= 1 / alpha, f"The batch must hold at least 2 / alpha = {2 / alpha:g} examples, got {len(probs)}.")
    conformity = torch.special.ndtri(probs.clamp(CLIP, 1 - CLIP))
    true = conformity.gather(1, y[:, None])[:, 0]
    index = max(math.floor(alpha * (half + 1) + 1e-9) - 1, 0)
    threshold = soft_order_statistic(true[:half], index, dispersion) - correction
    inside = torch.sigmoid((conformity[half:] - threshold) / temperature)
    missed = 1.0 - inside.gather(1, y[half:, None])[:, 0].mean()
    size = torch.relu(inside.sum(1) - target_size).mean()
    return torch.log(missed + size_weight * size + 1e-8)


@dataclass(frozen=True)
class RobustConformalLoss:
    """`robust_conformal_loss` with its settings bound."""

    alpha: float = 0.1
    correction: float = 0.5
    temperature: float = 0.1
    size_weight: float = 1.0
    target_size: float = 1.0
    dispersion: float = 0.1

    def __post_init__(self) -> None:
        check_open_unit("alpha", self.alpha)
        for name in ("correction", "size_weight", "target_size"):
            check_non_negative(name, getattr(self, name))
        check_positive("temperature", self.temperature)
        check_positive("dispersion", self.dispersion)

    def __call__(self, probs: Tensor, y: Tensor) -> Tensor:
        return robust_conformal_loss(probs, y, **vars(self))


def last_linear(model: nn.Module, example: Tensor) -> nn.Linear:
    """The linear layer whose output is the model's, found by running `example` `[1, ...]`."""
    outputs: dict[int, nn.Module] = {}

    def note(layer: nn.Module, _: object, out: Tensor) -> None:
        outputs[id(out)] = layer

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        with evaluating(model), torch.no_grad():
            logits = model(example)
            found = outputs.get(id(logits))
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(found, nn.Linear):
        raise Refused("RCT trains the last layer only, and this model does not end in a linear layer.")
    return found


def train_rct(
    model: nn.Module,
    x: Tensor,  # float [N, ...]
    y: Tensor,  # int64 [N]
    *,
    sigma: float,
    loss: RobustConformalLoss,
    epochs: int = 30,
    batch_size: int = 500,
    copies: int = 8,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    generator: torch.Generator,
) -> nn.Module:
    """A copy of `model` (trained under noise `sigma`) whose last layer is drawn anew and trained by RCT; the rest is untouched.

    SGD with Nesterov momentum, lr divided by 10 after 2/5, 3/5 and 4/5 of the epochs. Batches are equal and even; the examples
    left over by the last one rest for that epoch. The features come from evaluation mode, so batch-norm stands still.
    """
    check_positive("sigma", sigma)
    for name, value in (("epochs", epochs), ("copies", copies)):
        check_at_least(name, value, 1)
    check(y.dtype == torch.int64 and y.shape == x.shape[:1], "y must hold one int64 label per example.")
    size = min(batch_size, len(x)) // 2 * 2
    check(size >= 2 / loss.alpha, f"RCT needs batches of at least 2 / alpha = {2 / loss.alpha:g} examples, got {size}.")
    model = copy.deepcopy(model)
    head = last_linear(model, x[:1])
    check(int(y.min()) >= 0 and int(y.max()) < head.out_features, f"y must lie in [0, {head.out_features}).")
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    _reset_(head, generator)
    parameters = list(head.requires_grad_().parameters())
    optimizer = torch.optim.SGD(parameters, lr, momentum, nesterov=momentum > 0, weight_decay=weight_decay)
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.1 ** sum(epoch >= share * epochs for share in (0.4, 0.6, 0.8))
        for index in _batches(len(x), size, generator, x.device):
            probs = _mean_probabilities(model, head, x[index], copies, sigma, generator)
            value = loss(probs, y[index])
            if not bool(torch.isfinite(value)):
                raise InvalidInput(f"RCT's loss became {value.item()} in epoch {epoch}; lower the learning rate {lr}.")
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return model


def _mean_probabilities(
    model: nn.Module, head: nn.Linear, x: Tensor, copies: int, sigma: float, generator: torch.Generator
) -> Tensor:  # float [B, K]
    """Mean softmax over noisy copies: the features without a graph, the head with one."""
    features: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    try:
        with evaluating(model), torch.no_grad():
            for _, noisy in noisy_batches(x, copies, sigma=sigma, generator=generator):
                model(noisy)
    finally:
        hook.remove()
    return head(torch.cat(features)).softmax(-1).view(len(x), copies, -1).mean(1)


def _batches(n: int, size: int, generator: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    order = torch.randperm(n, generator=generator, device=generator.device).to(device)
    for start in range(0, n // size * size, size):
        yield order[start : start + size]


@torch.no_grad()
def _reset_(head: nn.Linear, generator: torch.Generator) -> None:
    """PyTorch's own initialisation of a linear layer, from `generator`."""
    bound = 1.0 / math.sqrt(head.in_features)
    for parameter in head.parameters():
        fresh = torch.rand(parameter.shape, generator=generator, device=generator.device, dtype=parameter.dtype)
        parameter.copy_(fresh.to(parameter.device) * (2 * bound) - bound)


# --- the treatment --------------------------------------------------------------------------------------------------


@dataclass
class RobustConformalTraining(Treatment):
    """Train under noise `sigma` (the run itself), then the last layer anew by RCT. The model keeps its architecture.

    The sets themselves come from `RobustConformalClassifier` on data that neither stage has seen.
    """

    slug: ClassVar[str] = "robust_conformal"
    excludes: ClassVar[dict[str, str]] = {
        "random_pruning": "RCT draws the last layer anew and would fill its pruned weights again.",
        "dual_smoothing": "both train for a noisy vote of their own, and RCT needs one network with one last layer.",
    }
    finish_order: ClassVar[int] = (
        5  # after merging, before quantization and calibration: the last layer still has to be trained
    )

    sigma: float = 0.25
    eps: float = 0.125
    alpha: float = 0.1
    epochs: int = 60
    batch_size: int = 200
    copies: int = 8
    lr: float = 0.05
    temperature: float = 0.1
    size_weight: float = 0.1  # 1 in the paper on 10 classes; a few hundred steps on small data ask for less
    target_size: float = 1.0

    def __post_init__(self) -> None:
        check_positive("sigma", self.sigma)
        check_non_negative("eps", self.eps)
        check_at_least("epochs", self.epochs, 0)
        check_at_least("batch_size", self.batch_size, 2)
        check_at_least("copies", self.copies, 1)
        check_positive("lr", self.lr)
        self._loss()

    def _loss(self) -> RobustConformalLoss:
        return RobustConformalLoss(
            self.alpha, self.eps / self.sigma, self.temperature, self.size_weight, self.target_size
        )

    def check(self, model: nn.Module, task: Task) -> None:
        if min(self.batch_size, len(task.train)) // 2 * 2 < 2 / self.alpha:
            raise Refused(
                f"robust_conformal needs batches of at least 2 / alpha = {2 / self.alpha:g} examples; batch_size is "
                f"{self.batch_size} and the training split has {len(task.train)}."
            )
        like = next((p for p in model.parameters() if p.is_floating_point()), task.train.x)
        last_linear(model, task.train.x[:1].to(like.device, like.dtype))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return noisy_loss(model, batch.x, batch.y, sigma=self.sigma, generator=batch.generator)

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        if self.epochs == 0:
            return model
        like = next(p for p in model.parameters() if p.is_floating_point())
        x, y = task.train.x.to(like.device, like.dtype), task.train.labels.to(like.device)
        return train_rct(
            model, x, y, sigma=self.sigma, loss=self._loss(), epochs=self.epochs, batch_size=self.batch_size,
            copies=self.copies, lr=self.lr, generator=task.generator("robust_conformal"),
        )  # fmt: skip
