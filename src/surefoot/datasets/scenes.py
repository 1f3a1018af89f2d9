"""Analytic 3D scenes with exact pictures, depths, normals and cameras: the ground truth that photographs do not have.

A scene is a list of shapes with photographs as textures (scikit-image's own, so nothing is downloaded); `view` casts rays through a
camera, 4 x 4 a pixel for the colours and one through the pixel's centre for depth, normal and object.

    courtyard360   two boxes and two spheres on a ground plane, a textured wall far around, a plain sky; cameras on a ring
    facing3        the same courtyard from three cameras that look the same way

Textures are low-passed, because an aliased one shows every method the wrong picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from surefoot.errors import MissingExtra, check_at_least, check_choice
from surefoot.nn.geometry.cameras import Camera, focal_of, intrinsics, look_at, pixel_centres

FAR = 1e6


@dataclass(frozen=True)
class View:
    """What a camera sees, exactly."""

    rgb: Tensor  # float32 [H, W, 3]
    depth: Tensor  # float32 [H, W], z in the camera's frame
    normal: Tensor  # float32 [H, W, 3], unit, in the camera's frame, towards the camera
    object_id: Tensor  # int64 [H, W], the index of the shape
    camera: Camera


@dataclass(frozen=True)
class Hit:
    t: Tensor  # [R], FAR where missed
    normal: Tensor  # [R, 3], world
    uv: Tensor  # [R, 2], in texture repeats


class Shape(Protocol):
    @property
    def texture(self) -> str | tuple[float, float, float]: ...

    def hit(self, origin: Tensor, direction: Tensor) -> Hit: ...


@dataclass(frozen=True)
class Ground:
    height: float
    texture: str | tuple[float, float, float]
    repeat: float = 2.0  # world units a texture

    def hit(self, origin: Tensor, direction: Tensor) -> Hit:
        t = (self.height - origin[:, 2]) / _away_from_zero(direction[:, 2])
        point = origin + t[:, None] * direction
        t = torch.where((t > 1e-6) & (point[:, :2].norm(dim=1) < 50), t, torch.full_like(t, FAR))
        normal = torch.zeros_like(direction)
        normal[:, 2] = 1.0
        return Hit(t, normal, point[:, :2] / self.repeat)


@dataclass(frozen=True)
class Sphere:
    centre: tuple[float, float, float]
    radius: float
    texture: str | tuple[float, float, float]
    inside: bool = False  # seen from within: the sky

    def hit(self, origin: Tensor, direction: Tensor) -> Hit:
        offset = origin - origin.new_tensor(self.centre)
        b = (offset * direction).sum(1)
        a = (direction * direction).sum(1)
        root = b * b - a * ((offset * offset).sum(1) - self.radius**2)
        distance = root.clamp_min(0).sqrt()
        t = (-b + (distance if self.inside else -distance)) / a
        t = torch.where((root > 0) & (t > 1e-6), t, torch.full_like(t, FAR))
        normal = (offset + t[:, None] * direction) / self.radius
        uv = torch.stack(
            [torch.atan2(normal[:, 1], normal[:, 0]) / math.pi, torch.asin(normal[:, 2].clamp(-1, 1)) / math.pi], 1
        )
        return Hit(t, -normal if self.inside else normal, uv)


@dataclass(frozen=True)
class Box:
    """Upright, turned about z by `turn` radians."""

    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    turn: float
    texture: str | tuple[float, float, float]

    def hit(self, origin: Tensor, direction: Tensor) -> Hit:
        c, s = math.cos(self.turn), math.sin(self.turn)
        to_world = origin.new_tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        o, d = (origin - origin.new_tensor(self.centre)) @ to_world, _away_from_zero(direction @ to_world)
        half = origin.new_tensor(self.half)
        near, axis = torch.minimum((-half - o) / d, (half - o) / d).max(1)
        far = torch.maximum((-half - o) / d, (half - o) / d).amin(1)
        t = torch.where((near < far) & (near > 1e-6), near, torch.full_like(near, FAR))
        point = (o + near[:, None] * d) / half
        sign = -torch.sign(d.gather(1, axis[:, None]))
        normal = torch.zeros_like(o).scatter_(1, axis[:, None], sign) @ to_world.mT
        other = point.gather(1, torch.stack([(axis + 1) % 3, (axis + 2) % 3], 1))
        return Hit(t, normal, 0.5 * other + 0.5)


@dataclass(frozen=True)
class Wall:
    """A cylinder about z, seen from inside, from `low` to `high`."""

    radius: float
    low: float
    high: float
    texture: str | tuple[float, float, float]
    repeats: int = 6

    def hit(self, origin: Tensor, direction: Tensor) -> Hit:
        o, d = origin[:, :2], direction[:, :2]
        a, b = (d * d).sum(1).clamp_min(1e-12), (o * d).sum(1)
        t = (-b + (b * b - a * ((o * o).sum(1) - self.radius**2)).clamp_min(0).sqrt()) / a
        point = origin + t[:, None] * direction
        t = torch.where((t > 1e-6) & (point[:, 2] > self.low) & (point[:, 2] < self.high), t, torch.full_like(t, FAR))
        normal = torch.cat([-point[:, :2] / self.radius, torch.zeros_like(point[:, 2:])], 1)
        around = torch.atan2(point[:, 1], point[:, 0]) / (2 * math.pi) * self.repeats
        return Hit(t, normal, torch.stack([around, (self.high - point[:, 2]) / (self.high - self.low)], 1))


def _away_from_zero(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1e-12, torch.full_like(x, 1e-12), x)


@dataclass(frozen=True)
class Scene:
    """Shapes, the cameras to train with and the cameras held out."""

    name: str
    shapes: Sequence[Shape]
    train: tuple[Camera, ...]
    test: tuple[Camera, ...]
    blur: float = 3.0  # standard deviation of the textures' low-pass, in texels

    def view(self, camera: Camera, *, supersample: int = 4) -> View:
        """The picture of one camera, which need not be one of the scene's."""
        fine = camera.to(torch.float32).resized(camera.width * supersample, camera.height * supersample)
        colour, *_ = self._cast(fine, colours=True)
        colour = F.avg_pool2d(colour.permute(2, 0, 1)[None], supersample)[0].permute(1, 2, 0)
        _, depth, normal, which = self._cast(camera.to(torch.float64), colours=False)
        return View(colour.float(), depth.float(), normal.float(), which, camera)

    def _cast(self, camera: Camera, *, colours: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rotation = camera.w2c[:3, :3]
        pixels = pixel_centres(camera.width, camera.height, dtype=rotation.dtype).reshape(-1, 2)
        K = camera.K
        local = torch.stack(
            [(pixels[:, 0] - K[0, 2]) / K[0, 0], (pixels[:, 1] - K[1, 2]) / K[1, 1], torch.ones_like(pixels[:, 0])], 1
        )
        direction = local @ rotation  # t along it is z-depth
        origin = camera.centre.expand_as(direction)
        hits = [shape.hit(origin, direction) for shape in self.shapes]
        depth, which = torch.stack([hit.t for hit in hits]).min(0)
        rgb = torch.zeros_like(direction)
        normal = torch.zeros_like(direction)
        for index, (shape, hit) in enumerate(zip(self.shapes, hits, strict=True)):
            here = which == index
            normal[here] = hit.normal[here]
            if colours:
                rgb[here] = _colour(shape.texture, hit.uv[here], self.blur)
        normal = normal @ rotation.mT
        towards = (normal * local).sum(1, keepdim=True)
        normal = torch.where(towards > 0, -normal, normal)
        shape = (camera.height, camera.width)
        return rgb.view(*shape, 3), depth.view(shape), normal.view(*shape, 3), which.view(shape)


def _colour(texture: str | tuple[float, float, float], uv: Tensor, blur: float) -> Tensor:
    if not isinstance(texture, str):
        return uv.new_tensor(texture).expand(len(uv), 3)
    picture = _texture(texture, blur).to(uv)
    at = (uv.remainder(2.0) - 1).abs()  # mirrored, so that there is no seam
    return F.grid_sample(picture, (2 * at - 1)[None, None], align_corners=False, padding_mode="border")[0, :, 0].T


@cache
def _texture(name: str, blur: float) -> Tensor:  # float64 [1, 3, 128, 128]
    try:
        from skimage import data
    except ImportError as error:
        raise MissingExtra("scikit-image", "geometry") from error
    image = np.atleast_3d(np.asarray(getattr(data, name)()))[..., :3]
    x = torch.from_numpy(image).permute(2, 0, 1)[None].double() / 255
    x = F.interpolate(x.expand(1, 3, -1, -1) if x.shape[1] == 1 else x, size=(128, 128), mode="area")
    reach = math.ceil(3 * blur)
    line = torch.exp(-(torch.arange(-reach, reach + 1, dtype=torch.float64) ** 2) / (2 * blur**2))
    line = (line / line.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="reflect"), line, groups=3)
    x = F.conv2d(F.pad(x, (0, 0, reach, reach), mode="reflect"), line.mT, groups=3)
    mean, std = x.mean((2, 3), keepdim=True), x.std()
    return (mean + (x - mean) * (0.2 / std).clamp(1, 4)).clamp(0, 1)  # what the low-pass took from the contrast


COURTYARD: tuple[Shape, ...] = (
    Ground(-0.6, "brick"),
    Box((0.45, 0.25, -0.25), (0.28, 0.22, 0.35), 0.5, "astronaut"),
    Box((-0.5, -0.3, -0.4), (0.3, 0.25, 0.2), -0.3, "coffee"),
    Sphere((-0.25, 0.5, -0.3), 0.3, "chelsea"),
    Sphere((0.35, -0.5, -0.38), 0.22, "rocket"),
    Wall(7.0, -0.6, 1.8, "gravel"),
    Sphere((0.0, 0.0, 0.0), 30.0, (0.55, 0.7, 0.9), inside=True),
)


def courtyard360(size: int = 48, *, train: int = 8, test: int = 24, turn: float = 0.0) -> Scene:
    """A walk around: `train` cameras evenly on a ring of radius 2.5, `test` cameras between them at other angles; `turn` (radians) moves them all."""
    check_at_least("size", size, 16)
    check_at_least("train", train, 2)
    known = [turn + 2 * math.pi * i / train for i in range(train)]
    held_out = [turn + 2 * math.pi * (i + 0.37) / test for i in range(test)]
    return Scene("courtyard360", COURTYARD, _ring("train", known, size), _ring("test", held_out, size))


def facing3(size: int = 48, *, test: int = 9) -> Scene:
    """Three cameras that look the same way, and `test` between and around them."""
    check_at_least("size", size, 16)
    known = [-math.pi / 2 + a for a in (-0.25, 0.0, 0.25)]
    held_out = [-math.pi / 2 + (-0.22 + 0.44 * (i + 0.5) / test) for i in range(test)]
    return Scene("facing3", COURTYARD, _ring("train", known, size), _ring("test", held_out, size))


def analytic_scene(name: str, size: int = 48) -> Scene:
    """A preset by its name."""
    check_choice("name", name, ("courtyard360", "facing3"))
    return courtyard360(size) if name == "courtyard360" else facing3(size)


def _ring(kind: str, angles: Sequence[float], size: int) -> tuple[Camera, ...]:
    K = intrinsics(focal_of(55.0, size), size, size)
    centres = torch.tensor([[2.5 * math.cos(a), 2.5 * math.sin(a), 0.6] for a in angles])
    poses = look_at(centres, torch.tensor([0.0, 0.0, -0.1]).expand_as(centres))
    return tuple(Camera(K, pose, size, size, f"{kind}_{i:02d}") for i, pose in enumerate(poses))
