"""Drawn shapes and digits with known nuisance factors: every pixel follows from the factors, nothing else is random.

A glyph is a set of line segments in the square [-1, 1]^2 (y down). With the pixel centre p, the pose
q = R(-tilt)(p - shift) / scale and the distance d(q) to the nearest segment, in units of half the image side:

    ink   = clip(1/2 + (width - scale d) / pixel, 0, 1)                    pixel = 2 / image_size; `width` is half a stroke's
    paper = gradient (1 + cos(direction) p_x + sin(direction) p_y) / 2     clipped at zero
    image = clip(paper + brightness ink, 0, 1)

Rendering is differentiable in every factor but the label. `NARROW` and `WIDE` are two ranges of the same factors: train on
one, test on the other, and know by which factor a classifier fails.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from surefoot.core.task import Split, Task
from surefoot.datasets.embedded import seeded
from surefoot.errors import check, check_at_least, check_choice

Range = tuple[float, float]
Polyline = tuple[tuple[float, float], ...]
CIRCLE: Polyline = tuple((0.75 * math.cos(k * math.pi / 6), 0.75 * math.sin(k * math.pi / 6)) for k in range(13))

GLYPHS: dict[str, tuple[Polyline, ...]] = {
    "circle": (CIRCLE,),
    "square": (((-0.65, -0.65), (0.65, -0.65), (0.65, 0.65), (-0.65, 0.65), (-0.65, -0.65)),),
    "triangle": (((0, -0.75), (0.75, 0.6), (-0.75, 0.6), (0, -0.75)),),
    "cross": (((-0.65, -0.65), (0.65, 0.65)), ((-0.65, 0.65), (0.65, -0.65))),
    "arrow": (((0, 0.75), (0, -0.75)), ((-0.55, -0.2), (0, -0.75), (0.55, -0.2))),
    "0": (((-0.45, -0.4), (0, -0.75), (0.45, -0.4), (0.45, 0.4), (0, 0.75), (-0.45, 0.4), (-0.45, -0.4)),),
    "1": (((-0.3, -0.45), (0, -0.75), (0, 0.75)),),
    "2": (((-0.45, -0.5), (0, -0.75), (0.45, -0.5), (0.4, -0.1), (-0.45, 0.75), (0.5, 0.75)),),
    "3": (((-0.45, -0.6), (0.1, -0.75), (0.45, -0.4), (0, 0), (0.45, 0.4), (0.1, 0.75), (-0.45, 0.6)),),
    "4": (((0.25, 0.75), (0.25, -0.75), (-0.5, 0.25), (0.6, 0.25)),),
    "5": (((0.45, -0.75), (-0.4, -0.75), (-0.4, -0.1), (0.2, -0.15), (0.45, 0.3), (0.1, 0.75), (-0.45, 0.65)),),
    "6": (((0.35, -0.75), (-0.4, 0.1), (-0.3, 0.65), (0.25, 0.7), (0.4, 0.3), (0, 0.0), (-0.4, 0.25)),),
    "7": (((-0.5, -0.75), (0.5, -0.75), (-0.1, 0.75)),),
    "8": (((0, 0), (-0.4, -0.4), (0, -0.75), (0.4, -0.4), (0, 0), (-0.45, 0.4), (0, 0.75), (0.45, 0.4), (0, 0)),),
    "9": (((0.4, -0.25), (0, 0.0), (-0.4, -0.3), (-0.25, -0.7), (0.3, -0.65), (0.4, -0.1), (-0.2, 0.75)),),
}
CLASSES = (
    "circle",
    "square",
    "triangle",
    "cross",
    "arrow",
    "2",
    "3",
    "4",
    "5",
    "7",
)  # apart at any tilt up to 40 degrees


@dataclass(frozen=True)
class Ranges:
    """From which interval each factor is drawn, uniformly. Lengths in units of half the image side, angles in degrees."""

    brightness: Range = (0.75, 0.95)
    gradient: Range = (0.0, 0.05)
    direction: Range = (0.0, 360.0)
    tilt: Range = (-6.0, 6.0)
    width: Range = (0.09, 0.13)
    scale: Range = (0.85, 1.0)
    shift_x: Range = (-0.1, 0.1)
    shift_y: Range = (-0.1, 0.1)


NARROW = Ranges()
WIDE = Ranges(brightness=(0.3, 1.0), gradient=(0.0, 0.6), tilt=(-35.0, 35.0), width=(0.06, 0.24))
NUISANCES = ("brightness", "gradient", "tilt", "width")  # where the two differ


@dataclass(frozen=True)
class Factors:
    """Everything an image is made of."""

    label: Tensor  # int64 [N], positions in `classes`
    brightness: Tensor  # float [N], as are the rest
    gradient: Tensor
    direction: Tensor
    tilt: Tensor
    width: Tensor
    scale: Tensor
    shift_x: Tensor
    shift_y: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def take(self, index: Tensor | slice) -> Factors:
        return Factors(*(getattr(self, f.name)[index] for f in fields(self)))

    def changed(self, **changes: Tensor) -> Factors:
        return replace(self, **changes)


def sample_factors(
    n: int, ranges: Ranges = NARROW, *, classes: Sequence[str] = CLASSES, generator: torch.Generator
) -> Factors:
    """`n` draws; the classes occur equally often, give or take one."""
    check_at_least("n", n, 1)
    _segments(classes)
    label = (torch.arange(n) % len(classes))[torch.randperm(n, generator=generator)]
    drawn = []
    for field in fields(ranges):
        low, high = getattr(ranges, field.name)
        check(low <= high, f"The range of {field.name} must be (low, high), got {(low, high)}.")
        drawn.append(low + (high - low) * torch.rand(n, generator=generator))
    return Factors(label, *drawn)


def render(
    factors: Factors, *, image_size: int = 16, classes: Sequence[str] = CLASSES, batch_size: int = 1000
) -> Tensor:  # [N, 1, S, S] in [0, 1]
    """The images of `factors`, in their precision and on their device."""
    check_at_least("image_size", image_size, 4)
    segments = _segments(classes).to(factors.tilt)
    places = [slice(start, start + batch_size) for start in range(0, len(factors), batch_size)]
    return torch.cat([_render(factors.take(place), segments, image_size) for place in places])


def draw(
    n: int, ranges: Ranges, generator: torch.Generator, *, image_size: int = 16, classes: Sequence[str] = CLASSES
) -> tuple[Tensor, Factors]:  # [N, 1, S, S], and what they are made of
    """`render(sample_factors(...))`, and the factors."""
    factors = sample_factors(n, ranges, classes=classes, generator=generator)
    return render(factors, image_size=image_size, classes=classes), factors


def shapes(
    seed: int = 0,
    *,
    sizes: tuple[int, int, int] = (500, 300, 1000),
    train: Ranges = NARROW,
    test: Ranges = WIDE,
    image_size: int = 16,
    classes: Sequence[str] = CLASSES,
) -> Task:
    """A classification task: training images from `train`, validation and test images from `test`.

    The factors of a split are `draw(size, ranges, seeded(seed, "shapes/test"))`, likewise for "train" and "valid".
    """
    ranges = {"train": train, "valid": test, "test": test}
    splits = []
    for (name, drawn_from), size in zip(ranges.items(), sizes, strict=True):
        generator = seeded(seed, f"shapes/{name}")
        x, factors = draw(size, drawn_from, generator, image_size=image_size, classes=classes)
        splits.append(Split(x, factors.label))
    train_split, valid_split, test_split = splits
    return Task("shapes", train_split, valid_split, test_split, len(classes), class_names=tuple(classes), seed=seed)


def _segments(classes: Sequence[str]) -> Tensor:  # float64 [K, S, 4], short glyphs padded with their first segment
    check(len(classes) >= 1, "classes is empty; name at least one glyph.")
    rows = []
    for name in classes:
        check_choice("classes", name, GLYPHS)
        rows.append([(*a, *b) for line in GLYPHS[name] for a, b in itertools.pairwise(line)])
    most = max(map(len, rows))
    return torch.tensor([row + row[:1] * (most - len(row)) for row in rows], dtype=torch.float64)


def _render(f: Factors, segments: Tensor, side: int) -> Tensor:
    pixel = 2.0 / side
    axis = (torch.arange(side, dtype=segments.dtype, device=segments.device) + 0.5) * pixel - 1.0
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angle, column = torch.deg2rad(f.tilt), (slice(None), None, None)
    u, v = (x - f.shift_x[column]) / f.scale[column], (y - f.shift_y[column]) / f.scale[column]
    cos, sin = angle.cos()[column], angle.sin()[column]
    distance = _distance(torch.stack([cos * u + sin * v, cos * v - sin * u], -1), segments[f.label])
    ink = (0.5 + (f.width[column] - f.scale[column] * distance) / pixel).clamp(0, 1)
    towards = torch.deg2rad(f.direction)
    slope = (1 + towards.cos()[column] * x + towards.sin()[column] * y) / 2
    paper = (f.gradient[column] * slope).clamp(min=0)
    return (paper + f.brightness[column] * ink).clamp(0, 1).unsqueeze(1)


def _distance(
    points: Tensor,  # [B, H, W, 2]
    segments: Tensor,  # [B, S, 4]
) -> Tensor:  # [B, H, W], to the nearest segment
    start, end = segments[:, None, None, :, :2], segments[:, None, None, :, 2:]
    along, away = end - start, points.unsqueeze(-2) - start
    share = ((away * along).sum(-1) / along.square().sum(-1)).clamp(0, 1)
    square = (away - share.unsqueeze(-1) * along).square().sum(-1).amin(-1)
    return (square + 1e-12).sqrt()  # the root's slope at zero is infinite
