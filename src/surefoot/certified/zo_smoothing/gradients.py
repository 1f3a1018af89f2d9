"""Zeroth-order gradients: many samples and many directions in one batch of queries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from surefoot.errors import InvalidInput, check, check_at_least, check_choice, check_positive

Method = Literal["cge", "rge"]
Losses = Callable[[Tensor, Tensor], Tensor]  # (points [M, ...], int64 [M] which sample each belongs to) -> losses [M]


@dataclass(frozen=True)
class ZOEstimate:
    """Gradients of B separate losses, and what the queries said on the way."""

    gradient: Tensor  # like z [B, ...]
    loss: Tensor  # float64 [B]: the loss at z (RGE), or the mean over its probes, which is l(z) + O(mu^2) (CGE)
    queries: int


def zo_queries(batch: int, dim: int, method: Method = "cge", num_queries: int | None = None) -> int:
    """What `zo_gradient` asks for: 2 dim batch (CGE), or (num_queries + 1) batch (RGE, default num_queries = dim)."""
    check_choice("method", method, ("cge", "rge"))
    return 2 * dim * batch if method == "cge" else ((num_queries or dim) + 1) * batch


def zo_gradient(
    loss_fn: Losses,
    z: Tensor,  # float [B, ...]
    *,
    method: Method = "cge",
    mu: float = 0.005,
    num_queries: int | None = None,
    chunk: int = 4096,
    generator: torch.Generator | None = None,
) -> ZOEstimate:
    """Estimate the gradient of each sample's own loss at z from loss values alone.

    `loss_fn(points, rows)` gets at most `chunk` points with the sample each belongs to and must not average. "cge": central
    differences along every coordinate, exact up to O(mu^2) and rounding (about eps_machine l / mu: keep mu >= 1e-3 for float32
    losses of order one). "rge": `num_queries` random unit directions (needs `generator`), unbiased for linear losses with
    E |g - grad|^2 = (d - 1) |grad|^2 / num_queries. Differences are taken in float64.
    """
    check_choice("method", method, ("cge", "rge"))
    check_positive("mu", mu)
    check_at_least("chunk", chunk, 1)
    check(z.is_floating_point() and z.dim() >= 2, f"z must be floating point [B, ...], got {z.dtype} {list(z.shape)}.")
    estimate = _coordinates if method == "cge" else _directions
    if method == "cge":
        check(num_queries is None, "cge asks along every coordinate; num_queries is for rge.")
    else:
        check(generator is not None, "rge draws random directions; give a generator.")
    with torch.no_grad():
        return estimate(loss_fn, z.detach(), mu, num_queries, chunk, generator)


def surrogate(z: Tensor, gradient: Tensor) -> Tensor:  # scalar
    """mean_b <z_b, sg gradient_b>: its gradient in whatever made z is the chain rule's."""
    return (z * gradient.detach()).flatten(1).sum(1).mean()


def _coordinates(
    loss_fn: Losses, z: Tensor, mu: float, num_queries: int | None, chunk: int, generator: torch.Generator | None
) -> ZOEstimate:
    batch, dim = len(z), math.prod(z.shape[1:])
    flat, total = z.flatten(1), 2 * dim * batch
    values = torch.empty(total, dtype=torch.float64, device=z.device)
    for start in range(0, total, chunk):
        probe = torch.arange(start, min(start + chunk, total), device=z.device)
        rows, within = probe // (2 * dim), probe % (2 * dim)
        sign = torch.where(within < dim, 1, -1).to(z.dtype)  # mu itself must not pass through float32
        points = flat[rows]
        points[torch.arange(len(probe), device=z.device), within % dim] += mu * sign
        values[start : start + len(probe)] = _losses(loss_fn, points.view(-1, *z.shape[1:]), rows)
    values = values.view(batch, 2, dim)
    gradient = (values[:, 0] - values[:, 1]) / (2 * mu)
    return ZOEstimate(gradient.to(z.dtype).view_as(z), values.mean((1, 2)), total)


def _directions(
    loss_fn: Losses, z: Tensor, mu: float, num_queries: int | None, chunk: int, generator: torch.Generator | None
) -> ZOEstimate:
    assert generator is not None
    batch, dim = len(z), math.prod(z.shape[1:])
    count = dim if num_queries is None else num_queries
    check_at_least("num_queries", count, 1)
    gradient, base = torch.empty(batch, dim, dtype=z.dtype, device=z.device), []
    some = max(chunk // (count + 1), 1)  # samples whose probes fit into one chunk
    for start in range(0, batch, some):
        part = z[start : start + some].flatten(1)
        u = torch.randn((len(part), count, dim), dtype=z.dtype, device=generator.device, generator=generator)
        u = (u / u.norm(dim=2, keepdim=True)).to(z.device)
        points = torch.cat([part[:, None], part[:, None] + mu * u], 1).flatten(0, 1)
        rows = torch.arange(start, start + len(part), device=z.device).repeat_interleave(count + 1)
        pieces = zip(points.split(chunk), rows.split(chunk), strict=True)
        values = torch.cat([_losses(loss_fn, p.view(-1, *z.shape[1:]), r) for p, r in pieces]).view(-1, count + 1)
        weight = (values[:, 1:] - values[:, :1]) * (dim / (mu * count))
        gradient[start : start + len(part)] = torch.einsum("bk,bkd->bd", weight.to(z.dtype), u)
        base.append(values[:, 0])
    return ZOEstimate(gradient.view_as(z), torch.cat(base), (count + 1) * batch)


def _losses(loss_fn: Losses, points: Tensor, rows: Tensor) -> Tensor:  # float64 [M]
    values = loss_fn(points, rows)
    if values.shape != rows.shape:
        raise InvalidInput(f"loss_fn must give one loss a point, [{len(rows)}], got {list(values.shape)}: a mean over the batch mixes samples.")  # fmt: skip
    return values.double()
