"""Fast certified training: a classifier with provable L-infinity robustness by interval bounds, in tens of epochs.

Train on the worst case that interval bounds allow, cross-entropy of [0, -m_1, ..., -m_{K-1}] with m_j a lower bound of
f_y - f_j over the box of radius eps_t, and let eps_t grow along a short ramp. Four ingredients keep a short ramp from exploding:

1. initialisation   W ~ N(0, s^2), s = sqrt(2 pi) / n, n = fan-in, for every affine layer but the classifier. An affine layer
                    multiplies the radius by n E|W|, a ReLU halves it, and n/2 E|W| = 1 gives s. Halved behind a join.
2. batch-norm       after every affine layer but the classifier, statistics from the clean batch.
3. L_tight          1/(tau m) sum_i relu(tau - D_0 / D_i): D_0 mean input radius, D_i mean radius before ReLU i of m.
4. L_relu           1/(tau m) sum_i [relu(tau - mean_ratio_i) + relu(tau - var_ratio_i)]: active (l > 0) and inactive (u < 0)
                    neurons shall weigh alike in mean and variance of the centres c = (l + u)/2; ratios folded to <= 1.

Total loss: robust cross-entropy + lambda_0 (1 - eps_t/eps) (L_tight + L_relu); before the ramp clean cross-entropy, with the
regularisers' bounds at eps 1e-6. Images `[B, C, H, W]` or vectors `[B, F]`; eps is in the scale of the data.

Source: Shi, Wang, Zhang, Yi & Hsieh, "Fast Certified Robust Training with Short Warmup", NeurIPS 2021, arXiv 2103.17268.
IBP training: Gowal et al. 2018, arXiv 1810.12715. CROWN-IBP (the trial's baseline): Zhang et al. 2020, arXiv 1906.06316.
"""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from surefoot.core.task import Task
from surefoot.core.treatment import Batch, Treatment
from surefoot.errors import (
    InvalidInput,
    Refused,
    check,
    check_at_least,
    check_choice,
    check_non_negative,
    check_positive,
)
from surefoot.nn.bounds import (
    Bounds,
    Program,
    Region,
    evaluating,
    interval_margins,
    margin_rows,
    propagate,
    region_around,
    robust_cross_entropy,
    specification_bound,
    supported,
)

AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
NATURAL_EPS = 1e-6  # radius of the regularisers' bounds while the task loss is still clean


# ------------------------------------------------------------------------------------------------ initialisation, surgery


def affine_layers(model: nn.Module) -> list[tuple[str, nn.Module, fx.Node]]:
    """Name, module and graph node of the linear and convolutional layers in the order of the forward pass; the last is the classifier."""
    found: dict[str, tuple[str, nn.Module, fx.Node]] = {}
    for node in Program(model).nodes:
        if node.op == "call_module" and isinstance(module := model.get_submodule(str(node.target)), AFFINE):
            found.setdefault(str(node.target), (str(node.target), module, node))
    if not found:
        raise InvalidInput(
            f"{type(model).__name__} has no linear or convolutional layer; certified training needs one."
        )
    return list(found.values())


@torch.no_grad()
def init_ibp_(
    model: nn.Module, *, generator: torch.Generator, skip_last: bool = True, halve_after_add: bool = True
) -> None:
    """Draw the weights from N(0, 2 pi / fan_in^2), in place; biases and the classifier stay.

    `halve_after_add`: a layer whose input passed a ReLU behind a join gets half of it, since two branches add radii.
    """
    layers = affine_layers(model)
    for _, module, node in layers[:-1] if skip_last else layers:
        weight = module.weight
        assert isinstance(weight, Tensor)
        std = math.sqrt(2 * math.pi) / weight[0].numel()
        if halve_after_add and _reads_a_join(node, model):
            std /= 2
        noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype, device=generator.device)
        weight.copy_(std * noise.to(weight.device))


def add_batchnorm(model: nn.Module) -> nn.Module:
    """Put batch-norm behind every affine layer but the classifier that has none yet, in place; returns the model.

    A layer `fc` becomes `Sequential(affine=fc, norm=BatchNorm)`.
    """
    for name, module, node in affine_layers(model)[:-1]:
        readers = [_module_of(user, model) for user in node.users]
        if len(readers) == 1 and isinstance(readers[0], NORMS):
            continue
        width = int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)  # type: ignore[arg-type]
        kind = nn.BatchNorm2d if isinstance(module, nn.Conv2d) else nn.BatchNorm1d
        weight = module.weight
        assert isinstance(weight, Tensor)
        norm = kind(width, device=weight.device, dtype=weight.dtype).train(module.training)
        model.set_submodule(name, nn.Sequential(OrderedDict(affine=module, norm=norm)))
    return model


def _module_of(node: fx.Node, model: nn.Module) -> nn.Module | None:
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def _reads_a_join(node: fx.Node, model: nn.Module) -> bool:
    """Whether the input of `node` is, up to pooling, reshaping and normalisation, a ReLU of a sum of two branches."""
    seen_relu = False
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        module = _module_of(node, model)
        if isinstance(module, AFFINE):
            return False
        if isinstance(module, nn.ReLU | nn.LeakyReLU) or node.target in (F.relu, torch.relu, F.leaky_relu, "relu"):
            if seen_relu:
                return False
            seen_relu = True
        branches = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if node.target in (operator.add, operator.iadd, torch.add, "add") and len(branches) == 2:
            return seen_relu
    return False


def cnn7(
    in_channels: int,
    image_size: int,
    *,
    width: int = 64,
    linear_size: int = 512,
    num_classes: int = 10,
    batch_norm: bool = True,
) -> nn.Sequential:
    """The paper's CNN-7: 3x3 convolutions of width w, w, 2w (stride 2), 2w, 2w, a hidden linear layer, the classifier."""
    check_at_least("image_size", image_size, 2)
    layers: list[nn.Module] = []
    channels = in_channels
    for out, stride in ((width, 1), (width, 1), (2 * width, 2), (2 * width, 1), (2 * width, 1)):
        layers += [nn.Conv2d(channels, out, 3, stride, padding=1), nn.ReLU()]
        channels = out
    features = channels * math.ceil(image_size / 2) ** 2
    head = [nn.Flatten(), nn.Linear(features, linear_size), nn.ReLU(), nn.Linear(linear_size, num_classes)]
    model = nn.Sequential(*layers, *head)
    if batch_norm:
        add_batchnorm(model)
    return model


# ------------------------------------------------------------------------------------------------ loss pieces


def smoothed_eps(t: float, length: float, eps: float, *, mid: float = 0.25, beta: float = 4.0) -> float:
    """Radius `t` steps into a ramp of `length`: alpha t^beta up to M = mid length, then the tangent line, reaching `eps` at the end."""
    check_at_least("length", math.ceil(length), 1)
    if t <= 0:
        return 0.0
    if t >= length:
        return eps
    m = mid * length
    alpha = eps / ((length - m) * beta * m ** (beta - 1) + m**beta)
    return alpha * t**beta if t <= m else alpha * (m**beta + beta * m ** (beta - 1) * (t - m))


def tightness_loss(
    bounds: Bounds,
    *,
    tol: float = 0.5,
) -> Tensor:  # scalar
    """L_tight: zero once no mean radius before a ReLU exceeds 1/tol times the input's."""
    _check_tol(tol)
    boxes = [box for _, box in bounds.rectifiers]
    if not boxes:
        return bounds.output.lower.new_zeros(())
    start = bounds.input.radius.mean()
    ratios = torch.stack([start / box.radius.mean().clamp(min=1e-12) for box in boxes])
    return F.relu(tol - ratios).sum() / (tol * len(boxes))


def relu_balance_loss(bounds: Bounds, *, tol: float = 0.5) -> Tensor:
    """L_relu: active and inactive neurons alike in mean and variance. A layer without both kinds is passed over."""
    _check_tol(tol)
    terms = [
        F.relu(tol - ratio).where(valid, 0.0)
        for _, box in bounds.rectifiers
        for ratio, valid in _balance_ratios(box.lower, box.upper)
    ]
    if not terms:
        return bounds.output.lower.new_zeros(())
    return torch.stack(terms).sum() / (tol * len(bounds.rectifiers))


def _balance_ratios(lower: Tensor, upper: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(ratio folded to <= 1, whether it means anything) for mean and variance; over the whole batch, never by example."""
    centre = (lower + upper) / 2
    active, inactive = (lower > 0).to(centre.dtype), (upper < 0).to(centre.dtype)
    spread = (centre - centre.mean()) ** 2
    pairs = (
        ((centre * active).mean(), -(centre * inactive).mean()),
        ((spread * active).sum(), (spread * inactive).sum()),
    )
    folded = []
    for over, under in pairs:
        valid = (over > 0) & (under > 0) & torch.isfinite(over) & torch.isfinite(under)
        # the replacement by 1 keeps the gradient of the branch not taken finite
        over, under = over.where(valid, 1.0), under.where(valid, 1.0)
        folded.append((torch.minimum(over / under, under / over), valid))
    return folded


def _check_tol(tol: float) -> None:
    check(0 < tol <= 1, f"tol must lie in (0, 1], got {tol!r}.")


def ibp_loss(
    model: nn.Module | Program,
    x: Tensor,  # [B, ...]
    y: Tensor,  # int64 [B]
    eps: float,
    *,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    reduction: Literal["mean", "none", "sum"] = "mean",
) -> Tensor:
    """Robust cross-entropy by IBP over everything within `eps` of `x`, in the mode the model is in; differentiable."""
    program = model if isinstance(model, Program) else Program(model)
    walked = _walk(program, x, eps, bounds)
    return robust_cross_entropy(interval_margins(walked, y), reduction=reduction)


def _walk(
    program: Program, x: Tensor, eps: float, limits: tuple[float, float] | None, *, clean: bool = False
) -> Bounds:
    """One walk; the clean batch goes along where it is asked for or batch-norm needs it."""
    box = region_around(x, eps, bounds=limits).box
    return propagate(program, box, clean=x if clean or program.needs_clean else None)


@dataclass(frozen=True)
class LayerHealth:
    """What the bounds look like before one ReLU. Shares are over batch and neurons and sum to 1."""

    name: str
    radius: float  # mean
    growth: float  # radius over the mean input radius
    active: float
    inactive: float
    unstable: float


@torch.no_grad()
def bound_health(
    model: nn.Module, x: Tensor, eps: float, *, bounds: tuple[float, float] | None = (0.0, 1.0)
) -> tuple[LayerHealth, ...]:
    """Mean radius and the shares of active, inactive and unstable neurons before every ReLU, in evaluation mode."""
    check_positive("eps", eps)
    with evaluating(model):
        walked = _walk(Program(model), x, eps, bounds)
    start = walked.input.radius.mean().item()
    report = []
    for name, box in walked.rectifiers:
        active, inactive = (box.lower > 0).double().mean().item(), (box.upper < 0).double().mean().item()
        radius = box.radius.mean().item()
        report.append(LayerHealth(name, radius, radius / start, active, inactive, 1.0 - active - inactive))
    return tuple(report)


# ------------------------------------------------------------------------------------------------ the plug


@dataclass
class FastIBP(Treatment):
    """Certified training at radius `eps`: `natural` share of the steps clean, then a ramp over the share `ramp`.

    Good with Adam, learning rate 5e-4 for long schedules and 4e-3 for short ones, times 0.2 at 70 % and 85 % of the run.
    `margins="crown-ibp"` starts from CROWN-IBP margins and fades to IBP along the ramp.
    """

    eps: float = 0.1
    natural: float = 0.05
    ramp: float = 0.35
    strength: float = 0.5  # lambda_0; 0 switches the regularisers off
    tol: float = 0.5
    terms: Sequence[str] = ("relu", "tightness")
    ibp_init: bool = True
    batch_norm: bool = True
    margins: Literal["ibp", "crown-ibp"] = "ibp"
    clip_norm: float | None = 10.0

    slug: ClassVar[str] = "fast_ibp"

    def __post_init__(self) -> None:
        check_positive("eps", self.eps)
        check_non_negative("natural", self.natural)
        check_positive("ramp", self.ramp)
        check(self.natural + self.ramp < 1, f"natural + ramp must be below 1, got {self.natural} + {self.ramp}.")
        check_non_negative("strength", self.strength)
        _check_tol(self.tol)
        for term in self.terms:
            check_choice("terms", term, ("relu", "tightness"))
        check_choice("margins", self.margins, ("ibp", "crown-ibp"))
        if self.clip_norm is not None:
            check_positive("clip_norm", self.clip_norm)
        self.terms = tuple(self.terms)
        self.bounds_: tuple[float, float] | None = None
        self.program_: Program | None = None

    def check(self, model: nn.Module, task: Task) -> None:
        affine_layers(model)
        if any(isinstance(m, nn.Dropout | nn.Dropout1d | nn.Dropout2d) and m.p > 0 for m in model.modules()):
            raise Refused("fast_ibp has no bounds for dropout in training; set its p to 0 or leave it out.")
        device = next(model.parameters()).device
        reason = supported(model, task.train.x[:2].to(device))
        if reason is not None:
            raise Refused(f"fast_ibp cannot bound this model: {reason}")

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        if self.ibp_init:
            init_ibp_(model, generator=task.generator("fast_ibp/init"))
        self.bounds_, self.program_ = task.bounds, None
        return (add_batchnorm(model) if self.batch_norm else model), task

    def eps_at(self, step: int, steps: int) -> float:
        """The radius of optimizer step `step` of `steps`."""
        return smoothed_eps(step - round(self.natural * steps), max(1, round(self.ramp * steps)), self.eps)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.program_ is None or self.program_.model is not model:
            self.program_ = Program(model)
        eps = self.eps_at(batch.step, batch.steps)
        natural = eps == 0
        walked = _walk(self.program_, batch.x, max(eps, NATURAL_EPS), self.bounds_, clean=natural)
        if natural:
            assert walked.logits is not None
            loss = F.cross_entropy(walked.logits, batch.y)
        else:
            loss = robust_cross_entropy(self._margins(walked, batch.y, eps))
        weight = self.strength * (1 - eps / self.eps)
        if weight > 0 and "tightness" in self.terms:
            loss = loss + weight * tightness_loss(walked, tol=self.tol)
        if weight > 0 and "relu" in self.terms:
            loss = loss + weight * relu_balance_loss(walked, tol=self.tol)
        return loss

    def _margins(self, walked: Bounds, y: Tensor, eps: float) -> Tensor:
        margins = interval_margins(walked, y)
        if self.margins == "ibp" or eps >= self.eps:
            return margins
        rows = margin_rows(y, walked.output.shape[1], margins.dtype)
        linear = specification_bound(walked, Region(walked.input), rows, method="crown-ibp", intersect=False)
        return (1 - eps / self.eps) * linear + (eps / self.eps) * margins

    def before_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), self.clip_norm)

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        self.program_ = None
        return model

    def rebuild(self, model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        return add_batchnorm(model) if self.batch_norm else model
