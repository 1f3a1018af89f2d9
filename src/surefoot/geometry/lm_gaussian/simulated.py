"""Simulated priors for analytic scenes: they answer like a stereo or depth network that makes a network's mistakes.

A simulator, and named as such in every report. Mistakes of two kinds: *shared* by all pairs of a photo (a real network repeats its mistake in every
pair; independent ones would be voted away), and drawn anew for every pair.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from surefoot.datasets.scenes import View
from surefoot.geometry.lm_gaussian.clean import cloud_of
from surefoot.geometry.lm_gaussian.priors import PairPointmaps
from surefoot.nn.geometry.cameras import back_project, transform
from surefoot.nn.geometry.ply import PointCloud
from surefoot.nn.geometry.rotations import invert_rigid


def correlated_noise(
    shape: Sequence[int], length: float, generator: torch.Generator
) -> Tensor:  # [H, W], unit variance
    """White noise through a Gaussian of that standard deviation / 2, scaled back to variance 1."""
    height, width = shape
    coarse = (max(2, math.ceil(height / length) + 1), max(2, math.ceil(width / length) + 1))
    noise = torch.randn(1, 1, *coarse, generator=generator)
    smooth = F.interpolate(noise, size=(height, width), mode="bicubic", align_corners=True)[0, 0]
    return smooth / smooth.std().clamp_min(1e-6)


def blur(depth: Tensor, sigma: float) -> Tensor:
    reach = max(1, math.ceil(3 * sigma))
    line = torch.exp(-(torch.arange(-reach, reach + 1, dtype=depth.dtype) ** 2) / (2 * sigma**2))
    line = (line / line.sum()).view(1, 1, 1, -1)
    x = F.conv2d(F.pad(depth[None, None], (reach, reach, 0, 0), mode="replicate"), line)
    return F.conv2d(F.pad(x, (0, 0, reach, reach), mode="replicate"), line.mT)[0, 0]


def oracle_cloud(
    views: Sequence[View], *, at_most: int, generator: torch.Generator, farthest: float = 20.0
) -> PointCloud:
    """What the views show up to `farthest`, as coloured points at the true depths; a random choice of `at_most`."""
    depths, images, w2c, K = (torch.stack(t) for t in zip(*((v.depth, v.rgb, v.camera.w2c, v.camera.K) for v in views), strict=True))  # fmt: skip
    return cloud_of(depths, depths < farthest, images, w2c, K, at_most=at_most, generator=generator)


@dataclass
class OracleStereoPrior:
    """Pairwise pointmaps from the true depths of `views`, with noise, outliers, flying pixels and a compressed, disordered background."""

    views: Sequence[View]
    depth_noise: float = 0.01
    outlier: float = 0.03
    far_bias: float = 0.4
    far_noise: float = 0.3
    far_depth: float = 5.0
    shared: float = 0.8
    edge_bleed: bool = True
    conf_fg: tuple[float, float] = (5.0, 15.0)
    conf_bg: tuple[float, float] = (1.2, 3.0)
    seed: int = 0
    name: str = "simulated stereo (true depth with planted errors)"

    def _generator(self, *key: object) -> torch.Generator:
        digest = hashlib.sha256(repr((self.seed, *key)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def _photo(self, k: int) -> tuple[Tensor, Tensor]:
        """Depth and confidence factor of a photo with the errors that all its pairs share."""
        g, depth = self._generator("photo", k), self.views[k].depth
        factor = torch.ones_like(depth)
        far = depth > self.far_depth
        depth = torch.where(far, depth * torch.exp(self.far_noise * correlated_noise(depth.shape, 12, g)), depth)
        if self.edge_bleed:
            soft = blur(depth, 1.0)
            flying = (soft / depth - 1).abs() > 0.04
            depth, factor = torch.where(flying, soft, depth), torch.where(flying, 0.5 * factor, factor)
        wanted, scale = self.shared * self.outlier * depth.numel(), 0.3 + 0.5 * float(torch.rand((), generator=g))
        blobs = torch.zeros_like(depth, dtype=torch.bool)
        while int(blobs.sum()) < wanted:
            size = int(torch.randint(2, 5, (), generator=g))
            row = int(torch.randint(0, depth.shape[0] - size + 1, (), generator=g))
            column = int(torch.randint(0, depth.shape[1] - size + 1, (), generator=g))
            blobs[row : row + size, column : column + size] = True
        return torch.where(blobs, depth * scale, depth), torch.where(blobs, 0.4 * factor, factor)

    def _map(self, k: int, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Depth and confidence of photo k in one pair."""
        g, true = self._generator("pair", *key, k), self.views[k].depth
        depth, factor = self._photo(k)
        depth = depth * torch.exp(self.depth_noise * correlated_noise(depth.shape, 8, g))
        lone = torch.rand(depth.shape, generator=g) < (1 - self.shared) * self.outlier
        depth = torch.where(lone, depth * (0.3 + 0.5 * torch.rand(depth.shape, generator=g)), depth)
        far = true > self.far_depth
        depth = torch.where(
            far & (depth > self.far_depth), self.far_depth + (1 - self.far_bias) * (depth - self.far_depth), depth
        )
        low = torch.where(far, self.conf_bg[0], self.conf_fg[0])
        high = torch.where(far, self.conf_bg[1], self.conf_fg[1])
        conf = (low + (high - low) * torch.rand(depth.shape, generator=g)) * factor
        return depth, torch.where(lone, 0.5 * conf, conf)

    def predict(self, i: int, j: int, image_i: Tensor, image_j: Tensor) -> PairPointmaps:
        """Both maps in the frame of camera i, at a random scale of the pair."""
        a, b = self.views[i].camera, self.views[j].camera
        depth_i, conf_i = self._map(i, (i, j))
        depth_j, conf_j = self._map(j, (i, j))
        points_i = back_project(depth_i, a.K)
        points_j = transform(a.w2c @ invert_rigid(b.w2c), back_project(depth_j, b.K))
        true_j = transform(a.w2c @ invert_rigid(b.w2c), back_project(self.views[j].depth, b.K))
        conf_j = torch.where(self._hidden(true_j, i), 0.5 * conf_j, conf_j)
        scale = 0.5 * 4 ** float(torch.rand((), generator=self._generator("scale", i, j)))
        return PairPointmaps(i, j, scale * points_i, scale * points_j, conf_i.clamp_min(1.01), conf_j.clamp_min(1.01))

    def _hidden(self, points: Tensor, i: int) -> Tensor:  # [H, W, 3] in camera i -> bool [H, W]
        view = self.views[i]
        z = points[..., 2]
        uv = points[..., :2] / z.clamp_min(1e-6)[..., None] @ view.camera.K[:2, :2].mT + view.camera.K[:2, 2]
        column, row = uv.floor().long().unbind(-1)
        height, width = view.depth.shape
        inside = (z > 0) & (column >= 0) & (row >= 0) & (column < width) & (row < height)
        shown = view.depth[row.clamp(0, height - 1), column.clamp(0, width - 1)]
        return ~inside | (z > 1.03 * shown)


@dataclass
class OracleMonoPrior:
    """Depth up to a scale and a shift, low-passed, with correlated noise; and normals with correlated noise. Also a simulator."""

    views: Sequence[View]
    noise: float = 0.03
    blur: float = 0.7
    normal_noise: float = 0.1
    seed: int = 0
    name: str = "simulated monocular depth and normals (truth with planted errors)"

    def predict(self, index: int, image: Tensor) -> Tensor:  # [H, W]
        """Depth of view `index`, larger is farther; the image is not looked at."""
        g = torch.Generator().manual_seed(1_000_003 * self.seed + index)
        depth = blur(self.views[index].depth.clamp(max=15.0), self.blur)
        depth = depth * torch.exp(self.noise * correlated_noise(depth.shape, 8, g))
        scale, shift = 0.5 + float(torch.rand((), generator=g)), float(torch.rand((), generator=g))
        return scale * depth + shift

    def predict_normals(self, index: int, image: Tensor) -> Tensor:  # [H, W, 3]
        """Unit normals of view `index` in its camera's frame."""
        g = torch.Generator().manual_seed(1_000_003 * self.seed + 500_009 + index)
        normal = self.views[index].normal
        noise = torch.stack([correlated_noise(normal.shape[:2], 8, g) for _ in range(3)], -1)
        return F.normalize(normal + self.normal_noise * noise, dim=-1)
