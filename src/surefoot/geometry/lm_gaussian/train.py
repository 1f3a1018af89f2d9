"""Stages 1 and 2: splats from a cloud, under several priors at once; then again under photos and repaired virtual views.

One loop (`train_splats`) serves the method, its ablations and its rivals: a photo is drawn at random without replacement, rendered, and the terms given
add up. `Rates()` suits runs of some hundred steps, `Rates.full` is the published schedule. Densification and opacity resets are off: on
a handful of views they destroy a good start within a few hundred steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surefoot.errors import InvalidInput, check, check_at_least, check_choice
from surefoot.geometry.lm_gaussian.losses import distance_weight, photometric_loss
from surefoot.geometry.lm_gaussian.poses import PoseIncrements
from surefoot.geometry.lm_gaussian.priors import ImageRepairPrior
from surefoot.geometry.lm_gaussian.stages import (
    Checkpoint,
    Course,
    InnerCheckpoint,
    Record,
    scene_from_dict,
    scene_to_dict,
)
from surefoot.geometry.lm_gaussian.terms import MultiModalLoss, Terms, VirtualViews
from surefoot.nn.geometry.cameras import Camera, scene_extent
from surefoot.nn.geometry.densification import DensificationStrategy, change_rows, splat_optimizer
from surefoot.nn.geometry.image_metrics import psnr
from surefoot.nn.geometry.rasterizer import RenderOut, rasterize
from surefoot.nn.geometry.splats import NAMES, GaussianScene

# Steps whose renderings are kept as faulty. Before them opacities still rise from 0.1, and a repair model would learn to brighten.
EARLY = (50, 1000)
SHORT = 500  # steps that the default rates are for


@dataclass(frozen=True)
class Rates:
    """Adam's learning rates; the means' are in units of the scene's extent and fall exponentially to `means_end` of their start."""

    means: float = 4e-3
    means_end: float = 0.05
    log_scales: float = 1e-2
    quats: float = 3e-3
    opacity: float = 0.05
    sh: float = 1e-2

    @classmethod
    def full(cls, mode: str = "360") -> Rates:
        """The published rates for 12,000 steps and more."""
        check_choice("mode", mode, ("360", "forward"))
        if mode == "360":
            return cls(means=1e-4, means_end=0.1, log_scales=5e-3, quats=3e-3, opacity=0.05, sh=2.5e-3)
        return cls(means=1e-4, means_end=0.01, log_scales=0.015, quats=3e-3, opacity=0.065, sh=5e-3)

    @classmethod
    def of(cls, steps: int, mode: str = "360", *, full_steps: int = 30_000) -> Rates:
        """For a run of `steps` in all: these up to 500, the published ones from `full_steps` on, geometric in the number of steps between."""
        check_at_least("steps", steps, 1)
        short, long = cls(), cls.full(mode)
        share = min(1.0, max(0.0, math.log(steps / SHORT) / math.log(full_steps / SHORT)))
        return cls(*(a * (b / a) ** share for a, b in zip(astuple(short), astuple(long), strict=True)))


def train_splats(
    scene: GaussianScene,
    cameras: Sequence[Camera],
    images: Tensor,  # [V, H, W, 3]
    *,
    steps: int,
    generator: torch.Generator,
    rates: Rates | None = None,
    schedule: int | None = None,
    first_step: int = 0,
    multi: MultiModalLoss | None = None,
    virtual: VirtualViews | None = None,
    strategy: DensificationStrategy | None = None,
    background: Tensor | None = None,
    sh_every: int | None = None,
    filter_every: int | None = None,
    prune_every: int | None = None,
    prune_below: float = 0.02,
    keep_early: int = 0,
    optimize_poses: bool = False,
    pose_rate: float = 1e-4,
    checkpoint: Checkpoint | InnerCheckpoint | None = None,
    on_step: Callable[[int, int, Record], None] | None = None,
) -> Course:
    """Train a scene in place on photos.

    - `schedule`: the length that rates decay over (default: this run); `first_step` is where on it the run begins.
    - `sh_every`: raise the harmonics' degree so often; `filter_every`: renew the 3D smoothing filter so often (None: off).
    - `keep_early`: how many renderings a photo to keep from the steps `EARLY`, as degraded halves of repair pairs.
    - `optimize_poses`: move the cameras too, at a rate that falls from `pose_rate` to a hundredth of it; `Course.cameras` holds where they end.
    - `checkpoint`: take up the run that it holds, and keep this one there; the end is the same to the bit, however often a run is stopped.
    - `on_step(step, steps, record)`: progress; exceptions from it (an interruption) leave the scene as it is.
    """
    check(
        len(cameras) == len(images) and len(images) > 0, f"There are {len(cameras)} cameras for {len(images)} images."
    )
    check_at_least("steps", steps, 0)
    rates, schedule = rates or Rates(), schedule or steps
    for camera, image in zip(cameras, images, strict=True):
        check(image.shape == (camera.height, camera.width, 3), f"Camera {camera.name!r} is {camera.width} x {camera.height}, its image {tuple(image.shape)}.")  # fmt: skip
    extent = scene_extent(torch.stack([c.centre for c in cameras]))
    course, saved = Course(steps=steps), None if checkpoint is None else checkpoint.load(generator)
    if saved is not None:
        course = _take_up(scene, saved)
    optimizer = splat_optimizer(scene, extent, means=rates.means, log_scales=rates.log_scales, quats=rates.quats, opacity=rates.opacity, sh=rates.sh)  # fmt: skip
    background = scene.means.new_zeros(3) if background is None else background
    poses = PoseIncrements(cameras) if optimize_poses else None
    pose_optimizer = None if poses is None else torch.optim.Adam(poses.parameters(), pose_rate)
    loop = _Loop(scene, course, optimizer, poses, pose_optimizer, strategy)
    queue = [] if saved is None else loop.restore(saved)
    early_from, early_until = min(EARLY[0], steps // 3), EARLY[1]
    for step in range(first_step if saved is None else saved["next"], first_step + steps):
        optimizer.param_groups[0]["lr"] = rates.means * extent * rates.means_end ** (step / max(1, schedule))
        if filter_every and step % filter_every == 0:
            scene.update_filter(cameras)
        if sh_every and step and step % sh_every == 0:
            scene.active_degree = min(scene.degree, scene.active_degree + 1)
        queue = queue or torch.randperm(len(images), generator=generator, device=generator.device).tolist()
        photo = queue.pop()
        camera = cameras[photo] if poses is None else poses.camera(photo)
        out = rasterize(scene, camera, background, normals=multi is not None and multi.needs_normals(step))
        terms: dict[str, Tensor] = {"photometric": photometric_loss(out.rgb, images[photo])}
        if multi is not None:
            terms |= multi(out, camera, photo, generator, step)
        if virtual is not None:
            terms["virtual"] = virtual.term(scene, background, generator)
        if poses is not None:
            terms["poses"] = poses.penalty()
        loss = torch.stack([t.reshape(()) for t in terms.values()]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if keep_early and early_from <= step < early_until and sum(k == photo for k, _ in course.early) < keep_early:
            course.early.append((photo, out.rgb.detach()))
        if strategy is not None:
            strategy.observe(out, cameras[photo].width, cameras[photo].height)
        optimizer.step()
        if pose_optimizer is not None:
            pose_optimizer.param_groups[0]["lr"] = pose_rate * 0.01 ** (step / max(1, schedule))
            pose_optimizer.step()
            pose_optimizer.zero_grad(set_to_none=True)
        if strategy is not None:
            strategy.step(scene, optimizer, step, extent, generator)
        if prune_every and step and step % prune_every == 0:
            keep = scene.logit_opacities.detach().sigmoid() >= prune_below
            if 2 <= int(keep.sum()) < len(scene):
                change_rows(scene, optimizer, keep)
        record = _record(course, step, first_step + steps, terms, out, images[photo], len(scene))
        if checkpoint is not None and checkpoint.due():
            checkpoint.save(loop.state(step + 1, queue), generator)
        if on_step is not None:
            on_step(step + 1, first_step + steps, record)
    if poses is not None:
        course.cameras = poses.final()
    return course


def _take_up(scene: GaussianScene, saved: dict[str, Any]) -> Course:
    """Put the scene where the saved run left it; the number of splats may have changed."""
    then, course = scene_from_dict(saved)
    for name in NAMES:
        setattr(scene, name, nn.Parameter(getattr(then, name).detach().to(scene.means)))
    scene.filter_3d, scene.active_degree = then.filter_3d.to(scene.means), then.active_degree
    return course


@dataclass(frozen=True)
class _Loop:
    """All that a training loop changes from step to step, put away and taken up again."""

    scene: GaussianScene
    course: Course
    optimizer: torch.optim.Optimizer
    poses: PoseIncrements | None
    pose_optimizer: torch.optim.Optimizer | None
    strategy: DensificationStrategy | None

    def state(self, following: int, queue: list[int]) -> dict[str, Any]:
        modules = {"optimizer": self.optimizer, "poses": self.poses, "pose_optimizer": self.pose_optimizer}
        kept = {name: m.state_dict() for name, m in modules.items() if m is not None}
        counts = {} if self.strategy is None else {k: v for k, v in vars(self.strategy).items() if k.endswith("_")}
        return {
            **scene_to_dict(self.scene, self.course),
            **kept,
            "strategy": counts,
            "next": following,
            "queue": list(queue),
        }

    def restore(self, saved: dict[str, Any]) -> list[int]:
        """The photos not yet drawn; everything else is put in its place."""
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.poses is not None and self.pose_optimizer is not None:
            self.poses.load_state_dict(saved["poses"])
            self.pose_optimizer.load_state_dict(saved["pose_optimizer"])
        if self.strategy is not None:
            vars(self.strategy).update(saved["strategy"])
        return list(saved["queue"])


def _record(course: Course, step: int, last: int, terms: Terms, out: RenderOut, image: Tensor, splats: int) -> Record:
    if step % 100 and step + 1 != last:
        return {}
    record = {name: float(value.detach()) for name, value in terms.items()}
    if not all(map(math.isfinite, record.values())):
        raise InvalidInput(f"Training diverged at step {step} ({record}); lower the learning rates.")
    record |= {
        "step": step + 1.0, "splats": float(splats), "visible": float(out.visible.float().mean()),
        "coverage": float(out.alpha.detach().mean()), "train_psnr": psnr(out.rgb.detach(), image),
    }  # fmt: skip
    course.history.append(record)
    return record


# --- stage 2 ----------------------------------------------------------------------------------------------------------


def collect_repair_pairs(course: Course, images: Tensor) -> tuple[Tensor, Tensor]:  # [P, H, W, 3] twice
    """(early rendering, photo): what the repair model learns to undo in this very place."""
    check(bool(course.early), "No early renderings were kept; train stage 1 with keep_early > 0.")
    return torch.stack([image for _, image in course.early]), torch.stack([images[k] for k, _ in course.early])


@torch.no_grad()
def repaired_views(
    scene: GaussianScene,
    cameras: Sequence[Camera],
    train: Sequence[Camera],
    prior: ImageRepairPrior,
    *,
    strength: float,
    generator: torch.Generator,
    background: Tensor | None = None,
    gain: float | None = 16.0,
    mask_unreliable: bool = False,
) -> VirtualViews:
    """Render virtual views, repair them, and weigh them by their distance to the photos (`gain=None`: all by 1).

    `mask_unreliable` drops pixels where the repair moved the low-pass image (sigma 4 pixels) by more than 0.15: it redrew them.
    """
    renders = torch.stack([rasterize(scene, camera, background).rgb.clamp(0, 1) for camera in cameras])
    repaired = prior.repair(renders, strength=strength, generator=generator).clamp(0, 1)
    check(
        repaired.shape == renders.shape,
        f"The repair prior returned {tuple(repaired.shape)} for {tuple(renders.shape)}.",
    )
    masks = torch.ones_like(repaired[..., 0])
    if mask_unreliable:
        masks = (_low_pass(repaired - renders).abs().amax(-1) <= 0.15).to(masks)
    centres = torch.stack([c.centre for c in train])
    weights = [1.0 if gain is None else distance_weight(camera.centre, centres, gain) for camera in cameras]
    return VirtualViews(cameras, repaired, masks, weights)


def _low_pass(images: Tensor, sigma: float = 4.0) -> Tensor:  # [V, H, W, 3]
    reach = 12
    line = torch.exp(-(torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device) ** 2) / (2 * sigma**2))
    line = (line / line.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    x = images.permute(0, 3, 1, 2)
    x = nn.functional.conv2d(nn.functional.pad(x, (reach, reach, 0, 0), mode="replicate"), line, groups=3)
    x = nn.functional.conv2d(nn.functional.pad(x, (0, 0, reach, reach), mode="replicate"), line.mT, groups=3)
    return x.permute(0, 2, 3, 1)


def refine(
    scene: GaussianScene,
    cameras: Sequence[Camera],
    images: Tensor,  # [V, H, W, 3], the photos
    repair_prior: ImageRepairPrior,
    virtual: Sequence[Camera],
    *,
    rounds: int = 3,
    steps: int = 150,
    strength: float = 0.2,
    gain: float | None = 16.0,
    rates: Rates | None = None,
    mask_unreliable: bool = False,
    background: Tensor | None = None,
    generator: torch.Generator,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[int, int, Record], None] | None = None,
) -> Course:
    """Stage 2 in place: `rounds` times repair all virtual views, then train on photos and on them; depth and normal priors stay off, as they are
    smoother than the repaired views. The means' rate starts anew in each round. `checkpoint` keeps the round, its repaired views and its training.

    `repair_prior` has been fitted (`collect_repair_pairs` gives the pairs), `virtual` are the cameras to repair (`virtual_cameras`), `gain` that of
    `distance_weight` (None: every view counts in full). Raises `InvalidInput` for fewer steps than rounds."""
    check_at_least("rounds", rounds, 1)
    check_at_least("steps", steps, rounds)
    whole, saved = Course(steps=steps), None if checkpoint is None else checkpoint.load(generator)
    if saved is not None:
        whole.history = json.loads(saved["history_before"])
    for r in range(0 if saved is None else saved["round"], rounds):
        if saved is not None:
            views = VirtualViews(virtual, saved["targets"], saved["masks"], saved["weights"])
        else:
            views = repaired_views(scene, virtual, cameras, repair_prior, strength=strength, generator=generator, background=background, gain=gain, mask_unreliable=mask_unreliable)  # fmt: skip
        share = steps // rounds + (r < steps % rounds)
        inner = None
        if checkpoint is not None:
            around = {"round": r, "targets": views.targets, "masks": views.masks, "weights": views.weight, "history_before": json.dumps(whole.history)}  # fmt: skip
            inner = checkpoint.within(around, None if saved is None else saved["inner"])
        saved = None
        course = train_splats(scene, cameras, images, steps=share, generator=generator, rates=rates, virtual=views, background=background, checkpoint=inner, on_step=on_step)  # fmt: skip
        whole.history += [{**record, "round": float(r)} for record in course.history]
    return whole
