"""Pinhole cameras in the OpenCV convention, the one convention of the house.

x points right, y down, z forward; `w2c` maps world to camera; integer pixel (u, v) has its centre at (u + 0.5, v + 0.5), so that
the principal point of a symmetric camera is (width / 2, height / 2). A camera's centre is -R^T t: interpolate centres and
rotations, never the translation of w2c, which belongs to no point in space.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from surefoot.errors import check, check_at_least, check_positive
from surefoot.nn.geometry.rotations import (
    check_rotation,
    invert_rigid,
    matrix_to_quaternion,
    quaternion_to_matrix,
    rigid,
    se3_exp,
    slerp,
)


@dataclass(frozen=True)
class Camera:
    """One pinhole view."""

    K: Tensor  # [3, 3], pixels
    w2c: Tensor  # [4, 4]
    width: int
    height: int
    name: str = ""

    def __post_init__(self) -> None:
        check(self.K.shape == (3, 3), f"K must be [3, 3], got {tuple(self.K.shape)}.")
        check(self.w2c.shape == (4, 4), f"w2c must be [4, 4], got {tuple(self.w2c.shape)}.")
        check_at_least("width", self.width, 1)
        check_at_least("height", self.height, 1)

    @property
    def centre(self) -> Tensor:  # [3]
        return -(self.w2c[:3, :3].mT @ self.w2c[:3, 3])

    @property
    def c2w(self) -> Tensor:  # [4, 4]
        return invert_rigid(self.w2c)

    def checked(self) -> Camera:
        """This camera, or a clear error where its pose or its focal length is no camera's."""
        check_rotation(f"The pose of camera {self.name!r}" if self.name else "w2c", self.w2c[:3, :3])
        check(float(self.K[0, 0]) > 0 and float(self.K[1, 1]) > 0, f"Camera {self.name!r} has focal lengths {float(self.K[0, 0]):.3g} and {float(self.K[1, 1]):.3g}; both must be positive.")  # fmt: skip
        return self

    def to(self, *args, **kwargs) -> Camera:
        return replace(self, K=self.K.to(*args, **kwargs), w2c=self.w2c.to(*args, **kwargs))

    def resized(self, width: int, height: int) -> Camera:
        """The same view with another number of pixels; K is scaled with them."""
        scale = self.K.new_tensor([width / self.width, height / self.height, 1.0])
        return replace(self, K=self.K * scale[:, None], width=width, height=height)

    def posed(self, w2c: Tensor) -> Camera:
        return replace(self, w2c=w2c)


def intrinsics(focal: float, width: int, height: int, dtype: torch.dtype = torch.float32) -> Tensor:  # [3, 3]
    """K of square pixels with the principal point in the middle."""
    check_positive("focal", focal)
    return torch.tensor([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]], dtype=dtype)


def focal_of(field_of_view: float, width: int) -> float:
    """The focal length in pixels of a horizontal field of view in degrees."""
    check(0 < field_of_view < 180, f"field_of_view must be between 0 and 180 degrees, got {field_of_view!r}.")
    return width / (2 * math.tan(math.radians(field_of_view) / 2))


def look_at(
    centre: Tensor,  # [..., 3]
    target: Tensor,  # [..., 3]
    up: Tensor | tuple[float, float, float] = (0.0, 0.0, 1.0),
) -> Tensor:  # w2c [..., 4, 4]
    """A camera at `centre` that looks at `target`, with the world's `up` upwards in the image."""
    up = torch.as_tensor(up, dtype=centre.dtype, device=centre.device).expand_as(centre)
    forward = torch.nn.functional.normalize(target - centre, dim=-1)
    right = torch.linalg.cross(forward, up)
    length = right.norm(dim=-1, keepdim=True)
    check(
        bool((length > 1e-6).all()),
        "A camera looks along its up direction, so its roll is undefined; give another `up`.",
    )
    right = right / length
    down = torch.linalg.cross(forward, right)
    rotation = torch.stack([right, down, forward], -2)
    return rigid(rotation, -(rotation @ centre[..., None]).squeeze(-1))


def pixel_centres(
    width: int, height: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:  # [H, W, 2], (u, v)
    v, u = torch.meshgrid(
        torch.arange(height, dtype=dtype, device=device) + 0.5,
        torch.arange(width, dtype=dtype, device=device) + 0.5,
        indexing="ij",
    )
    return torch.stack([u, v], -1)


def pixel_rays(
    K: Tensor,  # [..., 3, 3]
    width: int,
    height: int,
) -> Tensor:  # [..., H, W, 3]
    """K^-1 (u, v, 1) at every pixel centre: camera-frame points of depth 1."""
    pixels = pixel_centres(width, height, dtype=K.dtype, device=K.device)
    x = (pixels[..., 0] - K[..., 0, 2, None, None]) / K[..., 0, 0, None, None]
    y = (pixels[..., 1] - K[..., 1, 2, None, None]) / K[..., 1, 1, None, None]
    return torch.stack([x, y, torch.ones_like(x)], -1)


def back_project(
    depth: Tensor,  # [..., H, W], z in the camera's frame
    K: Tensor,  # [..., 3, 3]
    w2c: Tensor | None = None,  # [..., 4, 4]; None leaves the points in the camera's frame
) -> Tensor:  # [..., H, W, 3]
    """The point behind every pixel centre at its z-depth."""
    points = pixel_rays(K, depth.shape[-1], depth.shape[-2]) * depth[..., None]
    return points if w2c is None else transform(invert_rigid(w2c), points)


def transform(
    motion: Tensor,  # [*B, 4, 4]
    points: Tensor,  # [*B, ..., 3]
) -> Tensor:  # [*B, ..., 3]
    """x -> R x + t."""
    flat = points.reshape(*motion.shape[:-2], -1, 3)
    return (flat @ motion[..., :3, :3].mT + motion[..., None, :3, 3]).reshape(points.shape)


def project(
    points: Tensor,  # [N, 3], world
    camera: Camera,
) -> tuple[Tensor, Tensor]:  # pixels [N, 2], z [N]
    """Where points fall in the image (pixel coordinates, see the module), and their z-depth; z <= 0 is behind the camera."""
    local = transform(camera.w2c, points)
    z = local[:, 2]
    safe = torch.where(z.abs() < 1e-12, torch.full_like(z, 1e-12), z)
    uv = local[:, :2] / safe[:, None] @ camera.K[:2, :2].mT + camera.K[:2, 2]
    return uv, z


HALF_TURN = 1e-3  # |cos| of half the angle between two rotations below which they count as half a turn apart


def opposite(a: Camera, b: Camera) -> bool:
    """Whether two cameras are turned by 180 degrees against each other, so that neither way round is the shorter."""
    qa, qb = matrix_to_quaternion(torch.stack([a.w2c[:3, :3], b.w2c[:3, :3]]))
    return abs(float((qa * qb).sum())) < HALF_TURN


def turn(a: Camera, b: Camera, t: float) -> Tensor:  # [3, 3], world to camera
    """The rotation on the way from `a` to `b`: SLERP; half a turn apart, where that is ambiguous, a turn to the right, with a warning."""
    Ra, Rb = a.w2c[:3, :3], b.w2c[:3, :3]
    qa, qb = matrix_to_quaternion(torch.stack([Ra, Rb]))
    if not opposite(a, b):
        return quaternion_to_matrix(slerp(qa, qb, t))
    warnings.warn(f"Cameras {a.name!r} and {b.name!r} face opposite ways (180 degrees apart), so the way between them is a guess; put a camera in between.", stacklevel=3)  # fmt: skip
    step = matrix_to_quaternion(Rb @ Ra.mT)
    step = torch.where(step[2] > 0, -step, step)  # y points down: a turn to the right moves the world to the left
    axis = step[1:] / step[1:].norm()
    angle = 2 * torch.atan2(step[1:].norm(), step[0])
    return se3_exp(torch.cat([t * angle * axis, torch.zeros_like(axis)]))[:3, :3] @ Ra


def interpolate(a: Camera, b: Camera, t: float) -> Camera:
    """The camera on the way from `a` (t = 0) to `b` (t = 1): SLERP of rotations (see `turn`), straight line of centres, linear K."""
    rotation = turn(a, b, t)
    centre = torch.lerp(a.centre, b.centre, t)
    K = torch.lerp(a.K, b.K, t)
    return Camera(K, rigid(rotation, -(rotation @ centre)), a.width, a.height, f"{a.name}~{b.name}@{t:.3g}")


def scene_extent(
    centres: Tensor,  # [V, 3]
) -> float:
    """1.1 times the largest distance of a camera from the mean of all: the length by which splat learning rates are scaled."""
    return 1.1 * float((centres - centres.mean(0)).norm(dim=1).max())
