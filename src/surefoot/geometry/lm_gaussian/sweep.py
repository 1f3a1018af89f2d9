"""Dense depth for posed photos by plane sweep: for every pixel the depth at which the other photos agree with it best.

For each view, planes of equal depth are swept through the scene; the neighbours are warped onto each plane by its homography and compared by zero-mean
normalised cross-correlation (ZNCC) over a 7 x 7 window. The winner is refined by a parabola in inverse depth. A left-right check keeps what two views
agree on within one percent. Confidence is

    c = 1 + 10 (best - second best ZNCC)_+ (1 + min(tracks in a disc, 2)),

where tracks are the sparse points that the view sees; and 1.001 with depth 0 where nothing supports a depth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from surefoot.errors import check, check_at_least
from surefoot.nn.geometry.cameras import Camera, back_project, transform

UNSUPPORTED, MOST_SUPPORT = 1.001, 2


@torch.no_grad()
def plane_sweep(
    images: Tensor,  # [V, H, W, 3]
    cameras: Sequence[Camera],
    near_far: Sequence[tuple[float, float]],  # per view, from its sparse points
    *,
    tracks: Sequence[Tensor] | None = None,  # per view [P, 2], the pixels of its sparse points
    disc: float = 15.0,
    planes: int = 64,
    window: int = 7,
    neighbours: int = 3,
    agree: float = 0.01,
) -> tuple[Tensor, Tensor]:  # depths [V, H, W], confidences [V, H, W] above 1
    """Depths and confidences of all views; an unsupported pixel has depth 0."""
    check_at_least("planes", planes, 4)
    check(
        len(images) == len(cameras) == len(near_far) >= 2,
        "plane_sweep needs at least two views, with a camera and a depth range each.",
    )
    grey = images.mean(-1)
    centres = torch.stack([c.centre for c in cameras])
    found = []
    for k in range(len(cameras)):
        order = (centres - centres[k]).norm(dim=1).argsort()[1 : 1 + neighbours].tolist()
        found.append(_sweep_one(grey, cameras, k, order, near_far[k], planes, window))
    depths, conf = torch.stack([d for d, _ in found]), torch.stack([c for _, c in found])
    if tracks is not None:
        check(len(tracks) == len(images), f"There are tracks of {len(tracks)} views for {len(images)} images.")
        support = torch.stack([track_support(t.to(conf), conf.shape[1:], disc) for t in tracks])
        conf = torch.where(conf > UNSUPPORTED, 1 + (conf - 1) * (1 + support), conf)
    conf = _checked(depths, conf, cameras, agree)
    return torch.where(conf > UNSUPPORTED, depths, torch.zeros_like(depths)), conf


def track_support(
    tracks: Tensor,  # [P, 2], pixels
    shape: Sequence[int],  # height, width
    disc: float,
) -> Tensor:  # [H, W]
    """How many sparse points lie within `disc` pixels of each pixel, at most two."""
    height, width = shape
    reach = int(disc)
    column, row = tracks.floor().long().unbind(1)
    inside = (column >= 0) & (row >= 0) & (column < width) & (row < height)
    counts = tracks.new_zeros(height * width)
    counts.index_add_(0, (row * width + column)[inside], torch.ones_like(tracks[inside, 0]))
    step = torch.arange(-reach, reach + 1, dtype=tracks.dtype, device=tracks.device)
    round_ = (step[:, None] ** 2 + step**2 <= disc**2).to(tracks)
    found = F.conv2d(counts.view(1, 1, height, width), round_[None, None], padding=reach)[0, 0]
    return found.round().clamp_max(MOST_SUPPORT)


def _sweep_one(
    grey: Tensor,
    cameras: Sequence[Camera],
    k: int,
    others: Sequence[int],
    near_far: tuple[float, float],
    planes: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    camera = cameras[k]
    near, far = near_far
    inverse = torch.linspace(1 / far, 1 / near, planes, dtype=grey.dtype)
    score = torch.stack([_zncc_volume(grey[k], grey[j], camera, cameras[j], inverse, window) for j in others])
    # The better half of the neighbours: where one is hidden, another may see.
    score = score.sort(0, descending=True).values[: max(1, (len(others) + 1) // 2)].mean(0)  # [D, H, W]
    best, at = score.max(0)
    apart = (torch.arange(planes)[:, None, None] - at).abs() > 2
    second = torch.where(apart, score, torch.full_like(score, -1.0)).amax(0)
    inner = at.clamp(1, planes - 2)[None]
    a, b, c = (score.gather(0, inner + step)[0] for step in (-1, 0, 1))
    bend = a - 2 * b + c
    shift = torch.where(bend < -1e-6, 0.5 * (a - c) / bend.clamp(max=-1e-6), torch.zeros_like(bend)).clamp(-0.5, 0.5)
    shift = torch.where((at == 0) | (at == planes - 1), torch.zeros_like(shift), shift)
    step = inverse[1] - inverse[0]
    depth = 1 / (inverse[at] + shift * step)
    conf = torch.where(best > 0.3, 1 + 10 * (best - second).clamp_min(0), torch.full_like(best, UNSUPPORTED))
    return depth, conf.clamp_min(UNSUPPORTED)


def _zncc_volume(
    reference: Tensor, other: Tensor, camera: Camera, source: Camera, inverse: Tensor, window: int
) -> Tensor:
    """[D, H, W]: how well the neighbour matches at every plane; -1 where it does not see the point."""
    height, width = reference.shape
    rays = back_project(torch.ones_like(reference), camera.K.to(reference))  # depth 1
    relative = source.w2c.to(reference) @ torch.linalg.inv(camera.w2c.to(reference))
    points = transform(relative, rays[None] / inverse[:, None, None, None])
    z = points[..., 2]
    uv = points[..., :2] / z.clamp_min(1e-6)[..., None] @ source.K[:2, :2].to(reference).mT + source.K[:2, 2].to(
        reference
    )
    grid = 2 * uv / uv.new_tensor([width, height]) - 1
    warped = F.grid_sample(other.expand(len(inverse), 1, height, width), grid, align_corners=False)[:, 0]
    seen = (grid.abs() < 1).all(-1) & (z > 1e-6)
    return torch.where(seen, zncc(reference[None], warped, window), torch.full_like(warped, -1.0))


def zncc(a: Tensor, b: Tensor, window: int) -> Tensor:  # [1 or D, H, W] twice -> [D, H, W]
    """Zero-mean normalised cross-correlation of square windows; 0 where either is flat."""

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x[:, None], window, 1, window // 2, count_include_pad=False)[:, 0]

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    flat = (var_a < 1e-5) | (var_b < 1e-5)
    return torch.where(flat, torch.zeros_like(covariance), covariance / (var_a * var_b).clamp_min(1e-12).sqrt()).clamp(
        -1, 1
    )


def _checked(depths: Tensor, conf: Tensor, cameras: Sequence[Camera], agree: float) -> Tensor:
    """Confidence where another view has the same point within `agree` of its depth; UNSUPPORTED elsewhere."""
    shape = depths.shape[1:]
    supported = torch.zeros_like(conf, dtype=torch.bool)
    for i, camera in enumerate(cameras):
        points = back_project(depths[i], camera.K.to(depths), camera.w2c.to(depths)).reshape(-1, 3)
        for j, other in enumerate(cameras):
            if i == j:
                continue
            local = transform(other.w2c.to(depths), points)
            z = local[:, 2]
            uv = local[:, :2] / z.clamp_min(1e-6)[:, None] @ other.K[:2, :2].to(depths).mT + other.K[:2, 2].to(depths)
            column, row = uv.floor().long().unbind(1)
            inside = (z > 1e-6) & (column >= 0) & (row >= 0) & (column < shape[1]) & (row < shape[0])
            there = depths[j][row.clamp(0, shape[0] - 1), column.clamp(0, shape[1] - 1)]
            sure = conf[j][row.clamp(0, shape[0] - 1), column.clamp(0, shape[1] - 1)] > UNSUPPORTED
            supported[i] |= (inside & sure & ((z / there - 1).abs() < agree)).view(shape)
    return torch.where(supported, conf, torch.full_like(conf, UNSUPPORTED))
