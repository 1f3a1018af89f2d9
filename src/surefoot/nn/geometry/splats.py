"""A scene of 3D Gaussian splats: the trainable parameters, and how a cloud of coloured points becomes one.

Kerbl, Kopanas, Leimkuehler, Drettakis, "3D Gaussian Splatting for Real-Time Radiance Field Rendering", 2023, arXiv 2308.04079.
The 3D smoothing filter is that of Yu et al., "Mip-Splatting", 2023, arXiv 2311.16493.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.spatial import KDTree
from torch import Tensor, nn

from surefoot.errors import check, check_choice
from surefoot.nn.geometry.cameras import Camera, project
from surefoot.nn.geometry.harmonics import sh_from_rgb

NAMES = ("means", "log_scales", "quats", "logit_opacities", "sh")


class Splats(NamedTuple):
    """N splats in the units the rasteriser works with."""

    means: Tensor  # [N, 3]
    scales: Tensor  # [N, 3], standard deviations along the axes
    quats: Tensor  # [N, 4], wxyz, any non-zero length
    opacities: Tensor  # [N], in (0, 1)
    sh: Tensor  # [N, (d + 1)^2, 3]


class GaussianScene(nn.Module):
    """N splats as parameters, stored as viewers and optimisers like them: log scales, logit opacities, unnormalised quaternions.

    `active_degree` is the spherical-harmonic degree in use (raise it as training goes on). `filter_3d` `[N]` is the standard
    deviation of the smoothing filter of Mip-Splatting, zero when off: see `update_filter`.
    """

    means: nn.Parameter
    log_scales: nn.Parameter
    quats: nn.Parameter
    logit_opacities: nn.Parameter
    sh: nn.Parameter
    filter_3d: Tensor

    def __init__(self, means: Tensor, log_scales: Tensor, quats: Tensor, logit_opacities: Tensor, sh: Tensor) -> None:
        super().__init__()
        n = len(means)
        shapes = {"means": (n, 3), "log_scales": (n, 3), "quats": (n, 4), "logit_opacities": (n,)}
        for name, value in zip(NAMES, (means, log_scales, quats, logit_opacities, sh), strict=True):
            if name in shapes:
                check(
                    tuple(value.shape) == shapes[name], f"{name} must be {list(shapes[name])}, got {list(value.shape)}."
                )
            self.register_parameter(name, nn.Parameter(value.detach().clone()))
        check(sh.dim() == 3 and len(sh) == n and sh.shape[1] in (1, 4, 9, 16) and sh.shape[2] == 3, f"sh must be [{n}, 1 | 4 | 9 | 16, 3], got {list(sh.shape)}.")  # fmt: skip
        self.register_buffer("filter_3d", torch.zeros(n, dtype=means.dtype, device=means.device))
        self.active_degree = self.degree

    def __len__(self) -> int:
        return len(self.means)

    @property
    def degree(self) -> int:
        """The largest degree there is room for."""
        return round(self.sh.shape[1] ** 0.5) - 1

    def splats(self) -> Splats:
        """The activated values, with the smoothing filter applied."""
        scales, opacities = self.log_scales.exp(), self.logit_opacities.sigmoid()
        if bool((self.filter_3d > 0).any()):
            square, wide = scales**2, scales**2 + self.filter_3d[:, None] ** 2
            scales, opacities = wide.sqrt(), opacities * (square.prod(1) / wide.prod(1)).sqrt()
        return Splats(self.means, scales, self.quats, opacities, self.sh)

    @torch.no_grad()
    def update_filter(self, cameras: Sequence[Camera], strength: float = 0.2**0.5, near: float = 0.2) -> None:
        """No splat narrower than the finest pixel that sees it: s = strength min_cameras (z / f)."""
        finest = torch.full_like(self.filter_3d, torch.inf)
        for camera in cameras:
            uv, z = project(self.means, camera.to(self.means.device, self.means.dtype))
            inside = (z > near) & (uv >= 0).all(1) & (uv[:, 0] < camera.width) & (uv[:, 1] < camera.height)
            finest = torch.where(inside, torch.minimum(finest, z / float(camera.K[0, 0])), finest)
        seen = torch.isfinite(finest)
        largest = finest[seen].max() if bool(seen.any()) else finest.new_tensor(0.0)
        self.filter_3d = strength * torch.where(seen, finest, largest)

    @torch.no_grad()
    def take(self, index: Tensor) -> GaussianScene:
        """A scene of the chosen rows."""
        chosen = GaussianScene(*(getattr(self, name)[index] for name in NAMES))
        chosen.filter_3d, chosen.active_degree = self.filter_3d[index].clone(), self.active_degree
        return chosen

    @classmethod
    def from_points(
        cls,
        points: Tensor,  # [N, 3]
        rgb: Tensor,  # [N, 3], in [0, 1]
        *,
        degree: int = 3,
        opacity: float = 0.1,
    ) -> GaussianScene:
        """One isotropic splat a point, as wide as the root mean square distance to its three nearest neighbours.

        Take `opacity` 0.1 for sparse points, 0.3 to 0.5 for dense ones that are trusted. Raises for fewer than two points or values
        that are not finite.
        """
        check(points.dim() == 2 and points.shape[1] == 3 and points.shape == rgb.shape, f"points and rgb must both be [N, 3], got {list(points.shape)} and {list(rgb.shape)}.")  # fmt: skip
        check(len(points) >= 2, f"A scene needs at least two points, got {len(points)}.")
        check(bool(torch.isfinite(points).all() and torch.isfinite(rgb).all()), "points and rgb must be finite.")
        check(0 < opacity < 1, f"opacity must be between 0 and 1, got {opacity!r}.")
        check_choice("degree", degree, (0, 1, 2, 3))
        spacing = neighbour_distance(points).clamp_min(1e-7)
        n = len(points)
        sh = points.new_zeros(n, (degree + 1) ** 2, 3)
        sh[:, 0] = sh_from_rgb(rgb.to(points))
        quats = points.new_zeros(n, 4)
        quats[:, 0] = 1.0
        logit = torch.logit(points.new_full((n,), opacity))
        scene = cls(points, spacing.log()[:, None].expand(n, 3), quats, logit, sh)
        scene.active_degree = 0
        return scene


def neighbour_distance(
    points: Tensor,  # [N, 3]
    k: int = 3,
) -> Tensor:  # [N]
    """The root mean square distance of each point to its k nearest neighbours (fewer where there are not so many)."""
    numbers = points.detach().cpu().double().numpy()
    k = min(k, len(numbers) - 1)
    distance, _ = KDTree(numbers).query(numbers, k=k + 1)
    return torch.from_numpy(distance[:, 1:]).square().mean(1).sqrt().to(points)
