"""Certified L2 radii of heads that are linear in their detections, in closed form and by bisection.

With u_k = dist_k / s_k and m = min u_k, everything is done in logarithms, so that detections may underflow:

    ln A = -m + ln sum_{D>0} D_k e^(m - u_k),   ln B likewise,   ln z* = (ln A - ln B) / 2 + asinh(C / (2 sqrt(AB)))

which is the root of the paper's quadratic without its cancellations; radius = min_k s_k ln z*. Shapes: B inputs, K components,
C classes, R = C - 1 rivals.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from surefoot.certified.prototype_rbf.head import (
    KERNELS,
    CBCHead,
    ClassificationByComponents,
    ComponentLogits,
    Kernel,
    detection,
)
from surefoot.errors import Refused, check, check_choice, check_positive
from surefoot.nn.modes import evaluating

Method = Literal["closed", "bisect"]
CHUNK = 2**22  # entries of [B, R, K] worked on at once


@dataclass(frozen=True)
class RadiusReport:
    """Radii of B inputs in the L2 norm, float64 on the CPU."""

    prediction: Tensor  # int64 [B]
    correct: Tensor  # bool [B]; all True where no labels were given
    radius: Tensor  # [B], 0 where wrong
    signed: Tensor  # [B], negative where wrong: how far the closed form says it is from right
    radius_paper: Tensor | None  # [B], with the terms of both classes kept apart (closed form only)
    space: Literal["input", "feature"]

    @property
    def median(self) -> float:
        return self.radius.median().item()

    @property
    def infinite(self) -> int:
        """How many radii are infinite: no change at all turns these."""
        return int(self.radius.isinf().sum())

    def certified(self, r: float) -> float:
        """Share of inputs that keep their right class under every change shorter than `r`."""
        return (self.correct & (self.radius >= r)).double().mean().item()


def rbf_radius(
    distances: Tensor,  # [B, K], to the components
    weights: Tensor,  # [K, C]
    bias: Tensor,  # [C]
    scale: Tensor | float,  # one number or [K]
    y: Tensor,  # int64 [B]
    *,
    kernel: Kernel = "exp",
    method: Method = "closed",
) -> Tensor:  # [B]
    """Signed radius within which sum_k weights[k, y] d_k + bias[y] stays the largest output; differentiable if closed.

    Negative where y is not the largest (the closed form, unbounded below; bisection gives 0). The Gaussian kernel needs
    `method="bisect"`, which is never smaller than the closed form. inf where no change can turn the answer.
    """
    scale = _check(distances, weights, bias, scale, y, kernel, method)
    rows, offset = _rivals(weights, bias, y)
    if method == "bisect":
        return _bisect(distances, rows, offset, scale, kernel).amin(1)
    plus = (rows.clamp_min(0), (-rows).clamp_min(0))
    return _closed(distances, *plus, offset, scale).amin(1)


def _check(
    distances: Tensor, weights: Tensor, bias: Tensor, scale: Tensor | float, y: Tensor, kernel: Kernel, method: Method
) -> Tensor:
    check_choice("kernel", kernel, KERNELS)
    check_choice("method", method, ("closed", "bisect"))
    check(kernel == "exp" or method == "bisect", 'The Gaussian kernel has no closed form; use method="bisect".')
    check(distances.dim() == 2 and weights.shape[:1] == distances.shape[1:], f"distances [B, K] and weights [K, C] must agree, got {list(distances.shape)} and {list(weights.shape)}.")  # fmt: skip
    check(bias.shape == weights.shape[1:] and len(bias) >= 2, f"bias must be [C] with C at least 2, got {list(bias.shape)} beside weights {list(weights.shape)}.")  # fmt: skip
    check(bool(torch.isfinite(distances).all() and (distances >= 0).all()), "distances must be finite and not negative.")  # fmt: skip
    check(bool(torch.isfinite(weights).all() and torch.isfinite(bias).all()), "weights and bias must be finite, got NaN or infinity.")  # fmt: skip
    check(y.dtype == torch.int64 and y.shape == distances.shape[:1], f"y must be int64 [B], got {y.dtype} {list(y.shape)}.")  # fmt: skip
    check(len(y) == 0 or (int(y.min()) >= 0 and int(y.max()) < len(bias)), f"y must lie in [0, {len(bias)}).")
    scale = torch.as_tensor(scale, dtype=distances.dtype, device=distances.device)
    check(scale.numel() in (1, distances.shape[1]), f"scale must be one number or one a component, got {scale.numel()} of them.")  # fmt: skip
    check(bool((scale > 0).all()), "scale must be positive.")
    return scale.reshape(-1)


def _others(y: Tensor, num_classes: int) -> Tensor:
    """The classes other than y, `[B, R]`. The row c = y must be absent: there A = B = C = 0, where no root has a gradient."""
    rivals = torch.arange(num_classes - 1, device=y.device).expand(len(y), -1)
    return rivals + (rivals >= y.unsqueeze(1))


def _rivals(weights: Tensor, bias: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """D `[B, R, K]` and C `[B, R]`. All pairs of classes first: C^2 K numbers, however many inputs."""
    classes = torch.arange(len(bias), device=bias.device)
    others = _others(classes, len(bias))
    columns = weights.T
    pairs = columns.unsqueeze(1) - columns[others]
    return pairs[y], (bias.unsqueeze(1) - bias[others])[y]


def _closed(
    distances: Tensor,  # [B, K]
    helpful: Tensor,  # [B, R, K] >= 0, what multiplies d in A
    harmful: Tensor,  # [B, R, K] >= 0, in B
    offset: Tensor,  # [B, R], C
    scale: Tensor,  # [1] or [K]
) -> Tensor:  # [B, R]
    ratio = distances / scale
    least = ratio.amin(1, keepdim=True).detach()  # factored out of A and B, and put back in logarithms
    d = (least - ratio).exp().unsqueeze(2)
    a, b = (helpful @ d).squeeze(2), (harmful @ d).squeeze(2)
    no_a, no_b = a <= 0, b <= 0
    log_a, log_b = a.where(~no_a, 1.0).log() - least, b.where(~no_b, 1.0).log() - least
    both = (log_a - log_b) / 2 + _asinh(offset, math.log(2) + (log_a + log_b) / 2)
    safe = offset.abs().where(offset != 0, 1.0).log()
    infinite = torch.full_like(offset, math.inf)
    without_b = torch.where((offset > 0) | ((offset == 0) & ~no_a), infinite, log_a - safe)
    without_b = torch.where(no_a & (offset < 0), -infinite, without_b)
    without_b = torch.where(no_a & (offset == 0), torch.zeros_like(offset), without_b)
    without_a = torch.where(offset > 0, safe - log_b, -infinite)
    return scale.amin() * torch.where(no_b, without_b, torch.where(no_a, without_a, both))


def _asinh(value: Tensor, log_unit: Tensor) -> Tensor:
    """asinh(value / e^log_unit), where the quotient may be far outside what a float holds."""
    log_ratio = value.abs().where(value != 0, 1.0).log() - log_unit
    small = value * (-log_unit).clamp(max=80.0).exp()
    large = log_ratio.clamp_min(0) + (1 + (1 + (-2 * log_ratio.clamp_min(0)).exp()).sqrt()).log()
    is_large = (log_ratio > 0) & (value != 0)
    return torch.where(is_large, value.sign() * large, torch.asinh(small.where(~is_large, 0.0)))


def _bisect(distances: Tensor, rows: Tensor, offset: Tensor, scale: Tensor, kernel: Kernel) -> Tensor:  # [B, R]
    """The largest t with a positive lower bound of the margin, from below; 0 where it is not positive at t = 0."""
    helpful, harmful = rows.clamp_min(0), (-rows).clamp_min(0)

    def margin(t: Tensor) -> Tensor:  # [B, R] -> [B, R]
        far = detection(distances.unsqueeze(1) + t.unsqueeze(2), scale, kernel)
        near = detection((distances.unsqueeze(1) - t.unsqueeze(2)).clamp_min(0), scale, kernel)
        return (helpful * far).sum(2) - (harmful * near).sum(2) + offset

    low = torch.zeros_like(offset)
    start, never = margin(low), offset - harmful.sum(2)
    # at infinity the helpful detections are gone; equality there is approached from above by exp, never reached
    infinite = (never > 0) | ((never == 0) & (helpful.sum(2) > 0))
    high = (distances.amax() + scale.amax()) * torch.ones_like(low)
    for _ in range(60):
        positive = margin(high) > 0
        if not bool((positive & ~infinite).any()):
            break
        high = torch.where(positive, 2 * high, high)
    for _ in range(100):
        middle = (low + high) / 2
        positive = margin(middle) > 0
        low, high = torch.where(positive, middle, low), torch.where(positive, high, middle)
    low = low.where(start > 0, 0.0)
    return torch.where(infinite & (start > 0), torch.full_like(low, math.inf), low)


# ------------------------------------------------------------------------------------------------ reports


def unwrap(module: nn.Module) -> ClassificationByComponents | CBCHead:
    """The head itself; `Refused` for anything else."""
    head = module.head if isinstance(module, ComponentLogits) else module
    if not isinstance(head, ClassificationByComponents | CBCHead):
        raise Refused(f"{type(module).__name__} is no head of components; its radius is not known in closed form.")
    return head


def cbc_radius(
    module: nn.Module,
    x: Tensor,  # [B, F] (or feature maps, for CBCHead)
    y: Tensor | None = None,  # int64 [B]; None: the radius of whatever is predicted
    *,
    method: Method = "closed",
    backbone: nn.Module | None = None,
    feature_space: bool = False,
    lipschitz: float | None = None,
) -> RadiusReport:
    """Certified radii in evaluation mode and float64, of the head alone or behind a `backbone` that x goes through first.

    A radius behind a backbone is one of features: ask for it with `feature_space=True`, or give the backbone's Lipschitz
    constant (`surefoot.nn.lipschitz.lipschitz_bound`) and get input radii, feature radius / L. The module is left as it was.
    """
    head = copy.deepcopy(unwrap(module)).double()
    check(x.is_floating_point() and len(x) > 0, f"x must hold floating point inputs, got {x.dtype} {list(x.shape)}.")
    check(bool(torch.isfinite(x).all()), "x must be finite, got NaN or infinity.")
    if backbone is not None and not feature_space and lipschitz is None:
        raise Refused("A radius behind a backbone is one of features, not of inputs: pass lipschitz= for input radii, or feature_space=True.")  # fmt: skip
    if lipschitz is not None:
        check_positive("lipschitz", lipschitz)
    with torch.no_grad(), evaluating(head):
        features = x.double()
        if backbone is not None:
            wide = copy.deepcopy(backbone).double()
            with evaluating(wide):
                features = wide(features)
        p = head(features)
        prediction = p.argmax(1)
        target = prediction if y is None else y.to(p.device)
        check(target.dtype == torch.int64 and target.shape == prediction.shape and bool(((target >= 0) & (target < p.shape[1])).all()), f"y must be int64 [B] with classes in [0, {p.shape[1]}).")  # fmt: skip
        signed, paper = _signed(head, features, target, method)
    by = 1.0 if lipschitz is None or feature_space else lipschitz
    signed, correct = signed / by, prediction == target
    radius = signed.clamp_min(0).where(correct, 0.0)
    paper = None if paper is None else (paper / by).clamp_min(0).where(correct, 0.0).cpu()
    maps = isinstance(head, CBCHead) and backbone is None and lipschitz is None  # what a deep head gets are features
    space = "feature" if feature_space or maps else "input"
    return RadiusReport(prediction.cpu(), correct.cpu(), radius.cpu(), signed.cpu(), paper, space)


def _signed(
    head: ClassificationByComponents | CBCHead, features: Tensor, y: Tensor, method: Method
) -> tuple[Tensor, Tensor | None]:
    weights, bias = head.reasoning.linear()
    if isinstance(head, CBCHead):
        return _detection_radius(head, features, y, weights, bias), None
    distances = head.distances(features)
    size = max(1, CHUNK // max(1, weights.numel()))
    parts, papers = [], []
    for dist, target in zip(distances.split(size), y.split(size), strict=True):
        parts.append(rbf_radius(dist, weights, bias, head.scale, target, kernel=head.kernel, method=method))
        if method == "closed":
            papers.append(_paper_radius(head, dist, target))
    return torch.cat(parts), torch.cat(papers) if papers else None


def _paper_radius(head: ClassificationByComponents, distances: Tensor, y: Tensor) -> Tensor:
    """The published grouping: A = sum (r+_y + r-_c) d, B = sum (r-_y + r+_c) d; never larger than the merged one."""
    present, absent = (part.T for part in head.reasoning.strengths())
    others = _others(y, len(present))
    helpful = present[y].unsqueeze(1) + absent[others]
    harmful = absent[y].unsqueeze(1) + present[others]
    bias = absent.sum(1)
    return _closed(distances, helpful, harmful, bias[y].unsqueeze(1) - bias[others], head.scale).amin(1)


def _detection_radius(head: CBCHead, features: Tensor, y: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """margin / (||D|| / 2): softmax is 1/2-Lipschitz, a maximum over positions 1-Lipschitz, all in L2 over the feature map."""
    if head.clamp:
        raise Refused("A head that clamps small detections jumps, and has no Lipschitz certificate; set clamp to 0.")
    rows, offset = _rivals(weights, bias, y)
    margins = (rows @ head.detect(features).unsqueeze(2)).squeeze(2) + offset
    return (2 * margins / rows.norm(dim=2).clamp_min(torch.finfo(margins.dtype).tiny)).amin(1)


@dataclass(frozen=True)
class CertifiedPrototypes:
    """Radii of a labelled set with the usual summaries."""

    report: RadiusReport
    accuracy: float
    median_radius: float
    infinite: int
    radii: tuple[float, ...]
    certified_accuracy: tuple[float, ...]


def certify_prototypes(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    radii: Sequence[float] = (0.25, 0.5, 0.75),
    *,
    method: Method = "closed",
    backbone: nn.Module | None = None,
    feature_space: bool = False,
    lipschitz: float | None = None,
) -> CertifiedPrototypes:
    """`cbc_radius` over (x, y) batches (a DataLoader, or `[(x, y)]`)."""
    parts = [
        cbc_radius(model, x, y, method=method, backbone=backbone, feature_space=feature_space, lipschitz=lipschitz)
        for x, y in batches
    ]
    check(len(parts) > 0, "There is nothing to certify: no batches were given.")
    join = {name: torch.cat([getattr(p, name) for p in parts]) for name in ("prediction", "correct", "radius", "signed")}  # fmt: skip
    papers = [p.radius_paper for p in parts if p.radius_paper is not None]
    report = RadiusReport(**join, radius_paper=torch.cat(papers) if papers else None, space=parts[0].space)
    certified = tuple(report.certified(r) for r in radii)
    return CertifiedPrototypes(
        report, report.correct.double().mean().item(), report.median, report.infinite, tuple(radii), certified
    )
