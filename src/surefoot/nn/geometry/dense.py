"""The rasteriser as one dense formula, every pixel against every splat: slow and large, for checking the fast one."""

from __future__ import annotations

import torch
from torch import Tensor

from surefoot.nn.geometry.cameras import Camera, pixel_centres
from surefoot.nn.geometry.compositing import LEAST_ALPHA, LEAST_T, MOST_ALPHA
from surefoot.nn.geometry.rasterizer import project_splats, splat_channels
from surefoot.nn.geometry.splats import Splats


def rasterize_dense(
    splats: Splats,
    camera: Camera,
    background: Tensor,  # [3]
    degree: int = 0,
    *,
    normals: bool = False,
    eps2d: float = 0.3,
    near: float = 0.2,
    tile: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:  # rgb [H, W, 3], alpha [H, W], composited channels [H, W, C]
    """The same picture as `rasterize`, by plain autograd; memory grows with H W N."""
    flat = project_splats(splats, camera, eps2d=eps2d, near=near)
    channels = splat_channels(splats, camera, flat, degree, normals=normals)
    order = torch.argsort(flat.depth.detach(), stable=True)
    order = order[flat.radii[order] > 0]
    mean, conic, radius = flat.means2d[order], flat.conic[order], flat.radii[order].to(splats.means.dtype)
    pixels = pixel_centres(camera.width, camera.height, dtype=mean.dtype, device=mean.device)
    d = pixels[:, :, None] - mean  # [H, W, N, 2]
    a, b, c = conic.unbind(-1)
    power = -0.5 * (a * d[..., 0] ** 2 + 2 * b * d[..., 0] * d[..., 1] + c * d[..., 1] ** 2)
    alpha = (splats.opacities[order] * power.exp()).clamp(max=MOST_ALPHA)
    with torch.no_grad():
        at = (pixels / tile).floor()[:, :, None]
        low, high = ((mean - radius[:, None]) / tile).floor(), ((mean + radius[:, None]) / tile).floor()
        listed = ((at >= low) & (at <= high)).all(-1)
    alpha = torch.where(listed & (alpha >= LEAST_ALPHA), alpha, torch.zeros_like(alpha))
    after = (1 - alpha).cumprod(-1)
    alpha = torch.where(after >= LEAST_T, alpha, torch.zeros_like(alpha))
    after = (1 - alpha).cumprod(-1)
    before = torch.cat([torch.ones_like(after[..., :1]), after[..., :-1]], -1)
    image = torch.einsum("hwn,nc->hwc", alpha * before, channels[order])
    t_end = after[..., -1] if after.shape[-1] else torch.ones_like(image[..., 0])
    return image[..., :3] + t_end[..., None] * background, 1 - t_end, image
