"""Compositing of splats on an image in tiles, vectorised, with its gradient written out: the second half of `surefoot.nn.geometry.rasterizer`.

A splat at u with inverse covariance Q (the conic) and opacity o covers a pixel p by alpha = min(0.99, o exp(-(p - u)^T Q (p - u) / 2)), nothing
below 1/255. Front to back,

    C = sum_i c_i alpha_i T_i,  T_i = prod_{j < i} (1 - alpha_j),  T_end = prod_i (1 - alpha_i)

and a pixel ends before the splat that would bring T below 1e-4.

Why it is fast without a compiled kernel: splats are sorted by depth, then by tile; tiles of similar list length are worked on together.
log alpha is a quadratic polynomial of the pixel, so the exponents of a bucket are one matrix product of six coefficients a splat
with six monomials a pixel; backward, the six moments of the gradient against the same monomials are one more. With g = dL/dC,
v_i = c_i . g and S_i = sum_{j > i} v_j alpha_j T_j + T_end (dL/dT_end), the gradient is dL/d alpha_i = T_i v_i - S_i / (1 - alpha_i).
Alphas are recomputed in the backward pass, so memory does not grow with pixels times splats.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

LEAST_ALPHA, MOST_ALPHA, LEAST_T = 1 / 255, 0.99, 1e-4
# (tile, pixel, splat) triples worked on at once: on a CPU few enough to stay in the cache, elsewhere many to keep the device busy
BUCKET_ELEMENTS, DEVICE_BUCKET_ELEMENTS = 200_000, 2_000_000


class TileLists(NamedTuple):
    """Which splats each tile composites, front to back."""

    splat: Tensor  # int64 [M]: rows of the splats, tile after tile
    start: Tensor  # int64 [T]
    length: Tensor  # int64 [T]
    columns: int  # tiles in a row of the image


@torch.no_grad()
def bin_splats(
    means2d: Tensor,  # [N, 2]
    radii: Tensor,  # int64 [N], 0 where culled
    depth: Tensor,  # [N]
    width: int,
    height: int,
    tile: int,
) -> TileLists:
    """Each splat into every tile that its box of 3 standard deviations touches, sorted by depth within the tile."""
    columns, rows = -(-width // tile), -(-height // tile)
    seen = radii.nonzero().squeeze(1)
    order = seen[torch.sort(depth[seen], stable=True).indices]
    mean, radius = means2d[order], radii[order, None]
    limit = torch.tensor([columns, rows], device=mean.device)
    low = ((mean - radius) / tile).floor().long().clamp_min(0)
    high = torch.minimum(((mean + radius) / tile).floor().long() + 1, limit)
    extent = (high - low).clamp_min(0)
    count = extent[:, 0] * extent[:, 1]
    which = torch.repeat_interleave(torch.arange(len(order), device=mean.device), count)
    within = torch.arange(len(which), device=mean.device) - (count.cumsum(0) - count)[which]
    across = extent[which, 0]
    key = (low[which, 1] + within // across) * columns + low[which, 0] + within % across
    key, by_tile = torch.sort(key, stable=True)
    length = torch.bincount(key, minlength=columns * rows)
    return TileLists(order[which[by_tile]], length.cumsum(0) - length, length, columns)


class Bucket(NamedTuple):
    tiles: Tensor  # int64 [T]
    splat: Tensor  # int64 [T, K], 0 where padded
    real: Tensor | None  # bool [T, K], None where nothing is padded


def buckets(lists: TileLists, tile: int) -> Iterator[Bucket]:
    """Tiles of similar list length (within a quarter of the longest), as many as keep the work in the cache."""
    order = torch.argsort(lists.length, descending=True)
    lengths = lists.length[order].tolist()
    device, first = lists.splat.device, 0
    elements = BUCKET_ELEMENTS if device.type == "cpu" else DEVICE_BUCKET_ELEMENTS
    while first < len(lengths) and lengths[first] > 0:
        longest = lengths[first]
        most = max(1, elements // (longest * tile * tile))
        last = first
        while last < len(lengths) and last - first < most and lengths[last] >= 0.75 * longest:
            last += 1
        tiles = order[first:last]
        offset = torch.arange(longest, device=device)
        real = offset < lists.length[tiles, None] if lengths[last - 1] < longest else None
        where = lists.start[tiles, None] + offset
        splat = lists.splat[where.clamp(max=len(lists.splat) - 1)]
        yield Bucket(tiles, splat if real is None else splat * real, real)
        first = last


def composite(
    shape: Tensor,  # [N, 6]: u, v, conic a, b, c, opacity
    channels: Tensor,  # [N, C]
    depth: Tensor,  # [N], for the median depth
    lists: TileLists,
    width: int,
    height: int,
    tile: int,
) -> tuple[Tensor, Tensor, Tensor]:  # image [H, W, C], T_end [H, W], median depth [H, W]
    """Every tile front to back; differentiable in `shape` and `channels`."""
    tiled, t_end, median = _Composite.apply(shape, channels, depth, lists, tile)  # type: ignore[misc]

    def picture(x: Tensor) -> Tensor:  # [tiles, tile^2, ...] -> [H, W, ...]
        grid = (
            x.unflatten(0, (-1, lists.columns)).unflatten(2, (tile, tile)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        )
        return grid[:height, :width]

    return picture(tiled), picture(t_end), picture(median)


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: Tensor, channels: Tensor, depth: Tensor, lists: TileLists, tile: int) -> Any:
        tiles, pixels = len(lists.length), tile * tile
        image = channels.new_zeros(tiles, pixels, channels.shape[1])
        t_end, median = channels.new_ones(tiles, pixels), channels.new_zeros(tiles, pixels)
        for bucket in buckets(lists, tile):
            alpha, log_t = _alphas(shape, bucket, lists.columns, tile)
            weight, stops = _weights(alpha, log_t)
            image[bucket.tiles] = weight @ channels[bucket.splat]
            first = (log_t > _LOG_HALF).sum(-1).clamp_(max=log_t.shape[-1] - 1)
            end = log_t.masked_fill_(stops, 0.0).amin(-1).exp_()
            t_end[bucket.tiles] = end
            median[bucket.tiles] = depth[bucket.splat].gather(1, first).masked_fill_(end >= 0.5, 0.0)
        ctx.save_for_backward(shape, channels, image, t_end)
        ctx.lists, ctx.tile = lists, tile
        ctx.mark_non_differentiable(median)
        return image, t_end, median

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_image, grad_end = grads[0], grads[1]
        shape, channels, image, t_end = ctx.saved_tensors
        lists, tile = ctx.lists, ctx.tile
        grad_shape, grad_channels = torch.zeros_like(shape), torch.zeros_like(channels)
        # All that lies behind a splat: the whole sum less what is in front of it and itself.
        total = (image * grad_image).sum(-1) + t_end * grad_end
        for bucket in buckets(lists, tile):
            alpha, log_t = _alphas(shape, bucket, lists.columns, tile)
            weight, stops = _weights(alpha, log_t)
            g, features = grad_image[bucket.tiles], channels[bucket.splat]
            value = g @ features.mT  # [T, P, K]
            grad_channels.index_add_(0, bucket.splat.flatten(), (weight.mT @ g).flatten(0, 1))
            value *= weight  # v_i alpha_i T_i
            behind = total[bucket.tiles, :, None] - value.cumsum(-1)
            value -= behind.mul_(alpha).div_(1 - alpha)  # alpha dL/d alpha
            value.masked_fill_(stops | (alpha >= MOST_ALPHA), 0.0)  # and the clamp at 0.99 stops the gradient
            _scatter_shape(grad_shape, value, shape, bucket, lists.columns, tile)
        return grad_shape, grad_channels, None, None, None


_LOG_HALF, _LOG_LEAST = -0.6931471805599453, -9.210340371976182  # log 0.5, log 1e-4


def _monomials(tile: int, like: Tensor) -> Tensor:  # [P, 6]: 1, x, y, x^2, xy, y^2 from the middle of the tile
    line = torch.arange(tile, dtype=like.dtype, device=like.device) + 0.5 - tile / 2
    y, x = (t.flatten() for t in torch.meshgrid(line, line, indexing="ij"))
    return torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], 1)


def _local(shape: Tensor, bucket: Bucket, columns: int, tile: int) -> tuple[Tensor, ...]:
    """u, v relative to the middle of the tile, a, b, c and the opacity, each [T, K]."""
    u, v, a, b, c, o = shape[bucket.splat].unbind(-1)
    middle_x = ((bucket.tiles % columns) * tile + tile / 2).to(shape.dtype)[:, None]
    middle_y = ((bucket.tiles // columns) * tile + tile / 2).to(shape.dtype)[:, None]
    return u - middle_x, v - middle_y, a, b, c, o


def _alphas(shape: Tensor, bucket: Bucket, columns: int, tile: int) -> tuple[Tensor, Tensor]:
    """alpha and the log of the transmittance behind each splat, both [T, P, K]."""
    u, v, a, b, c, o = _local(shape, bucket, columns, tile)
    au_bv, bu_cv = a * u + b * v, b * u + c * v
    constant = o.log() - 0.5 * (u * au_bv + v * bu_cv)
    coefficients = torch.stack([constant, au_bv, bu_cv, -0.5 * a, -b, -0.5 * c], 1)  # [T, 6, K]
    alpha = (_monomials(tile, shape) @ coefficients).exp_().clamp_(max=MOST_ALPHA)
    faint = alpha < LEAST_ALPHA
    if bucket.real is not None:
        faint |= ~bucket.real[:, None]
    alpha.masked_fill_(faint, 0.0)
    return alpha, alpha.neg().log1p_().cumsum_(-1)


def _weights(alpha: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_i T_i, zero from the splat on that would end the pixel; and where that is. T_i = T_{i+1} / (1 - alpha_i)."""
    stops = log_t < _LOG_LEAST
    weight = log_t.exp().mul_(alpha).div_(1 - alpha)
    return weight.masked_fill_(stops, 0.0), stops


def _scatter_shape(grad: Tensor, exponent: Tensor, shape: Tensor, bucket: Bucket, columns: int, tile: int) -> None:
    """From dL/d(log alpha) [T, P, K] to dL/d(u, v, a, b, c, o), by its six moments."""
    u, v, a, b, c, o = _local(shape, bucket, columns, tile)
    m1, mx, my, mxx, mxy, myy = (_monomials(tile, shape).mT @ exponent).unbind(1)
    dx, dy = mx - u * m1, my - v * m1  # moments about the splat's mean
    pieces = (
        a * dx + b * dy,
        b * dx + c * dy,
        -0.5 * (mxx - 2 * u * mx + u * u * m1),
        -(mxy - u * my - v * mx + u * v * m1),
        -0.5 * (myy - 2 * v * my + v * v * m1),
        m1 / o,
    )
    grad.index_add_(0, bucket.splat.flatten(), torch.stack(pieces, -1).flatten(0, 1))
