"""Best rigid and similarity motions between matched points, and pose errors after them.

`kabsch` minimises sum w |R a + t - b|^2 over rotations and translations (Kabsch, 1976), `umeyama` over a scale as well
(Umeyama, 1991). Both detach: an SVD has no backward at equal singular values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surefoot.errors import InvalidInput, check
from surefoot.nn.geometry.cameras import Camera
from surefoot.nn.geometry.rotations import rotation_angle


@dataclass(frozen=True)
class Similarity:
    """x -> s R x + t. Leading axes are batches."""

    scale: Tensor  # [...]
    rotation: Tensor  # [..., 3, 3]
    translation: Tensor  # [..., 3]

    def apply(self, points: Tensor) -> Tensor:  # [..., N, 3]
        return self.scale[..., None, None] * (points @ self.rotation.mT) + self.translation[..., None, :]

    def camera(self, camera: Camera) -> Camera:
        """The camera as it stands in the moved world; depths grow by the scale."""
        rotation = camera.w2c[:3, :3] @ self.rotation.mT
        w2c = camera.w2c.clone()
        w2c[:3, :3] = rotation
        w2c[:3, 3] = -(rotation @ self.apply(camera.centre[None])[0])
        return camera.posed(w2c)

    def inverse(self) -> Similarity:
        rotation, scale = self.rotation.mT, 1 / self.scale
        moved = (rotation @ self.translation[..., None]).squeeze(-1)
        return Similarity(scale, rotation, -scale[..., None] * moved)


def kabsch(a: Tensor, b: Tensor, weights: Tensor | None = None) -> Similarity:  # [..., N, 3] twice, [..., N]
    """The rotation and translation that bring `a` closest to `b` (scale 1)."""
    return _fit(a, b, weights, scaled=False)


def umeyama(a: Tensor, b: Tensor, weights: Tensor | None = None) -> Similarity:  # [..., N, 3] twice, [..., N]
    """The similarity that brings `a` closest to `b`."""
    return _fit(a, b, weights, scaled=True)


@torch.no_grad()
def _fit(a: Tensor, b: Tensor, weights: Tensor | None, *, scaled: bool) -> Similarity:
    check(a.shape == b.shape and a.shape[-1] == 3, f"The two sets must both be [..., N, 3], got {list(a.shape)} and {list(b.shape)}.")  # fmt: skip
    check(bool(torch.isfinite(a).all() and torch.isfinite(b).all()), "The points must be finite.")
    w = torch.ones_like(a[..., 0]) if weights is None else weights
    check(bool((w >= 0).all()) and bool((w.sum(-1) > 0).all()), "The weights must be non-negative with a positive sum.")
    w = (w / w.sum(-1, keepdim=True))[..., None]
    mean_a, mean_b = (w * a).sum(-2, keepdim=True), (w * b).sum(-2, keepdim=True)
    da, db = a - mean_a, b - mean_b
    u, s, vh = torch.linalg.svd((w * da).mT @ db)
    spread = torch.linalg.svdvals(w.sqrt() * da)
    if bool((spread[..., 1] <= 1e-6 * spread[..., 0].clamp_min(1e-30)).any()) or bool((s[..., 1] <= 1e-12 * s[..., 0].clamp_min(1e-30)).any()):  # fmt: skip
        raise InvalidInput("The points lie on one line or in one place, so the rotation between them is undefined; give at least three that do not.")  # fmt: skip
    sign = torch.ones_like(s)
    sign[..., 2] = torch.linalg.det(vh.mT @ u.mT).sign()
    rotation = (vh.mT * sign[..., None, :]) @ u.mT
    scale = (s * sign).sum(-1) / (w * da**2).sum((-2, -1)) if scaled else torch.ones_like(s[..., 0])
    translation = mean_b.squeeze(-2) - scale[..., None] * (rotation @ mean_a.mT).squeeze(-1)
    return Similarity(scale, rotation, translation)


@dataclass(frozen=True)
class PoseErrors:
    """Of estimated against true cameras, after the best similarity of their centres."""

    rotation_degrees: Tensor  # float64 [V]
    centre: Tensor  # [V], in the true world's unit
    similarity: Similarity  # from the estimated to the true world

    @property
    def ate(self) -> float:
        """Root mean square error of the centres (absolute trajectory error)."""
        return float(self.centre.square().mean().sqrt())


def pose_errors(estimated: Sequence[Camera], true: Sequence[Camera]) -> PoseErrors:
    """Needs at least three cameras that do not stand on one line. Computed in float64 where the estimated cameras are."""
    check(len(estimated) == len(true), f"There are {len(estimated)} estimated and {len(true)} true cameras.")
    device = estimated[0].w2c.device if estimated else torch.device("cpu")
    estimated, true = ([c.to(device, torch.float64) for c in cameras] for cameras in (estimated, true))
    a, b = (torch.stack([c.centre for c in cameras]) for cameras in (estimated, true))
    fit = umeyama(a, b)
    moved = [fit.camera(c) for c in estimated]
    angle = torch.stack([rotation_angle(m.w2c[:3, :3], c.w2c[:3, :3]) for m, c in zip(moved, true, strict=True)])
    return PoseErrors(angle, (fit.apply(a) - b).norm(dim=1), fit)
