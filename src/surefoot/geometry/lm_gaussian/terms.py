"""What the splats are pulled by beside the photos: monocular depth and normals, and views between the photos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surefoot.errors import check
from surefoot.geometry.lm_gaussian.losses import local_pearson_loss, normal_loss, pearson_depth_loss, render_points
from surefoot.nn.geometry.cameras import Camera
from surefoot.nn.geometry.ply import PointCloud
from surefoot.nn.geometry.rasterizer import RenderOut, depth_normals, rasterize
from surefoot.nn.geometry.splats import GaussianScene

Terms = Mapping[str, Tensor]


class MultiModalLoss(nn.Module):
    """The terms of one photo beside the photometric one: depth, normal, and depth against normal.

    `boxes` is the side of the local boxes (128 at 512 pixels), `lam_dn` couples normals with those of the depth map from step `dn_from` on.
    """

    def __init__(
        self, *, mono_depth: Tensor | None = None, mono_normal: Tensor | None = None, lam_depth: float = 0.1, lam_normal: float = 0.01,
        lam_dn: float = 0.0, dn_from: int = 0, box: int | None = None, fraction: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("lam_depth", lam_depth), ("lam_normal", lam_normal), ("lam_dn", lam_dn)):
            check(value >= 0, f"{name} must not be negative, got {value!r}.")
        self.mono_depth, self.mono_normal = mono_depth, mono_normal
        self.lam_depth, self.lam_normal, self.lam_dn, self.fraction = lam_depth, lam_normal, lam_dn, fraction
        self.dn_from = dn_from
        size = 512 if mono_depth is None else min(mono_depth.shape[1:])
        self.box = box if box is not None else max(8, size // (3 if size < 100 else 4))

    def needs_normals(self, step: int = 0) -> bool:
        """Whether this step's rendering must come with normals."""
        return (self.mono_normal is not None and self.lam_normal > 0) or self._couples(step)

    def _couples(self, step: int) -> bool:
        return self.lam_dn > 0 and step >= self.dn_from

    def forward(self, out: RenderOut, camera: Camera, photo: int, generator: torch.Generator, step: int = 0) -> Terms:
        """The weighted terms of one rendering by name; `photo` is its row in the priors' maps."""
        terms: dict[str, Tensor] = {}
        if self.mono_depth is not None and self.lam_depth > 0:
            depth, mono = out.expected_depth, self.mono_depth[photo].to(out.rgb)
            local = local_pearson_loss(depth, mono, self.box, self.fraction, generator=generator)
            terms["depth"] = self.lam_depth * (pearson_depth_loss(depth, mono) + local)
        if self.mono_normal is not None and self.lam_normal > 0:
            assert out.normal is not None
            terms["normal"] = self.lam_normal * normal_loss(out.normal, self.mono_normal[photo].to(out.rgb))
        if self._couples(step):
            assert out.normal is not None
            pulls = []
            for depth in (out.expected_depth, out.median_depth):
                other, defined = depth_normals(depth, out.alpha, camera)
                pulls.append(
                    (1 - (out.normal * other).sum(-1))[defined].mean() if bool(defined.any()) else out.depth.sum() * 0
                )
            terms["depth_normal"] = self.lam_dn * (0.4 * pulls[0] + 0.6 * pulls[1])
        return terms


@dataclass(frozen=True)
class VirtualViews:
    """Views between the photos with what they should look like, and how much each counts per pixel."""

    cameras: Sequence[Camera]
    targets: Tensor  # [V, H, W, 3]
    masks: Tensor  # float [V, H, W]
    weight: float | Sequence[float] = 1.0

    def term(self, scene: GaussianScene, background: Tensor, generator: torch.Generator) -> Tensor:
        """weight L1 on a random one of them, over the pixels that its mask covers."""
        k = int(torch.randint(len(self.cameras), (), generator=generator, device=generator.device))
        weight = float(self.weight[k]) if isinstance(self.weight, Sequence) else float(self.weight)
        mask = self.masks[k]
        if weight == 0 or not bool(mask.any()):
            return scene.means.sum() * 0
        image = rasterize(scene, self.cameras[k], background).rgb
        difference = (image - self.targets[k]).abs().mean(-1)
        return weight * (difference * mask).sum() / mask.sum()


def views_of_cloud(cloud: PointCloud, cameras: Sequence[Camera], *, weight: float, radius: float = 1.0) -> VirtualViews:
    """The cleaned cloud seen from virtual cameras."""
    drawn = [render_points(cloud.points, cloud.rgb, camera, radius=radius) for camera in cameras]
    return VirtualViews(cameras, torch.stack([d[0] for d in drawn]), torch.stack([d[1] for d in drawn]).float(), weight)
