"""Training cameras that move with the splats: se(3) increments on the aligned poses.

    w2c_k = exp(xi_k) w2c_k^aligned,      loss + pull sum_k |xi_k|^2

Poses and splats share seven degrees of freedom, so the first camera stands still and the second keeps its distance to it. (A free gauge lets the
whole scene drift and shrink without any change of the pictures.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surefoot.errors import check, check_positive
from surefoot.nn.geometry.cameras import Camera
from surefoot.nn.geometry.rotations import se3_exp


class PoseIncrements(nn.Module):
    """One twist a camera, zero at first. `camera(k)` is differentiable in it; `pull` times the sum of their squares belongs to the loss."""

    def __init__(self, cameras: Sequence[Camera], pull: float = 0.1) -> None:
        super().__init__()
        check(len(cameras) >= 2, f"Poses can be optimised for two or more cameras, got {len(cameras)}.")
        self.cameras, self.pull = tuple(cameras), pull
        self.twists = nn.Parameter(
            torch.zeros(len(cameras), 6, dtype=cameras[0].w2c.dtype, device=cameras[0].w2c.device)
        )
        self.distance = (cameras[1].centre - cameras[0].centre).norm()
        check_positive("distance of the first two cameras", float(self.distance))

    def camera(self, k: int) -> Camera:
        """Camera k where its increment puts it."""
        if k == 0:
            return self.cameras[0]
        w2c = se3_exp(self.twists[k]) @ self.cameras[k].w2c
        return self.cameras[k].posed(self._held(w2c) if k == 1 else w2c)

    def _held(self, w2c: Tensor) -> Tensor:  # [4, 4]
        """The same rotation at the fixed distance from the first camera."""
        rotation, first = w2c[:3, :3], self.cameras[0].centre
        offset = -(rotation.mT @ w2c[:3, 3]) - first
        centre = first + self.distance * offset / offset.norm()
        top = torch.cat([rotation, -(rotation @ centre)[:, None]], 1)
        return torch.cat([top, w2c[3:]])

    def penalty(self) -> Tensor:
        return self.pull * self.twists.square().sum()

    @torch.no_grad()
    def final(self) -> tuple[Camera, ...]:
        return tuple(self.camera(k) for k in range(len(self.cameras)))
