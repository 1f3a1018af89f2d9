"""The same picture by gsplat's CUDA kernels (Apache-2.0), for tensors on a GPU."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from surefoot.errors import MissingExtra, check
from surefoot.nn.geometry.cameras import Camera
from surefoot.nn.geometry.rasterizer import RenderOut, splat_normals
from surefoot.nn.geometry.splats import Splats


def available(like: Tensor) -> bool:
    """Whether `backend="auto"` takes gsplat for this tensor."""
    return like.is_cuda and importlib.util.find_spec("gsplat") is not None


def rasterize(
    splats: Splats, camera: Camera, background: Tensor, degree: int, *, normals: bool, eps2d: float, near: float
) -> RenderOut:
    """gsplat's "classic" mode with accumulated depth; normals by a second pass. There is no median depth: it is the expected one."""
    check(
        splats.means.is_cuda,
        "backend 'gsplat' needs tensors on a CUDA device; move the scene there or pass backend='torch'.",
    )
    try:
        from gsplat import rasterization  # type: ignore[import-not-found]
    except ImportError as error:
        raise MissingExtra("gsplat", "geometry") from error
    common = {
        "means": splats.means, "quats": splats.quats, "scales": splats.scales, "opacities": splats.opacities,
        "viewmats": camera.w2c[None], "Ks": camera.K[None], "width": camera.width, "height": camera.height,
        "near_plane": near, "eps2d": eps2d, "packed": False, "rasterize_mode": "classic",
    }  # fmt: skip
    image, alpha, info = rasterization(colors=splats.sh, sh_degree=degree, render_mode="RGB+D", **common)
    means2d = info["means2d"]
    if means2d.requires_grad:
        means2d.retain_grad()
    alpha = alpha[0, ..., 0]
    depth = image[0, ..., 3]
    normal = None
    if normals:
        means = splats.means @ camera.w2c[:3, :3].mT + camera.w2c[:3, 3]
        composited, _, _ = rasterization(colors=splat_normals(splats, camera, means), render_mode="RGB", **common)
        normal = torch.nn.functional.normalize(composited[0], dim=-1)
    rgb = image[0, ..., :3] + (1 - alpha)[..., None] * background  # its colours are premultiplied
    radii = info["radii"][0]
    radii = radii.amax(-1) if radii.dim() == 2 else radii
    median = (depth / alpha.clamp_min(1e-10)).detach()
    return RenderOut(rgb, alpha, depth, median, normal, means2d, radii.long())
