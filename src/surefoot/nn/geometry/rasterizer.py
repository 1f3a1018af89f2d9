"""Differentiable splatting of 3D Gaussians in plain PyTorch: tile-binned, vectorised, with the compositing's gradient written out.

A splat of mean m, covariance Sigma = R S^2 R^T and opacity o lands at u = project(m) with the 2D covariance

    Sigma' = J W Sigma W^T J^T + eps2d I                   (J: Jacobian of the projection, W: rotation of w2c)

and covers a pixel p by alpha = min(0.99, o exp(-(p - u)^T Sigma'^-1 (p - u) / 2)), nothing below 1/255. Front to back,

    C = sum_i c_i alpha_i T_i + T_end background,  T_i = prod_{j < i} (1 - alpha_j)

and a pixel ends before the splat that would bring T below 1e-4. Depth and normals are composited like colours.

Tiles, compositing and its gradient: `surefoot.nn.geometry.compositing`.

Kerbl et al., 2023, arXiv 2308.04079; conventions in `surefoot.nn.geometry.cameras`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from surefoot.errors import check, check_choice, check_non_negative, check_positive
from surefoot.nn.geometry.cameras import Camera, back_project
from surefoot.nn.geometry.compositing import bin_splats, composite
from surefoot.nn.geometry.harmonics import sh_colours
from surefoot.nn.geometry.rotations import quaternion_to_matrix
from surefoot.nn.geometry.splats import GaussianScene, Splats

Backend = Literal["auto", "torch", "gsplat"]


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
    to 8 on the CPU and 16 elsewhere. `backend="auto"` takes gsplat where it is installed, the tensors are float32 on a GPU, and K needs
    no gradient (gsplat has none); the two differ as `surefoot.nn.geometry.gsplat_backend` says.
    """
    splats, degree = _activated(scene, sh_degree)
    check_choice("backend", backend, ("auto", "torch", "gsplat"))
    check_non_negative("eps2d", eps2d)
    check_positive("near", near)
    background = splats.means.new_zeros(3) if background is None else background
    if backend != "torch":
        from surefoot.nn.geometry import gsplat_backend

        if backend == "gsplat" or gsplat_backend.available(splats, camera):
            return gsplat_backend.rasterize(splats, camera, background, degree, normals=normals, eps2d=eps2d, near=near)
    flat = project_splats(splats, camera, eps2d=eps2d, near=near)
    if flat.means2d.requires_grad:
        flat.means2d.retain_grad()
    channels = splat_channels(splats, camera, flat, degree, normals=normals)
    tile = (8 if splats.means.device.type == "cpu" else 16) if tile is None else tile
    check(tile >= 1, f"tile must be at least 1, got {tile!r}.")
    lists = bin_splats(flat.means2d, flat.radii, flat.depth, camera.width, camera.height, tile)
    shape = torch.cat([flat.means2d, flat.conic, splats.opacities[:, None]], 1)
    image, t_end, median = composite(shape, channels, flat.depth.detach(), lists, camera.width, camera.height, tile)
    rgb = image[..., :3] + t_end[..., None] * background
    normal = torch.nn.functional.normalize(image[..., 4:7], dim=-1) if normals else None
    return RenderOut(rgb, 1 - t_end, image[..., 3], median, normal, flat.means2d, flat.radii)


def rasterizer_name(scene: GaussianScene | Splats, camera: Camera) -> str:
    """Who draws such a scene with `backend="auto"`, for reports."""
    from surefoot.nn.geometry import gsplat_backend

    splats, _ = _activated(scene, None)
    return "gsplat" if gsplat_backend.available(splats, camera) else f"PyTorch, on {splats.means.device.type}"


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
