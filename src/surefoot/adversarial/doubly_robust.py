"""Doubly robust adversarial training: weight the examples that are most easily broken, by a principled rule.

    min_theta max_{w in simplex} sum_i w_i l_i(theta, d_i*) - r sum_i w_i ln(M w_i)  =  min_theta r ln mean_i exp(l_i / r)

The inner maximum over weights has the closed form w_i = softmax(l / r)_i (`kl_weights`, `kl_objective`): r -> inf is plain
adversarial training, r -> 0 the worst example alone. The attack d_i* is the solution of a problem of its own, with a log barrier that keeps it
inside the box lb < d < ub (the ball cut with the bounds), so that it can be differentiated:

    d* = argmin  -CE(theta, d) + lambda/2 ||d||^2 - c sum_k [ln(ub_k - d_k) + ln(d_k - lb_k)]
    H v = grad_d CE,   H = lambda I + c diag(1/(ub - d)^2 + 1/(d - lb)^2) - d^2 CE / dd^2
    d l / d theta = grad_theta l + grad_theta <grad_d CE, v>                     (the mixed derivative of the attack's -CE, sign turned)

The last term of H is zero almost everywhere for piecewise-linear logits and a piecewise-linear loss; cross-entropy and smooth
activations bend, so that leaving it out (`barrier_hessian`) is an approximation there and `solve_response` does not.

A batch's softmax is a biased ratio; `KLDROLoss` divides by a running mean u of exp(l / r) instead, kept as its logarithm:
ln u <- logaddexp(ln(1 - eta) + ln u, ln eta + logmeanexp(l / r)), weights exp(l / r - ln u), cut at `max_weight`.

The attack runs with batch-norm in evaluation mode, the update in training mode: two different gradients, and g of one over H of the
other's d is without bound. `barrier_response` therefore takes v from the place d alone. A pixel at the border of the valid range has
ub = 0 or lb = 0; it may move one way only, and has a barrier at both ends of that way all the same (black background stays attackable).

Source: Sow, Lin, Wang & Liang, "Doubly Robust Instance-Reweighted Adversarial Training", ICLR 2024, arXiv 2308.00311.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.core.task import Task
from surefoot.core.treatment import Batch, Treatment
from surefoot.errors import Refused, check, check_at_least, check_non_negative, check_positive
from surefoot.nn.attacks import attacking, pgd_train

INSIDE = 1e-3  # share of the box's half-width that a point keeps from its walls
SMOOTH = (
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.ELU,
    nn.SELU,
    nn.CELU,
)  # activations that bend


def kl_weights(
    losses: Tensor,  # [M]
    temperature: float,
) -> Tensor:  # [M], sums to 1
    """The worst-case weights, exp(l_i / r) / sum_j exp(l_j / r)."""
    _check_losses(losses)
    check_positive("temperature", temperature)
    return (losses / temperature).softmax(0)


def kl_objective(
    losses: Tensor,  # [M]
    temperature: float,
) -> Tensor:  # scalar
    """r ln mean exp(l / r): between the mean and the largest loss, with gradient `kl_weights`."""
    _check_losses(losses)
    check_positive("temperature", temperature)
    return temperature * ((losses / temperature).logsumexp(0) - math.log(len(losses)))


def _check_losses(losses: Tensor) -> None:
    check(losses.dim() == 1 and len(losses) > 0, f"losses must be a non-empty [B], got {tuple(losses.shape)}.")
    check(bool(torch.isfinite(losses).all()), "The losses must be finite, got NaN or infinity.")


class KLDROLoss(nn.Module):
    """Mean of w_i l_i with weights exp(l_i / r) / u held fixed; u is tracked over batches in training mode.

    `temperature` may be changed between batches: the tracked objective r ln u is kept. inf is plain averaging.
    """

    log_u: Tensor
    clipped: Tensor

    def __init__(self, temperature: float, *, momentum: float = 0.1, max_weight: float = 20.0) -> None:
        super().__init__()
        check(temperature > 0, f"temperature must be positive, got {temperature!r}.")
        check(0.0 < momentum <= 1.0, f"momentum must lie in (0, 1], got {momentum!r}.")
        check_positive("max_weight", max_weight)
        self.temperature, self.momentum, self.max_weight = temperature, momentum, max_weight
        self.register_buffer("log_u", torch.tensor(math.nan, dtype=torch.float64))  # NaN until the first batch
        self.register_buffer("clipped", torch.zeros((), dtype=torch.int64))  # how many weights were cut so far

    def change_temperature(self, temperature: float) -> None:
        """u belongs to the old r: ln u <- ln u r_old / r_new, or every weight would be wrong by orders of magnitude."""
        check(temperature > 0, f"temperature must be positive, got {temperature!r}; a schedule must not reach zero.")
        if math.isinf(temperature) or math.isinf(self.temperature):
            self.log_u.fill_(math.nan)
        else:
            self.log_u.mul_(self.temperature / temperature)
        self.temperature = temperature

    @torch.no_grad()
    def weights(
        self,
        losses: Tensor,  # [B]
    ) -> Tensor:  # [B]
        """The batch's weights (mean about 1), after the tracker took it in."""
        _check_losses(losses)
        if math.isinf(self.temperature):
            return torch.ones_like(losses)
        scaled = losses.double() / self.temperature
        now = scaled.logsumexp(0) - math.log(len(losses))
        log_u = self.log_u.to(now.device)
        if bool(log_u.isnan()):
            log_u = now
        elif self.training:
            eta = self.momentum
            log_u = now if eta == 1.0 else torch.logaddexp(math.log1p(-eta) + log_u, math.log(eta) + now)
        if self.training:
            self.log_u.copy_(log_u)
        weights = (scaled - log_u).exp()
        if self.training:
            self.clipped += (weights > self.max_weight).sum().to(self.clipped.device)
        return weights.clamp(max=self.max_weight).to(losses.dtype)

    def forward(
        self,
        losses: Tensor,  # [B]
    ) -> Tensor:  # scalar
        return (self.weights(losses.detach()) * losses).mean()


def box(x: Tensor, eps: float, bounds: tuple[float, float] | None) -> tuple[Tensor, Tensor]:  # lb, ub as x
    """lb = max(-eps, low - x) and ub = min(eps, high - x)."""
    low, high = (-math.inf, math.inf) if bounds is None else bounds
    return (low - x).clamp(min=-eps, max=0.0), (high - x).clamp(min=0.0, max=eps)


def barrier_step(
    gradient: Tensor,  # any shape
    lb: Tensor,
    ub: Tensor,
    barrier: float,
) -> Tensor:
    """The d in (lb, ub) with c/(ub - d) - c/(d - lb) = g: stationary for the linearised loss and the barrier.

    With half-width h and s the place about the box's middle, 2 c s = g (h^2 - s^2), so s = (-c + sqrt(c^2 + g^2 h^2)) / g, written
    here as g h^2 / (c + sqrt(c^2 + g^2 h^2)), which does not cancel at g = 0.
    """
    half, middle = (ub - lb) / 2, (ub + lb) / 2
    place = gradient * half.square() / (barrier + (gradient * half).hypot(gradient.new_tensor(barrier)))
    return middle + place.clamp(-(1 - INSIDE) * half, (1 - INSIDE) * half)


def barrier_attack(
    model: nn.Module,
    x: Tensor,  # [B, ...] within bounds
    y: Tensor,  # int64 [B]
    *,
    eps: float,
    steps: int = 10,
    step_size: float | None = None,
    barrier: float = 1e-5,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:  # [B, ...], the change d strictly inside its box
    """Signed gradient steps in the Linf ball, then the closed-form barrier step from the last gradient (`barrier_step`)."""
    check_positive("eps", eps)
    check_positive("barrier", barrier)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    moved = pgd_train(model, x, y, eps=eps, steps=steps, step_size=step_size, bounds=bounds, generator=generator)
    with attacking(model, "eval", generator, x.device):
        point = moved.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)
    return barrier_step(gradient, *box(x, eps, bounds), barrier)


def barrier_hessian(
    delta: Tensor, lb: Tensor, ub: Tensor, barrier: float, ridge: float = 0.0
) -> Tensor:  # diagonal, as delta
    """lambda + c (1/(ub - d)^2 + 1/(d - lb)^2); inf at a pixel without any room."""
    return ridge + barrier * ((ub - delta).square().reciprocal() + (delta - lb).square().reciprocal())


def barrier_response(
    delta: Tensor,  # [B, ...] as `barrier_step` gives it
    lb: Tensor,
    ub: Tensor,
) -> Tensor:  # [B, ...]
    """v = g / H where d is stationary, g = c/(ub - d) - c/(d - lb): s (h^2 - s^2) / (h^2 + s^2) in half-width h and place s.

    c cancels, and |v| <= 0.3003 h: that is all the implicit term can move.
    """
    half, place = (ub - lb) / 2, delta - (ub + lb) / 2
    v = place * (half.square() - place.square()) / (half.square() + place.square())
    return v.masked_fill_(half <= 0, 0.0)


def implicit_correction(
    losses: Tensor,  # [B], of `point`
    point: Tensor,  # [B, ...], x + d, which requires a gradient
    response: Tensor,  # [B, ...], v
) -> Tensor:  # [B], zero in value
    """<grad_d l, v> - its value, v held fixed: add it to the losses for the gradient through the attack (a double backward).

    Takes the losses' own forward pass, so that batch-norm counts the batch once. In training mode batch statistics couple the
    examples of a batch; their influence on each other's losses is in grad_d l.
    """
    check(losses.dim() == 1 and len(losses) == len(point), f"losses must hold one value for each of the {len(point)} points, got {tuple(losses.shape)}.")  # fmt: skip
    check(point.requires_grad and point.shape == response.shape, "point must require a gradient before the model sees it, and have the shape of response.")  # fmt: skip
    (slope,) = torch.autograd.grad(losses.sum(), point, create_graph=True)
    inner = (slope * response.detach()).flatten(1).sum(1)
    return inner - inner.detach()


def solve_response(
    losses: Tensor,  # [B], of `point`
    point: Tensor,  # [B, ...], x + d, which requires a gradient
    hessian: Tensor,  # [B, ...], the attack's own diagonal: `barrier_hessian`
    *,
    steps: int = 5,
) -> Tensor:  # [B, ...]
    """v with the loss's curvature in H, by conjugate gradients from the diagonal solution; needs independent examples.

    A step costs one Hessian-vector product. An example stops where H is not positive: there d is no minimum of the attack.
    """
    check_at_least("steps", steps, 1)
    check(bool((hessian > 0).all()), "An implicit gradient needs a curved attack: hessian must be positive; give a barrier or a ridge.")  # fmt: skip
    (slope,) = torch.autograd.grad(losses.sum(), point, create_graph=True)

    def times(v: Tensor) -> Tensor:
        if not slope.requires_grad:  # losses linear in the point
            return hessian * v
        (bend,) = torch.autograd.grad(slope, point, v, retain_graph=True, materialize_grads=True)
        return hessian * v - bend

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.dim() - 1))

    v = slope.detach() / hessian
    rest = slope.detach() - times(v)
    way = near = rest / hessian
    size = dot(rest, near)
    for _ in range(steps):
        moved = times(way)
        curve = dot(way, moved)
        length = torch.where(curve > 0, size / curve.clamp_min(torch.finfo(v.dtype).tiny), 0.0)
        v, rest = v + length * way, rest - length * moved
        near = rest / hessian
        before, size = size, dot(rest, near)
        way = near + torch.where(before > 0, size / before.clamp_min(torch.finfo(v.dtype).tiny), 0.0) * way
    return v


def tail_robust_accuracy(
    per_class: Tensor,  # [K] robust accuracies, NaN for a class without test examples
    fraction: float = 0.3,
) -> float:
    """Mean over the max(1, round(fraction K)) weakest classes *of this model*; classes without examples do not count."""
    check(0.0 < fraction <= 1.0, f"fraction must lie in (0, 1], got {fraction!r}.")
    known = per_class.double()[~per_class.isnan()]
    check(len(known) >= 2, f"A tail needs at least two classes with test examples, got {len(known)}.")
    return known.sort().values[: max(1, round(fraction * len(known)))].mean().item()


@dataclass
class DoublyRobust(Treatment):
    """Adversarial training (Linf) with KL-robust weights; r goes down from `warm` times its value after a first phase.

    `temperature=inf` is PGD adversarial training. `implicit`: end the attack with the barrier step and add the gradient through
    it, a double backward more each step; `barrier` is used there only.
    """

    slug: ClassVar[str] = "doubly_robust"
    eps: float = 0.1
    temperature: float = 0.5
    steps: int = 5
    barrier: float = 1e-3  # c, as a multiple of eps^2
    implicit: bool = False
    momentum: float = 0.1
    max_weight: float = 20.0
    warm: float = 10.0
    warm_share: float = 0.1
    loss_: KLDROLoss | None = field(default=None, init=False, repr=False, compare=False)
    bounds_: tuple[float, float] | None = field(default=None, init=False, repr=False, compare=False)

    def check(self, model: nn.Module, task: Task) -> None:
        for name in ("eps", "warm"):
            check_positive(name, getattr(self, name))
        KLDROLoss(self.temperature, momentum=self.momentum, max_weight=self.max_weight)
        check_at_least("steps", self.steps, 1)
        check_non_negative("barrier", self.barrier)
        check(self.barrier > 0 or not self.implicit, f"implicit=True needs a positive barrier, got {self.barrier!r}.")
        check(0.0 <= self.warm_share < 1.0, f"warm_share must lie in [0, 1), got {self.warm_share!r}.")
        bent = sorted({type(module).__name__ for module in model.modules() if isinstance(module, SMOOTH)})
        if self.implicit and bent:
            warnings.warn(f"implicit=True leaves out how {', '.join(bent)} bend the attack's objective, so that the gradient through it is approximate; in a loop of your own solve_response (conjugate gradients) takes that in.", stacklevel=3)  # fmt: skip
        if task.bounds is None:
            raise Refused("doubly_robust needs the valid range of the inputs to say how large a small change is; the data has no bounds.")  # fmt: skip

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        self.bounds_ = task.bounds
        self.loss_ = KLDROLoss(self._temperature(0.0), momentum=self.momentum, max_weight=self.max_weight).to(task.device)  # fmt: skip
        return model, task

    def _temperature(self, done: float) -> float:
        """`warm` r at first, then linearly down to r at twice `warm_share`."""
        over = 1.0 if self.warm_share == 0 else min(max(done / self.warm_share - 1.0, 0.0), 1.0)
        return self.temperature * (self.warm + over * (1.0 - self.warm))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        assert self.loss_ is not None
        if (r := self._temperature(batch.step / batch.steps)) != self.loss_.temperature:
            self.loss_.change_temperature(r)
        shared = {"eps": self.eps, "steps": self.steps, "step_size": self.eps / 3, "bounds": self.bounds_, "generator": batch.generator}  # fmt: skip
        c = self.barrier * self.eps**2
        if not self.implicit:
            losses = F.cross_entropy(model(pgd_train(model, batch.x, batch.y, **shared)), batch.y, reduction="none")
            return self.loss_(losses)
        delta = barrier_attack(model, batch.x, batch.y, barrier=c, **shared)
        point = (batch.x + delta).requires_grad_()
        losses = F.cross_entropy(model(point), batch.y, reduction="none")
        through = implicit_correction(losses, point, barrier_response(delta, *box(batch.x, self.eps, self.bounds_)))
        return (self.loss_.weights(losses.detach()) * (losses + through)).mean()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.loss_ is None else {**self.loss_.state_dict(), "temperature": self.loss_.temperature}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state and self.loss_ is not None:
            rest = dict(state)
            self.loss_.temperature = float(rest.pop("temperature"))
            self.loss_.load_state_dict(rest)
