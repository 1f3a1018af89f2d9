"""ELR+: two networks that teach each other from weight averages, on mixed-up batches, with early-learning regularisation.

For network 1 (network 2 mirrors it), one-hot labels Y, a mixing weight l = max(b, 1 - b) with b ~ Beta(alpha, alpha):

    x~ = l x + (1 - l) x[perm],  Y~ = l Y + (1 - l) Y[perm]
    t1_i <- beta t1_i + (1 - beta) softmax(ema2(x))        the other network's weight average, inputs before mixup
    loss  = -<Y~, log softmax(net1(x~))> + ramp(step) lam log(1 - <l t1 + (1 - l) t1[perm], p>)
    ema1 <- a ema1 + (1 - a) net1,   a = exp(-5 (1 - (step + 1) / ema_step)^2) ema_alpha

Prediction is the mean of both networks' logits. Paper's CIFAR-10: ema_alpha .997, ema_step 40000, lam 3, beta .7, 200 epochs;
cost is about three times a plain training (two updates and two teacher passes a step). Unlike the released code, teachers run
in evaluation mode and average the floating-point buffers (batch-norm statistics) with the weights.
Source: Liu et al., NeurIPS 2020, arXiv 2007.00151.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import InvalidInput, check, check_at_least, check_non_negative
from surefoot.noisy_labels.elr import ELRPlusLoss, sigmoid_rampup

Progress = Callable[[int, int, float], None]  # (steps done, steps in all, mean loss of the epoch)


class MeanLogits(nn.Module):
    """The mean of several networks' logits."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([model(x) for model in self.models]).mean(0)


@dataclass(frozen=True)
class ELRPlusResult:
    """`model` predicts with the mean of both networks' logits; `losses` hold the targets each network learned from."""

    model: MeanLogits
    teachers: tuple[nn.Module, nn.Module]
    losses: tuple[ELRPlusLoss, ELRPlusLoss]
    history: tuple[float, ...]  # mean loss of each epoch


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, alpha: float) -> None:
    """ema <- alpha ema + (1 - alpha) model, for parameters and floating-point buffers; other buffers are copied."""
    for mean, value in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
        mean.lerp_(value, 1.0 - alpha) if mean.is_floating_point() else mean.copy_(value)


def train_elr_plus(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor, Tensor]],  # (x [B, ...], y int64 [B], index int64 [B])
    optimizer_a: torch.optim.Optimizer,
    optimizer_b: torch.optim.Optimizer,
    *,
    num_samples: int,
    num_classes: int,
    epochs: int,
    lam: float = 3.0,
    beta: float = 0.7,
    coef_step: int = 0,
    filter_labels: bool = False,
    mixup_alpha: float = 1.0,
    ema_alpha: float = 0.997,
    ema_step: int = 40000,
    generator: torch.Generator | None = None,
    schedule: Callable[[int], None] | None = None,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> ELRPlusResult:
    """Train two networks that exchange targets; the models given are trained in place.

    Each network learns from mixed-up inputs with targets from the *other* network's weight average, seen on the inputs before
    mixup and in evaluation mode. `schedule(epoch)` may set learning rates before each epoch; `generator` (None: a fixed seed)
    draws the mixup; `mixup_alpha=0` switches it off. `checkpoint` names a file that is rewritten after each epoch and picked up
    again if it exists; a `DataLoader` with a generator of its own then goes on with the same order.
    """
    check_at_least("epochs", epochs, 0)
    check_non_negative("mixup_alpha", mixup_alpha)
    check(ema_alpha == 0.0 or 0.0 < ema_alpha < 1.0, f"ema_alpha must lie in [0, 1), got {ema_alpha!r}.")
    check_at_least("ema_step", ema_step, 0)
    check(model_a is not model_b, "model_a and model_b must be two networks, initialised differently.")
    generator = torch.Generator() if generator is None else generator
    models, optimizers = (model_a, model_b), (optimizer_a, optimizer_b)
    teachers = (
        copy.deepcopy(model_a).requires_grad_(False).eval(),
        copy.deepcopy(model_b).requires_grad_(False).eval(),
    )
    device = next(model_a.parameters()).device

    def make_loss() -> ELRPlusLoss:
        return ELRPlusLoss(num_samples, num_classes, lam=lam, beta=beta, coef_step=coef_step, filter_labels=filter_labels).to(device)  # fmt: skip

    losses = (make_loss(), make_loss())
    generators = [g for g in (generator, getattr(loader, "generator", None)) if g is not None]
    parts = (*models, *teachers, *losses, *optimizers)
    step, history = _load_plus(checkpoint, parts, generators)
    for epoch in range(len(history), epochs):
        if schedule is not None:
            schedule(epoch)
        for model in models:
            model.train()
        total, batches = torch.zeros((), device=device), 0
        for x, y, index in loader:
            x, y = x.to(device), y.to(device)
            alpha = sigmoid_rampup(step + 1, ema_step) * ema_alpha
            for own in (0, 1):
                loss = _plus_loss(models[own], teachers[1 - own], losses[own], (x, y, index), step, mixup_alpha, generator)  # fmt: skip
                optimizers[own].zero_grad(set_to_none=True)
                loss.backward()
                optimizers[own].step()
                update_ema(teachers[own], models[own], alpha)
                total += loss.detach() / 2
            step, batches = step + 1, batches + 1
        check(batches > 0, "The loader gave no batch; give at least one.")
        history.append(total.item() / batches)
        if not math.isfinite(history[-1]):
            raise InvalidInput(f"The loss became {history[-1]} in epoch {epoch}; lower the learning rate.")
        if checkpoint is not None:
            _save_plus(checkpoint, parts, generators, step, history)
        if progress is not None:
            progress(step, batches * epochs, history[-1])
    return ELRPlusResult(MeanLogits(*models).eval(), teachers, losses, tuple(history))


def _plus_loss(model: nn.Module, teacher: nn.Module, loss: ELRPlusLoss, batch: tuple[Tensor, Tensor, Tensor], step: int, mixup_alpha: float, generator: torch.Generator) -> Tensor:  # fmt: skip
    x, y, index = batch
    labels = F.one_hot(y, loss.num_classes).to(x.dtype)
    perm, share = torch.arange(len(x), device=x.device), 1.0
    if mixup_alpha > 0:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        share = float(np.random.default_rng(seed).beta(mixup_alpha, mixup_alpha))  # torch's Beta takes no generator
        share = max(share, 1 - share)
        perm = torch.randperm(len(x), generator=generator, device=generator.device).to(x.device)
    logits = model(share * x + (1 - share) * x[perm])
    with torch.no_grad():
        loss.update_targets(teacher(x), index.to(x.device), perm, share)
    return loss(logits, share * labels + (1 - share) * labels[perm], step)


def _save_plus(path: Path, parts: Sequence[Any], generators: Sequence[torch.Generator], step: int, history: list[float]) -> None:  # fmt: skip
    partial = path.with_suffix(path.suffix + ".partial")
    states = [part.state_dict() for part in parts]
    torch.save({"parts": states, "generators": [g.get_state() for g in generators], "step": step, "history": history}, partial)  # fmt: skip
    os.replace(partial, path)


def _load_plus(path: Path | None, parts: Sequence[Any], generators: Sequence[torch.Generator]) -> tuple[int, list[float]]:  # fmt: skip
    if path is None or not path.exists():
        return 0, []
    state = torch.load(path, weights_only=True, map_location="cpu")
    for part, saved in zip(parts, state["parts"], strict=True):
        part.load_state_dict(saved)
    for generator, saved in zip(generators, state["generators"], strict=True):
        generator.set_state(saved)
    return int(state["step"]), list(state["history"])
