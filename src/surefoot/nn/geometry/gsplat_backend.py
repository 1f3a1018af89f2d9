"""The same picture by gsplat's CUDA kernels (Apache-2.0), for float32 tensors on a GPU.

Differences from the torch backend, all of gsplat's making: alpha is cut at 0.999 rather than 0.99, splats reach as far as their opacity carries
(up to 3.33 standard deviations rather than 3), there is no median depth, and K has no gradient. `means2d.grad` is in pixels in both.

Ye et al., 2024, arXiv 2409.06765.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from surefoot.errors import InvalidInput, MissingExtra, check
from surefoot.nn.geometry.cameras import Camera
from surefoot.nn.geometry.rasterizer import RenderOut, splat_normals
from surefoot.nn.geometry.splats import Splats


def available(splats: Splats, camera: Camera) -> bool:
    """Whether `backend="auto"` takes gsplat: it is installed, and the call is one that it can answer."""
    means = splats.means
    able = means.is_cuda and means.dtype == torch.float32 and not camera.K.requires_grad
    return able and importlib.util.find_spec("gsplat") is not None


def rasterize(
    splats: Splats, camera: Camera, background: Tensor, degree: int, *, normals: bool, eps2d: float, near: float
) -> RenderOut:
    """gsplat's "classic" mode with accumulated depth. `median_depth` is the expected one, detached.

    Colours are made here, so that normals ride along as three more channels of one pass.
    """
    check(
        splats.means.is_cuda,
        "backend 'gsplat' needs tensors on a CUDA device; move the scene there or pass backend='torch'.",
    )
    check(
        splats.means.dtype == torch.float32,
        f"backend 'gsplat' computes in float32, got {splats.means.dtype}; convert the scene or pass backend='torch'.",
    )
    check(
        not camera.K.requires_grad,
        "backend 'gsplat' has no gradient for camera.K; detach it or pass backend='torch'.",
    )
    rasterization, spherical_harmonics = _kernels()
    directions = splats.means - camera.centre
    channels = (spherical_harmonics(degree, directions, splats.sh) + 0.5).clamp_min(0.0)
    if normals:
        means = splats.means @ camera.w2c[:3, :3].mT + camera.w2c[:3, 3]
        channels = torch.cat([channels, splat_normals(splats, camera, means)], 1)
    image, alpha, info = rasterization(
        means=splats.means, quats=splats.quats, scales=splats.scales, opacities=splats.opacities, colors=channels, viewmats=camera.w2c[None],
        Ks=camera.K[None], width=camera.width, height=camera.height, near_plane=near, eps2d=eps2d, packed=False, rasterize_mode="classic",
        render_mode="RGB+D",
    )  # fmt: skip
    means2d = info["means2d"]
    if means2d.requires_grad:
        means2d.retain_grad()
    image, alpha = image[0], alpha[0, ..., 0]
    depth = image[..., -1]
    rgb = image[..., :3] + (1 - alpha)[..., None] * background  # its colours are premultiplied
    normal = torch.nn.functional.normalize(image[..., 3:6], dim=-1) if normals else None
    median = (depth / alpha.clamp_min(1e-10)).detach()
    radii = info["radii"][0]
    radii = radii.amax(-1) if radii.dim() == 2 else radii
    return RenderOut(rgb, alpha, depth, median, normal, means2d, radii.long())


def _kernels():
    try:
        from gsplat import rasterization, spherical_harmonics  # type: ignore[import-not-found]
        from gsplat.cuda._backend import _C  # type: ignore[import-not-found]
    except ImportError as error:
        raise MissingExtra("gsplat", "gpu") from error
    if _C is None:
        raise InvalidInput(
            "gsplat is installed but has no compiled kernels, and no CUDA toolkit to build them with; install one or pass backend='torch'."
        )
    return rasterization, spherical_harmonics
