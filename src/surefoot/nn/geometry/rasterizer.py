"""Differentiable splatting of 3D Gaussians in plain PyTorch: tile-binned, vectorised, with the compositing's gradient written out.

A splat of mean m, covariance Sigma = R S^2 R^T and opacity o lands at u = project(m) with the 2D covariance

    Sigma' = J W Sigma W^T J^T + eps2d I                   (J: Jacobian of the projection, W: rotation of w2c)

and covers a pixel p by alpha = min(0.99, o exp(-(p - u)^T Sigma'^-1 (p - u) / 2)), nothing below 1/255. Front to back,

    C = sum_i c_i alpha_i T_i + T_end background,  T_i = prod_{j < i} (1 - alpha_j)

and a pixel ends before the splat that would bring T below 1e-4. Depth and normals are composited like colours.

Why it is fast without a compiled kernel: splats are sorted by depth, then by tile; tiles of similar list length are worked on together.
log alpha is a quadratic polynomial of the pixel, so the exponents of a bucket are one matrix product of six coefficients a splat
with six monomials a pixel; backward, the six moments of the gradient against the same monomials are one more. With g = dL/dC,
v_i = c_i . g and S_i = sum_{j > i} v_j alpha_j T_j + T_end (dL/dT_end), the gradient is dL/d alpha_i = T_i v_i - S_i / (1 - alpha_i).
Alphas are recomputed in the backward pass, so memory does not grow with pixels times splats.

Kerbl et al., 2023, arXiv 2308.04079; conventions in `surefoot.nn.geometry.cameras`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from surefoot.errors import check, check_choice, check_non_negative, check_positive
from surefoot.nn.geometry.cameras import Camera, back_project
from surefoot.nn.geometry.harmonics import sh_colours
from surefoot.nn.geometry.rotations import quaternion_to_matrix
from surefoot.nn.geometry.splats import GaussianScene, Splats

Backend = Literal["auto", "torch", "gsplat"]
LEAST_ALPHA, MOST_ALPHA, LEAST_T = 1 / 255, 0.99, 1e-4
# (tile, pixel, splat) triples worked on at once: on a CPU few enough to stay in the cache, elsewhere many to keep the device busy
BUCKET_ELEMENTS, DEVICE_BUCKET_ELEMENTS = 200_000, 2_000_000


@dataclass(frozen=True)
class RenderOut:
    """What a view of a scene looks like. Depths are z in the camera's frame; `depth` is accumulated, hence too near where alpha < 1."""

    rgb: Tensor  # [H, W, 3]
    alpha: Tensor  # [H, W]
    depth: Tensor  # [H, W], sum z_i alpha_i T_i
    median_depth: Tensor  # [H, W], z of the splat at which T first drops below 0.5, 0 where none does; no gradient
    normal: Tensor | None  # [H, W, 3], unit, in the camera's frame, towards the camera; where asked for
    means2d: Tensor  # [N, 2], keeps its gradient (densification reads it)
    radii: Tensor  # int64 [N], pixels, 0 where culled

    @property
    def expected_depth(self) -> Tensor:  # [H, W]
        """The depth of what is there: `depth / alpha`."""
        return self.depth / self.alpha.clamp_min(1e-10)

    @property
    def visible(self) -> Tensor:  # bool [N]
        return self.radii > 0


class Projected(NamedTuple):
    """Splats on the image plane."""

    means2d: Tensor  # [N, 2]
    conic: Tensor  # [N, 3]: a, b, c of the inverse covariance [[a, b], [b, c]]
    depth: Tensor  # [N]
    radii: Tensor  # int64 [N], 0 where culled
    camera_means: Tensor  # [N, 3]


def rasterize(
    scene: GaussianScene | Splats,
    camera: Camera,
    background: Tensor | None = None,  # [3], default black
    *,
    sh_degree: int | None = None,
    normals: bool = False,
    eps2d: float = 0.3,
    near: float = 0.2,
    tile: int | None = None,
    backend: Backend = "auto",
) -> RenderOut:
    """Render a scene. Every input has a gradient: means, scales, quaternions, opacities, SH, background, and the camera's w2c and K.

    `eps2d` widens each splat by that many square pixels (the low-pass of the original); `near` culls what is closer; `tile` defaults
    to 8 on the CPU and 16 elsewhere. `backend="auto"` takes gsplat where the tensors are on a GPU and it is installed.
    """
    splats, degree = _activated(scene, sh_degree)
    check_choice("backend", backend, ("auto", "torch", "gsplat"))
    check_non_negative("eps2d", eps2d)
    check_positive("near", near)
    background = splats.means.new_zeros(3) if background is None else background
    if backend != "torch":
        from surefoot.nn.geometry import gsplat_backend

        if backend == "gsplat" or gsplat_backend.available(splats.means):
            return gsplat_backend.rasterize(splats, camera, background, degree, normals=normals, eps2d=eps2d, near=near)
    flat = project_splats(splats, camera, eps2d=eps2d, near=near)
    if flat.means2d.requires_grad:
        flat.means2d.retain_grad()
    channels = splat_channels(splats, camera, flat, degree, normals=normals)
    tile = (8 if splats.means.device.type == "cpu" else 16) if tile is None else tile
    check(tile >= 1, f"tile must be at least 1, got {tile!r}.")
    lists = bin_splats(flat, camera.width, camera.height, tile)
    shape = torch.cat([flat.means2d, flat.conic, splats.opacities[:, None]], 1)
    image, t_end, median = composite(shape, channels, flat.depth.detach(), lists, camera.width, camera.height, tile)
    rgb = image[..., :3] + t_end[..., None] * background
    normal = torch.nn.functional.normalize(image[..., 4:7], dim=-1) if normals else None
    return RenderOut(rgb, 1 - t_end, image[..., 3], median, normal, flat.means2d, flat.radii)


def _activated(scene: GaussianScene | Splats, sh_degree: int | None) -> tuple[Splats, int]:
    splats = scene.splats() if isinstance(scene, GaussianScene) else scene
    most = round(splats.sh.shape[1] ** 0.5) - 1
    if sh_degree is not None:
        return splats, min(sh_degree, most)
    return splats, scene.active_degree if isinstance(scene, GaussianScene) else most


def project_splats(splats: Splats, camera: Camera, *, eps2d: float = 0.3, near: float = 0.2) -> Projected:
    """Steps 1 to 4: into the camera, onto the image plane, and which splats touch the picture."""
    rotation, t = camera.w2c[:3, :3], camera.w2c[:3, 3]
    p = splats.means @ rotation.mT + t
    z = p[:, 2]
    front = z > near
    safe = torch.where(front, z, torch.ones_like(z))
    fx, fy, cx, cy = camera.K[0, 0], camera.K[1, 1], camera.K[0, 2], camera.K[1, 2]
    x, y = p[:, 0] / safe, p[:, 1] / safe
    means2d = torch.stack([fx * x + cx, fy * y + cy], 1)
    # Outside of the view the linearised projection explodes, so its Jacobian is taken at the rim.
    limit_x, limit_y = 1.3 * camera.width / (2 * fx), 1.3 * camera.height / (2 * fy)
    jx, jy = x.clamp(-limit_x, limit_x), y.clamp(-limit_y, limit_y)
    o = torch.zeros_like(safe)
    J = torch.stack([fx / safe, o, -fx * jx / safe, o, fy / safe, -fy * jy / safe], 1).unflatten(1, (2, 3))
    axes = J @ rotation @ (quaternion_to_matrix(splats.quats) * splats.scales[:, None, :])  # [N, 2, 3]
    u, v = axes[:, 0], axes[:, 1]
    xx, xy, yy = (u * u).sum(1) + eps2d, (u * v).sum(1), (v * v).sum(1) + eps2d
    det = xx * yy - xy * xy
    good = front & (det > 0)
    inverse = 1 / torch.where(good, det, torch.ones_like(det))
    conic = torch.stack([yy * inverse, -xy * inverse, xx * inverse], 1)
    with torch.no_grad():
        middle = (xx + yy) / 2
        radius = (3 * (middle + (middle**2 - det).clamp_min(0.0).sqrt()).sqrt()).ceil()
        mean = means2d.detach()
        size = mean.new_tensor([camera.width, camera.height])
        touches = ((mean + radius[:, None] > 0) & (mean - radius[:, None] < size)).all(1)
        radii = torch.where(good & touches & torch.isfinite(radius), radius, torch.zeros_like(radius)).long()
    return Projected(means2d, conic, z, radii, p)


def splat_channels(
    splats: Splats, camera: Camera, flat: Projected, degree: int, *, normals: bool = False
) -> Tensor:  # [N, 4 or 7]
    """What is composited for each splat: colour, depth and, if asked for, the normal in the camera's frame."""
    directions = torch.nn.functional.normalize(splats.means - camera.centre, dim=1)
    channels = [sh_colours(splats.sh, directions, degree), flat.depth[:, None]]
    if normals:
        channels.append(splat_normals(splats, camera, flat.camera_means))
    return torch.cat(channels, 1)


def splat_normals(splats: Splats, camera: Camera, camera_means: Tensor) -> Tensor:  # [N, 3]
    """The axis of the smallest scale, in the camera's frame, turned towards the camera."""
    thin = splats.scales.argmin(1)[:, None, None].expand(-1, 3, 1)
    axis = quaternion_to_matrix(splats.quats).gather(2, thin).squeeze(2) @ camera.w2c[:3, :3].mT
    return torch.where((axis * camera_means).sum(1, keepdim=True) > 0, -axis, axis)


class TileLists(NamedTuple):
    """Which splats each tile composites, front to back."""

    splat: Tensor  # int64 [M]: rows of the splats, tile after tile
    start: Tensor  # int64 [T]
    length: Tensor  # int64 [T]
    columns: int  # tiles in a row of the image


@torch.no_grad()
def bin_splats(flat: Projected, width: int, height: int, tile: int) -> TileLists:
    """Steps 5 and 6: each splat into every tile that its box of 3 standard deviations touches, sorted by depth within the tile."""
    columns, rows = -(-width // tile), -(-height // tile)
    seen = flat.radii.nonzero().squeeze(1)
    order = seen[torch.sort(flat.depth[seen], stable=True).indices]
    mean, radius = flat.means2d[order], flat.radii[order, None]
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
    """Steps 6 and 7, for every tile; differentiable in `shape` and `channels`."""
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


def depth_normals(
    depth: Tensor,  # [H, W], expected or median depth
    alpha: Tensor,  # [H, W]
    camera: Camera,
) -> tuple[Tensor, Tensor]:  # [H, W, 3] unit, and where they are defined, bool [H, W]
    """Normals of a depth map, from central differences of its points, towards the camera; undefined at the rim and where alpha < 0.5."""
    points = back_project(depth, camera.K)
    across, down = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
    normal = torch.nn.functional.normalize(torch.linalg.cross(down, across), dim=-1)
    full = torch.nn.functional.pad(normal, (0, 0, 1, 1, 1, 1))
    covered = alpha >= 0.5
    defined = torch.zeros_like(covered)
    defined[1:-1, 1:-1] = (
        covered[1:-1, 1:-1] & covered[1:-1, 2:] & covered[1:-1, :-2] & covered[2:, 1:-1] & covered[:-2, 1:-1]
    )
    return torch.where((full * points.detach()).sum(-1, keepdim=True) > 0, -full, full), defined
