"""Training what the mixture needs: a robust base, and the mixing network against attacks on the whole composite."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.adversarial.adaptive_smoothing.mixing import check_bases
from surefoot.adversarial.adaptive_smoothing.network import AdaptiveSmoothingClassifier
from surefoot.core.task import Task
from surefoot.core.treatment import Batch, Treatment
from surefoot.errors import check, check_at_least, check_choice, check_non_negative, check_positive
from surefoot.nn.attacks import Norm, attacking, pgd_train
from surefoot.nn.modes import frozen

Bounds = tuple[float, float] | None


def trades_loss(
    model: nn.Module,
    x: Tensor,  # [B, ...]
    y: Tensor,  # int64 [B]
    *,
    eps: float,
    beta: float = 6.0,
    steps: int = 10,
    norm: Norm = "linf",
    bounds: Bounds = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:  # scalar
    """CE(f(x), y) + beta KL(f(x) || f(x')), x' found in evaluation mode by ascending that divergence."""
    with attacking(model, "eval", generator or torch.Generator().manual_seed(0), x.device), torch.no_grad():
        target = model(x).softmax(1)

    def divergence(logits: Tensor, labels: Tensor) -> Tensor:
        return F.kl_div(logits.log_softmax(1), target, reduction="none").sum(1)

    attacked = pgd_train(model, x, y, eps=eps, norm=norm, steps=steps, loss=divergence, bounds=bounds, generator=generator)  # fmt: skip
    clean, moved = model(torch.cat([x, attacked])).chunk(2)
    return F.cross_entropy(clean, y) + beta * F.kl_div(moved.log_softmax(1), clean.softmax(1), reduction="batchmean")


@dataclass
class AdversarialTraining(Treatment):
    """TRADES with weight `beta`, or with `beta=None` plain adversarial training on attacked inputs alone."""

    slug: ClassVar[str] = "adversarial_training"

    eps: float = 0.1
    beta: float | None = 6.0
    steps: int = 5
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        check_positive("eps", self.eps)
        check_at_least("steps", self.steps, 1)
        check_choice("norm", self.norm, ("linf", "l2"))
        if self.beta is not None:
            check_non_negative("beta", self.beta)
        self.bounds_: Bounds = None

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        self.bounds_ = task.bounds
        return model, task

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        options = {"eps": self.eps, "steps": self.steps, "norm": self.norm, "bounds": self.bounds_, "generator": batch.generator}  # fmt: skip
        if self.beta is not None:
            return trades_loss(model, batch.x, batch.y, beta=self.beta, **options)
        return F.cross_entropy(model(pgd_train(model, batch.x, batch.y, **options)), batch.y)


# --- the mixing network ---------------------------------------------------------------------------------------------


def attack_composite(
    model: AdaptiveSmoothingClassifier,
    x: Tensor,  # [B, ...]
    y: Tensor,  # int64 [B]
    *,
    eps: float | Tensor,  # one radius, or one per example [B]
    steps: int = 10,
    gamma_weight: float = 0.0,
    decay: float = 0.0,
    norm: Norm = "linf",
    bounds: Bounds = (0.0, 1.0),
    generator: torch.Generator,
) -> Tensor:  # [B, ...]
    """Gradient ascent on (1 - w) CE + w BCE(gamma, 1) through the whole composite in evaluation mode.

    The second term pushes gamma down, so that the attack also hides itself from the mixing network; w = `gamma_weight`.
    `decay` keeps that share of the last gradient. Starts uniformly in the box, or for L2 at a random direction.
    """
    check_at_least("steps", steps, 1)
    check(0 <= gamma_weight <= 1, f"gamma_weight must lie in [0, 1], got {gamma_weight!r}.")
    x, shape = x.detach(), (-1, *[1] * (x.dim() - 1))
    radius = torch.as_tensor(eps, dtype=x.dtype, device=x.device).expand(len(x)).reshape(shape)
    low, high = (-math.inf, math.inf) if bounds is None else bounds

    def project(delta: Tensor) -> Tensor:
        if norm == "linf":
            delta = torch.minimum(torch.maximum(delta, -radius), radius)
        else:
            delta = delta * (radius / length(delta).clamp_min(1e-12)).clamp_max(1.0)
        return (x + delta).clamp(low, high)

    def length(delta: Tensor) -> Tensor:
        return torch.linalg.vector_norm(delta.flatten(1), dim=1).reshape(shape)

    noise = torch.rand(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device) * 2 - 1
    point, past = project(radius * noise), torch.zeros_like(x)
    with attacking(model, "eval", generator, x.device):
        for _ in range(steps):
            point = point.requires_grad_(True)
            logits, gamma, _ = model.mix(point)
            loss = (1 - gamma_weight) * F.cross_entropy(logits, y, reduction="sum") + gamma_weight * F.softplus(-gamma).sum()  # fmt: skip
            past = torch.autograd.grad(loss, point)[0] + decay * past
            way = past.sign() if norm == "linf" else past / length(past).clamp_min(1e-12)
            point = project(point.detach() + 2.5 / steps * radius * way - x)
    return point


def train_mixing_network(
    model: AdaptiveSmoothingClassifier,
    x: Tensor,  # [N, ...] training inputs
    y: Tensor,  # int64 [N]
    *,
    eps: float,
    norm: Norm = "linf",
    bounds: Bounds = (0.0, 1.0),
    epochs: int = 3,
    batch_size: int = 64,
    lr: float = 5e-5,
    weight_decay: float = 1e-5,
    steps: int = 10,
    strength: tuple[float, float] = (0.4, 0.7),  # radii eps (s0 + s1 u), u ~ U[0, 1), one per example
    gamma_weight: float = 0.4,  # most weight the attack gives to hiding from the mixing network
    decay: float = 0.9,  # most momentum of the attack
    weights: tuple[float, float, float] = (1.5, 0.0, 0.2),  # of BCE, CE and their product
    generator: torch.Generator,
) -> list[dict[str, float]]:
    """Train `model.mixing` (and gamma's statistics) to tell attacked inputs from clean ones, in place; the bases stay as they are.

    Each step attacks the composite as it stands with a strength, momentum and objective drawn afresh, and lowers, over the clean
    (t = 0) and attacked (t = 1) batch together, w1 BCE(gamma, t) + w2 CE + w3 BCE CE. Returns loss and the shares of gammas on
    their side of the middle, epoch by epoch. The learning rate falls to zero as a cosine; small networks want 1e-3.
    """
    check_positive("eps", eps)
    check_positive("lr", lr)
    check_at_least("epochs", epochs, 0)
    check_at_least("batch_size", batch_size, 2)
    check(len(x) >= 2, "Training the mixing network needs at least two examples.")
    device = next(model.mixing.parameters()).device
    check_bases(model.accurate, model.robust, x)
    optimizer = torch.optim.Adam(model.mixing.parameters(), lr, weight_decay=weight_decay)
    batches = max(1, len(x) // batch_size)
    total, step, history = epochs * batches, 0, []
    with frozen(model.accurate, model.robust), torch.enable_grad():
        for _ in range(epochs):
            order, sums = torch.randperm(len(x), generator=generator, device=generator.device).cpu(), torch.zeros(3)
            for index in order.tensor_split(batches):
                clean, labels = x[index.to(x.device)].to(device), y[index.to(y.device)].to(device)
                u = torch.rand(len(index) + 2, generator=generator, device=generator.device, dtype=x.dtype).to(device)
                radii = eps * (strength[0] + strength[1] * u[2:])
                attacked = attack_composite(
                    model, clean, labels, eps=radii, steps=steps, gamma_weight=gamma_weight * float(u[0]),
                    decay=decay * float(u[1]), norm=norm, bounds=bounds, generator=generator,
                )  # fmt: skip
                for group in optimizer.param_groups:
                    group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / total))
                loss, right = _mixing_loss(model, clean, attacked, labels, weights)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                sums += torch.tensor([loss.item(), *right])
                step += 1
            history.append(dict(zip(("loss", "clean_right", "attacked_right"), (sums / batches).tolist())))
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    return history


def _mixing_loss(
    model: AdaptiveSmoothingClassifier, clean: Tensor, attacked: Tensor, y: Tensor, weights: tuple[float, float, float]
) -> tuple[Tensor, tuple[float, float]]:
    model.train()
    logits, gamma, _ = model.mix(torch.cat([clean, attacked]))
    target = torch.cat([torch.zeros_like(gamma[: len(clean)]), torch.ones_like(gamma[len(clean) :])])
    bce = F.binary_cross_entropy_with_logits(gamma, target, reduction="none")
    ce = F.cross_entropy(logits, torch.cat([y, y]), reduction="none")
    above = (gamma.detach() > model.gamma_train[1]).double()
    right = (1 - above[: len(clean)].mean().item(), above[len(clean) :].mean().item())
    return (weights[0] * bce + weights[1] * ce + weights[2] * bce * ce).mean(), right
