"""What people ask of bounds: intervals of the logits, linear bounds of a specification, margins, and proofs.

The margin of class j is m_j = f_y(x') - f_j(x'); its rows e_y - e_j are folded into the last affine layer before any |.|
("elision"), which is never looser than subtracting bounds of logits. An example is verified if every m_j > 0 over the
whole region. All functions put the model into evaluation mode and put every training flag back afterwards.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import check, check_choice, check_non_negative
from surefoot.nn.bounds.graph import Bounds, Program, propagate
from surefoot.nn.bounds.linear import Region, chunks, crown_refiner, lower_bound, optimised_lower_bound
from surefoot.nn.bounds.operators import Box, Dense

Method = Literal[
    "ibp", "crown-ibp", "alpha-crown-ibp", "crown", "alpha-crown"
]  # each at least as tight as those before, or dearer
Norm = Literal["linf", "l2"]
METHODS = ("ibp", "crown-ibp", "alpha-crown-ibp", "crown", "alpha-crown")
CHEAP = ("ibp", "crown-ibp")  # always tried first by `verified`
TOLERANCE = 1e-12  # of the scale of the logits' bounds: the room that rounding in float64 needs


def region_around(
    x: Tensor,  # [B, ...] raw scale
    eps: float,
    *,
    norm: Norm = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> Region:
    """All inputs within `eps` of `x` that are valid: the L-inf box or L2 ball, cut off at `bounds`.

    eps is in the scale of `x` itself; near the bounds the centre of the box is not `x`.
    """
    check(x.is_floating_point(), f"x must be floating point, got {x.dtype}; scale images to [0, 1] first.")
    check(len(x) > 0, "x must hold at least one example.")
    check_non_negative("eps", eps)
    check_choice("norm", norm, ("linf", "l2"))
    least, most = (v.item() for v in x.detach().aminmax())  # one pass in place of three: this stands in training steps
    check(math.isfinite(least) and math.isfinite(most), "x must be finite, got NaN or infinity.")
    low, high = x - eps, x + eps
    if bounds is not None:
        slack = 1e-6 * (bounds[1] - bounds[0])
        inside = bounds[0] - slack <= least and most <= bounds[1] + slack
        check(inside, f"x must lie in bounds {bounds}, got values from {least:.4g} to {most:.4g}.")
        low, high = low.clamp_(*bounds), high.clamp_(*bounds)
    return Region(Box(low, high)) if norm == "linf" else Region(Box(low, high), x, float(eps))


def margin_rows(
    y: Tensor,  # int64 [B]
    num_classes: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # [B, K-1, K]
    """Rows e_y - e_j for the classes j other than y, in rising order."""
    check(
        y.dtype == torch.int64 and y.dim() == 1, f"y must hold int64 class indices [B], got {y.dtype} {tuple(y.shape)}."
    )
    inside = bool(((y >= 0) & (y < num_classes)).all())
    check(inside, f"y must lie between 0 and {num_classes - 1}, got {y.min().item()} to {y.max().item()}.")
    eye = torch.eye(num_classes, dtype=dtype, device=y.device)
    others = torch.arange(num_classes - 1, device=y.device).expand(len(y), -1)
    others = others + (others >= y.unsqueeze(1))
    return eye[y].unsqueeze(1) - eye[others]


def interval_bounds(model: nn.Module, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Interval bounds `[B, K]`, `[B, K]` of the logits for inputs between `lower` and `upper` `[B, ...]`; differentiable."""
    check(lower.shape == upper.shape, f"lower {tuple(lower.shape)} and upper {tuple(upper.shape)} must have one shape.")
    check(bool((lower <= upper).all()), "lower must not exceed upper anywhere, and neither may be NaN.")
    with evaluating(model):
        output = propagate(Program(model), Box(lower, upper)).output
    return output.lower, output.upper


def linear_bounds(
    model: nn.Module,
    x: Tensor,  # [B, ...]
    eps: float,
    *,
    rows: Tensor | None = None,  # [B or 1, R, K]; None: the logits themselves
    method: Method = "crown",
    norm: Norm = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    intersect: bool = True,
    memory_mb: float = 256.0,
) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds `[B, R]` of the linear forms `rows` of the logits, over everything within `eps` of `x`.

    `intersect` cuts CROWN with IBP (CROWN alone may be looser); False gives CROWN as published. `memory_mb` limits one
    tensor of coefficients: more rows are done in turn. Raises `UnsupportedOp`, `InvalidInput`.
    """
    with evaluating(model):
        walked, region = _walk(Program(model), x, eps, method, norm, bounds, intersect, memory_mb)
        rows = _rows_or_identity(walked, rows)
        low = specification_bound(walked, region, rows, method=method, intersect=intersect, memory_mb=memory_mb)
        high = -specification_bound(walked, region, -rows, method=method, intersect=intersect, memory_mb=memory_mb)
    return low, high


def margin_bounds(
    model: nn.Module,
    x: Tensor,  # [B, ...]
    y: Tensor,  # int64 [B]
    eps: float,
    *,
    method: Method = "crown",
    norm: Norm = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    intersect: bool = True,
    memory_mb: float = 256.0,
) -> Tensor:  # [B, K-1]
    """Lower bounds of the margins f_y - f_j over everything within `eps` of `x`; see `linear_bounds`."""
    with evaluating(model):
        walked, region = _walk(Program(model), x, eps, method, norm, bounds, intersect, memory_mb)
        rows = margin_rows(_same_length(y, x), walked.output.shape[1], x.dtype)
        return specification_bound(walked, region, rows, method=method, intersect=intersect, memory_mb=memory_mb)


def interval_margins(bounds: Bounds, y: Tensor) -> Tensor:
    """Elided IBP margins `[B, K-1]` from a finished walk, differentiable: the piece a training loss needs."""
    rows = margin_rows(y, bounds.output.shape[1], bounds.output.lower.dtype)
    return specification_bound(bounds, Region(bounds.input), rows, method="ibp")


def specification_bound(
    bounds: Bounds,
    region: Region,
    rows: Tensor,  # [Bz, R, K]
    *,
    method: Method,
    intersect: bool = True,
    memory_mb: float = 256.0,
) -> Tensor:  # [B, R]
    """Lower bounds of rows of the logits from a finished walk."""
    if method == "ibp":
        return _elided(bounds, region, rows)
    parts = []
    for part in chunks(rows.shape[1], bounds.steps[: bounds.end + 1], memory_mb):
        a = rows[:, part]
        if method.startswith("alpha"):
            low = optimised_lower_bound(bounds.steps, bounds.end, a, region)
        else:
            low = lower_bound(bounds.steps, bounds.end, a, region)
        if intersect:
            low = torch.fmax(low, _elided(bounds, region, a))
        parts.append(low)
    return torch.cat(parts, 1)


def _elided(bounds: Bounds, region: Region, rows: Tensor) -> Tensor:
    """(C W) c + C b - |C W| r: rows folded into a last linear layer, else through all affine steps at the end."""
    last = bounds.steps[bounds.end]
    if isinstance(last.op, Dense):
        below = bounds.steps[last.parents[0]].box
        return below.minimum(last.op.pull(rows, [below.shape])[0]) + last.op.offset(rows)
    return lower_bound(bounds.steps, bounds.end, rows, region, relax=False)


@torch.no_grad()
def verified(
    model: nn.Module,
    x: Tensor,  # [B, ...]
    y: Tensor,  # int64 [B]
    eps: float,
    *,
    method: Method = "crown",
    norm: Norm = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    batch_size: int = 64,
    memory_mb: float = 256.0,
) -> Tensor:  # bool [B]
    """Which examples keep class `y` over everything within `eps`: proven for True, open for False.

    Works in float64 on a copy of the model, cheapest method first: IBP, then, for what is still open, the methods up to
    `method`. A margin counts only above `TOLERANCE` (1e-12) of the scale of the logits' bounds, the room that float64 rounding needs, so a
    tie (margin 0) is never verified, nor is a NaN. Raises `UnsupportedOp`, `InvalidInput`.
    """
    check_choice("method", method, METHODS)
    region_around(x, eps, norm=norm, bounds=bounds)  # says what is wrong with the input before anything is copied
    _same_length(y, x)
    exact = copy.deepcopy(model).double().eval()
    ladder: list[Method] = [m for m in METHODS[: METHODS.index(method) + 1] if m == method or m in CHEAP]  # type: ignore[misc]
    proofs = []
    for points, labels in zip(x.double().split(batch_size), y.split(batch_size), strict=True):
        check(bool(torch.isfinite(exact(points)).all()), "The model's logits must be finite, got NaN or infinity.")
        proven = torch.zeros(len(points), dtype=torch.bool, device=points.device)
        for rung in ladder:
            still_open = (~proven).nonzero().flatten()
            if len(still_open):
                proven[still_open] = _prove(
                    exact, points[still_open], labels[still_open], eps, rung, norm, bounds, memory_mb
                )
        proofs.append(proven)
    return torch.cat(proofs)


def _prove(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, method: Method, norm: Norm,
    bounds: tuple[float, float] | None, memory_mb: float,
) -> Tensor:  # fmt: skip
    walked, region = _walk(Program(model), x, eps, method, norm, bounds, True, memory_mb)
    rows = margin_rows(y, walked.output.shape[1], x.dtype)
    margins = specification_bound(walked, region, rows, method=method, memory_mb=memory_mb)
    scale = torch.maximum(walked.output.lower.abs(), walked.output.upper.abs()).amax(1, keepdim=True)
    return (margins > TOLERANCE * scale).all(1) & torch.isfinite(scale).squeeze(1)


def _walk(
    program: Program, x: Tensor, eps: float, method: Method, norm: Norm,
    bounds: tuple[float, float] | None, intersect: bool, memory_mb: float,
) -> tuple[Bounds, Region]:  # fmt: skip
    check_choice("method", method, METHODS)
    region = region_around(x, eps, norm=norm, bounds=bounds)
    full = method in ("crown", "alpha-crown")
    refine = crown_refiner(region, intersect=intersect, memory_mb=memory_mb) if full else None
    walked = propagate(program, region.box, refine=refine)
    shape = walked.output.shape
    check(len(shape) == 2, f"The model must return logits [B, K], got the shape {tuple(shape)}.")
    return walked, region


def _rows_or_identity(walked: Bounds, rows: Tensor | None) -> Tensor:
    classes = walked.output.shape[1]
    if rows is None:
        return torch.eye(classes, dtype=walked.output.lower.dtype, device=walked.output.lower.device).unsqueeze(0)
    good = rows.dim() == 3 and rows.shape[2] == classes and rows.shape[0] in (1, walked.output.shape[0])
    check(good, f"rows must have the shape [B or 1, R, {classes}], got {tuple(rows.shape)}.")
    return rows


def _same_length(y: Tensor, x: Tensor) -> Tensor:
    check(len(y) == len(x), f"y has {len(y)} labels for {len(x)} examples.")
    return y


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's training flag as it was outside."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def robust_cross_entropy(
    margins: Tensor,  # [B, K-1] lower bounds of f_y - f_j
    *,
    reduction: Literal["mean", "none", "sum"] = "mean",
) -> Tensor:
    """Cross-entropy of the worst-case logits [0, -m_1, ..., -m_{K-1}] with target 0: an upper bound of the loss over the region."""
    worst = F.pad(-margins, (1, 0))
    return F.cross_entropy(worst, torch.zeros(len(worst), dtype=torch.int64, device=worst.device), reduction=reduction)
