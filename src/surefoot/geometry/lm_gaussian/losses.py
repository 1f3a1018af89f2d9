"""The regularisers of the second stage: photometric, depth, normal and virtual-view losses, and where virtual cameras stand.

photometric   0.8 L1 + 0.2 (1 - SSIM)
depth         1 - rho(D, M), over the image and in boxes; rho is Pearson's correlation, so M may have any scale and shift
normal        mean_p sum_c |N_c - N*_c| + mean_p (1 - <N, N*>)
virtual       L1 to a rendering of the cleaned point cloud, at cameras between the photos, where the cloud covers the pixel
w(v)          min(1, 16 d1(v) / (1.2 dmax)): a repaired view counts less the nearer it stands to a photo
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from surefoot.errors import InvalidInput, check, check_at_least
from surefoot.nn.geometry.cameras import Camera, interpolate, project
from surefoot.nn.geometry.image_metrics import ssim

LEAST_SPREAD = 1e-8  # below this product of standard deviations two maps have no correlation


def photometric_loss(image: Tensor, target: Tensor) -> Tensor:  # [H, W, 3] twice, in [0, 1] -> []
    """0.8 mean |image - target| + 0.2 (1 - SSIM), as in Kerbl et al., 3D Gaussian Splatting, 2023, arXiv 2308.04079."""
    _check_same("image", image, "target", target)
    return 0.8 * (image - target).abs().mean() + 0.2 * (1 - ssim(image, target))


def _check_same(one: str, a: Tensor, other: str, b: Tensor) -> None:
    check(a.shape == b.shape, f"{one} and {other} must have one shape, got {list(a.shape)} and {list(b.shape)}.")


def pearson(
    a: Tensor,  # [..., P]
    b: Tensor,  # [..., P]
) -> Tensor:  # [...]
    """Pearson's correlation with population standard deviations: cov / max(sd sd, 1e-8).

    The maximum, not a sum: an additive epsilon breaks the invariance to scale for maps of small variance.
    """
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    spread = (a.square().mean(-1) * b.square().mean(-1)).clamp_min(LEAST_SPREAD**2).sqrt()
    return (a * b).mean(-1) / spread


def pearson_depth_loss(
    depth: Tensor,  # [H, W]
    mono: Tensor,  # [H, W]
    mask: Tensor | None = None,  # bool [H, W]
) -> Tensor:
    """1 - rho over the image, or over a mask: 0 where `mono` is an increasing affine map of `depth`, 2 where it is a decreasing one. Raises
    `InvalidInput` for maps of two shapes and for fewer than two pixels."""
    _check_same("depth", depth, "mono", mono)
    if mask is not None:
        depth, mono = depth[mask], mono[mask]
    check(depth.numel() >= 2, "The depth loss needs at least two pixels.")
    return 1 - pearson(depth.flatten(), mono.flatten())


def local_pearson_loss(
    depth: Tensor,  # [H, W]
    mono: Tensor,  # [H, W]
    box: int,
    fraction: float = 0.5,
    *,
    generator: torch.Generator,
) -> Tensor:
    """The mean of 1 - rho over random boxes, `fraction` times as many as fit side by side; flat boxes (sky) are passed over."""
    _check_same("depth", depth, "mono", mono)
    height, width = depth.shape
    check_at_least("box", box, 2)
    box = min(box, height, width)
    count = max(1, int(fraction * (height // box) * (width // box)))
    top = torch.randint(0, height - box + 1, (count,), generator=generator, device=generator.device)
    left = torch.randint(0, width - box + 1, (count,), generator=generator, device=generator.device)
    offset = torch.arange(box, device=generator.device)
    rows, columns = (top[:, None] + offset).to(depth.device), (left[:, None] + offset).to(depth.device)
    place = (rows[:, :, None] * width + columns[:, None, :]).flatten()
    # Boxes overlap: the backward of depth[rows, columns] would add with atomics, in an order that changes with several threads.
    a, b = (x.flatten().index_select(0, place).unflatten(0, (count, -1)) for x in (depth, mono))
    textured = (a.detach().std(1, unbiased=False) >= 1e-4) & (b.std(1, unbiased=False) >= 1e-4)
    if not bool(textured.any()):
        return depth.sum() * 0
    return (1 - pearson(a[textured], b[textured])).mean()


def normal_loss(
    normal: Tensor,  # [H, W, 3], unit
    prior: Tensor,  # [H, W, 3], unit, zero where unknown
) -> Tensor:
    """mean sum_c |N - N*| + mean (1 - <N, N*>) over the pixels with a prior."""
    _check_same("normal", normal, "prior", prior)
    known = prior.norm(dim=-1) > 0.5
    if not bool(known.any()):
        return normal.sum() * 0
    a, b = normal[known], prior[known]
    return (a - b).abs().sum(-1).mean() + (1 - (a * b).sum(-1)).mean()


# --- virtual views ----------------------------------------------------------------------------------------------------


def camera_tour(cameras: Sequence[Camera], *, closed: bool) -> list[int]:
    """An order in which to walk past the cameras: nearest neighbour from each start, improved by 2-opt; the shortest wins."""
    centres = torch.stack([c.centre for c in cameras]).double().cpu().numpy()
    distance = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    n = len(cameras)

    def length(tour: list[int]) -> float:
        steps = zip(tour, [*tour[1:], tour[0]] if closed else tour[1:], strict=False)
        return float(sum(distance[a, b] for a, b in steps))

    best: list[int] = list(range(n))
    for start in range(n):
        tour, left = [start], set(range(n)) - {start}
        while left:
            tour.append(min(left, key=lambda k: (distance[tour[-1], k], k)))
            left.remove(tour[-1])
        improved = True
        while improved:
            improved = False
            for i in range(n - 1):
                for j in range(i + 2, n + 1):
                    other = tour[:i] + tour[i:j][::-1] + tour[j:]
                    if length(other) < length(tour) - 1e-12:
                        tour, improved = other, True
        if length(tour) < length(best) - 1e-12:
            best = tour
    return best


def virtual_cameras(cameras: Sequence[Camera], n: int = 10, *, closed: bool = False) -> list[Camera]:
    """`n` steps on the way between consecutive cameras (t = j / n, j = 0 .. n - 1), around again to the first if `closed`.

    Rotations by SLERP, centres on a straight line. Give the cameras in walking order (`camera_tour`).
    """
    if len(cameras) < 2:
        raise InvalidInput(
            f"Virtual views stand between cameras, and there is {len(cameras)}; give at least two photos."
        )
    check_at_least("n", n, 1)
    pairs = list(zip(cameras, [*cameras[1:], cameras[0]], strict=True))
    pairs = pairs if closed and len(cameras) > 2 else pairs[:-1]
    return [interpolate(a, b, j / n) for a, b in pairs for j in range(n)]


def distance_weight(
    centre: Tensor,  # [3]
    train: Tensor,  # [V, 3]
    gain: float = 16.0,
) -> float:
    """w = min(1, gain d1 / (1.2 dmax)); d1 to the nearest photo, dmax the largest over photos of the second-largest distance to the others."""
    check(len(train) >= 3, f"The distance weight needs at least three photos, got {len(train)}.")
    between = torch.cdist(train, train)
    widest = between.sort(1, descending=True).values[:, 1].max()
    nearest = (train - centre).norm(dim=1).min()
    return float((gain * nearest / (1.2 * widest)).clamp(max=1.0))


def render_points(
    points: Tensor,  # [N, 3]
    colours: Tensor,  # [N, 3]
    camera: Camera,
    *,
    radius: float = 1.0,  # pixels
    k: int = 20,
    occlusion: float | None = 0.04,
    near: float = 1e-3,
) -> tuple[Tensor, Tensor]:  # rgb [H, W, 3], covered bool [H, W]
    """The point cloud as discs: the nearest `k` points a pixel, mixed with weights 1 - (distance / radius)^2.

    Only points within the share `occlusion` of the nearest depth in a pixel take part, else what lies behind shines through.
    Pixels without points are False in the mask and must not train anything.
    """
    check(radius > 0, f"radius must be positive, got {radius!r}.")
    uv, z = project(points, camera)
    reach = int(np.ceil(radius + 0.5))
    offsets = torch.arange(-reach, reach + 1, device=points.device)
    dy, dx = (t.flatten() for t in torch.meshgrid(offsets, offsets, indexing="ij"))
    column = uv[:, :1].floor().long() + dx
    row = uv[:, 1:].floor().long() + dy
    square = (column + 0.5 - uv[:, :1]) ** 2 + (row + 0.5 - uv[:, 1:]) ** 2
    hit = (
        (square < radius**2)
        & (z > near)[:, None]
        & (column >= 0)
        & (row >= 0)
        & (column < camera.width)
        & (row < camera.height)
    )
    which, place = hit.nonzero(as_tuple=True)
    pixel = row[which, place] * camera.width + column[which, place]
    weight = 1 - square[which, place] / radius**2
    depth = z[which]
    order = torch.argsort(depth, stable=True)
    order = order[torch.argsort(pixel[order], stable=True)]  # by pixel, near to far
    which, pixel, weight, depth = which[order], pixel[order], weight[order], depth[order]
    count = torch.bincount(pixel, minlength=camera.width * camera.height)
    start = count.cumsum(0) - count
    rank = torch.arange(len(pixel), device=pixel.device) - start[pixel]
    used = rank < k
    if occlusion is not None and len(pixel):
        nearest = depth[start[pixel]]
        used &= depth <= nearest * (1 + occlusion)
    total = points.new_zeros(camera.width * camera.height).index_add_(0, pixel, weight * used)
    rgb = points.new_zeros(camera.width * camera.height, 3).index_add_(
        0, pixel, colours[which].to(points) * (weight * used)[:, None]
    )
    covered = total > 0
    rgb = rgb / total.clamp_min(1e-12)[:, None]
    return rgb.view(camera.height, camera.width, 3), covered.view(camera.height, camera.width)
