"""Stage 3: a smooth walk through the scene, and frames that look filmed. It changes the video; the splats only where `distill` is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from surefoot.errors import InvalidInput, check, check_at_least, check_positive
from surefoot.geometry.lm_gaussian.priors import ImageRepairPrior, VideoEnhancePrior
from surefoot.geometry.lm_gaussian.stages import Checkpoint, Course, Record
from surefoot.geometry.lm_gaussian.terms import VirtualViews
from surefoot.geometry.lm_gaussian.train import Rates, train_splats
from surefoot.nn.geometry.cameras import Camera, back_project, transform, turn
from surefoot.nn.geometry.rasterizer import rasterize
from surefoot.nn.geometry.rotations import rigid
from surefoot.nn.geometry.splats import GaussianScene


def smooth_path(cameras: Sequence[Camera], frames: int = 60, *, closed: bool = False) -> list[Camera]:
    """A cubic spline through the centres and SLERP between the rotations, at equal steps of the walk; `closed` returns to the start."""
    if len(cameras) < 2:
        raise InvalidInput(f"A path needs at least two cameras, got {len(cameras)}.")
    check_at_least("frames", frames, 2)
    closed = closed and len(cameras) > 2
    stops, home = [c.to("cpu") for c in ([*cameras, cameras[0]] if closed else cameras)], cameras[0].K.device
    centres = torch.stack([c.centre for c in stops]).double()
    steps = (centres[1:] - centres[:-1]).norm(dim=1).clamp_min(1e-9)
    knots = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    spline = CubicSpline(knots.numpy(), centres.numpy(), bc_type="periodic" if closed else "natural")
    path = []
    for k in range(frames):
        at = float(knots[-1]) * k / (frames if closed else frames - 1)
        leg = min(int(torch.searchsorted(knots, torch.tensor(at, dtype=knots.dtype), right=True)) - 1, len(steps) - 1)
        t = (at - float(knots[leg])) / float(steps[leg])
        rotation = turn(stops[leg], stops[leg + 1], t).double()
        centre = torch.from_numpy(spline(at))
        K = torch.lerp(stops[leg].K, stops[leg + 1].K, t)
        w2c = rigid(rotation, -(rotation @ centre)).to(K)
        path.append(Camera(K, w2c, cameras[0].width, cameras[0].height, f"frame_{k:04d}").to(home))
    return path


@torch.no_grad()
def render_path(
    scene: GaussianScene, path: Sequence[Camera], background: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Frames [F, H, W, 3] in [0, 1] and their expected depths [F, H, W]."""
    drawn = [rasterize(scene, camera, background) for camera in path]
    return torch.stack([d.rgb.clamp(0, 1) for d in drawn]), torch.stack([d.expected_depth for d in drawn])


def enhance_video(
    scene: GaussianScene,
    path: Sequence[Camera],
    video_prior: VideoEnhancePrior,
    *,
    strength: float = 0.2,
    clip: int = 30,
    contrast: float = 1.0,
    background: Tensor | None = None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # before and after, [F, H, W, 3]
    """Render a path and enhance it in clips. Keep both: numbers before and after enhancement must not be mixed."""
    check_at_least("clip", clip, 1)
    frames, depths = render_path(scene, path, background)
    after = [
        video_prior.enhance(
            frames[k : k + clip], depths[k : k + clip], path[k : k + clip], strength=strength, generator=generator
        )
        for k in range(0, len(frames), clip)
    ]
    enhanced = torch.cat(after)
    check(
        enhanced.shape == frames.shape, f"The video prior returned {tuple(enhanced.shape)} for {tuple(frames.shape)}."
    )
    middle = enhanced.mean((1, 2), keepdim=True)
    return frames, (middle + contrast * (enhanced - middle)).clamp(0, 1)


def distill(
    scene: GaussianScene,
    cameras: Sequence[Camera],
    images: Tensor,  # [V, H, W, 3], the photos
    path: Sequence[Camera],
    enhanced: Tensor,  # [F, H, W, 3]
    *,
    steps: int,
    weight: float = 0.2,
    rates: Rates | None = None,
    background: Tensor | None = None,
    generator: torch.Generator,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[int, int, Record], None] | None = None,
) -> Course:
    """Feed enhanced frames back into the splats, in place: `steps` under the photos and, as weak targets of `weight`, the frames.

    Frames disagree with each other and with the photos, hence the small weight; score the scene before and after, apart.
    """
    check(len(path) == len(enhanced), f"There are {len(path)} cameras for {len(enhanced)} enhanced frames.")
    check_at_least("steps", steps, 1)
    check_positive("weight", weight)
    views = VirtualViews(path, enhanced, torch.ones_like(enhanced[..., 0]), weight)
    return train_splats(scene, cameras, images, steps=steps, generator=generator, rates=rates, virtual=views, background=background, checkpoint=checkpoint, on_step=on_step)  # fmt: skip


@dataclass
class TemporalFilterEnhance:
    """The embedded video backend: each frame's two neighbours are warped onto it by the rendered depth (the cameras are known, so no optical flow is
    needed); the per-pixel median of those that agree in depth takes out flicker; then one weak pass of the image repair, if there is one."""

    repair: ImageRepairPrior | None = None
    agree: float = 0.02

    @property
    def name(self) -> str:
        return "temporal median of warped neighbours" + ("" if self.repair is None else f" + {self.repair.name}")

    def enhance(
        self, frames: Tensor, depths: Tensor, cameras: Sequence[Camera], *, strength: float, generator: torch.Generator
    ) -> Tensor:
        """Frames [F, H, W, 3] with their depths [F, H, W] and cameras -> frames; the repair, if any, at `strength` but at most 0.1."""
        stack = []
        for k in range(len(frames)):
            layers = [frames[k]]
            for other in (k - 1, k + 1):
                if 0 <= other < len(frames):
                    warped, valid = warp(
                        frames[other], depths[other], cameras[other], depths[k], cameras[k], agree=self.agree
                    )
                    layers.append(torch.where(valid[..., None], warped, frames[k]))
            stack.append(torch.stack(layers).median(0).values if len(layers) == 3 else torch.stack(layers).mean(0))
        steady = torch.stack(stack)
        if self.repair is None or strength == 0:
            return steady
        return self.repair.repair(steady, strength=min(strength, 0.1), generator=generator)


def warp(
    source: Tensor,  # [H, W, 3]
    source_depth: Tensor,  # [H, W]
    source_camera: Camera,
    depth: Tensor,  # [H, W], of the view to be filled
    camera: Camera,
    *,
    agree: float = 0.02,
) -> tuple[Tensor, Tensor]:  # colours [H, W, 3], where they are valid bool [H, W]
    """What the source shows at the points that `camera` sees; valid where both agree on the depth."""
    points = transform(source_camera.w2c, back_project(depth, camera.K, camera.w2c))
    z = points[..., 2]
    uv = points[..., :2] / z.clamp_min(1e-6)[..., None] @ source_camera.K[:2, :2].mT + source_camera.K[:2, 2]
    size = uv.new_tensor([source_camera.width, source_camera.height])
    grid = (2 * uv / size - 1)[None]
    both = torch.cat([source, source_depth[..., None]], -1).permute(2, 0, 1)[None]
    found = torch.nn.functional.grid_sample(both, grid, align_corners=False, padding_mode="border")[0].permute(1, 2, 0)
    inside = ((uv >= 0) & (uv < size)).all(-1) & (z > 1e-6) & (depth > 0)
    return found[..., :3], inside & ((found[..., 3] / z.clamp_min(1e-6) - 1).abs() < agree)
