"""The whole method: photos in, cameras, cloud, splats and a path out. Each contribution has its switch, because the ablation is the evidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from surefoot.errors import check_at_least, check_choice
from surefoot.geometry.lm_gaussian.enhance import enhance_video, render_path, smooth_path
from surefoot.geometry.lm_gaussian.losses import camera_tour, virtual_cameras
from surefoot.geometry.lm_gaussian.priors import (
    ImageRepairPrior,
    MonoDepthPrior,
    MonoNormalPrior,
    MultiViewPrior,
    StereoPrior,
    VideoEnhancePrior,
)
from surefoot.geometry.lm_gaussian.settings import Budget, Mode, Progress, Switches
from surefoot.geometry.lm_gaussian.stages import Checkpoint, StageStore, scene_from_dict, scene_to_dict
from surefoot.geometry.lm_gaussian.start import Start, check_images, start_from_dict, start_scene, start_to_dict
from surefoot.geometry.lm_gaussian.terms import views_of_cloud
from surefoot.geometry.lm_gaussian.train import (
    Course,
    MultiModalLoss,
    Record,
    collect_repair_pairs,
    refine,
    train_splats,
)
from surefoot.nn.geometry.cameras import Camera, opposite
from surefoot.nn.geometry.ply import PointCloud
from surefoot.nn.geometry.splats import GaussianScene


@dataclass(frozen=True)
class LMGaussianResult:
    """A reconstructed place. `frames` before and `enhanced` after stage 3 are kept apart."""

    scene: GaussianScene
    cameras: tuple[Camera, ...]
    registered: tuple[int, ...]
    cloud: PointCloud
    path: tuple[Camera, ...]
    frames: Tensor  # [F, H, W, 3]
    enhanced: Tensor | None
    history: list[Record]
    report: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {**self.report, "history": self.history}


def train_scene(
    start: Start,
    images: Tensor,  # [V, H, W, 3], the registered photos
    *,
    mono_depth: Tensor | None = None,
    mono_normal: Tensor | None = None,
    mode: Mode = "360",
    switches: Switches,
    budget: Budget,
    optimize_poses: bool = False,
    generator: torch.Generator,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[int, int, Record], None] | None = None,
) -> tuple[GaussianScene, Course]:
    """Stage 1. With `optimize_poses` the cameras move too, and `Course.cameras` holds where they end."""
    check_choice("mode", mode, ("360", "forward"))
    scene = GaussianScene.from_points(start.cloud.points, start.cloud.rgb, degree=budget.sh_degree)
    multi = MultiModalLoss(
        mono_depth=mono_depth if switches.depth_loss else None, mono_normal=mono_normal if switches.normal_loss else None,
        lam_dn=0.05 if mode == "forward" and budget.steps >= 6000 else 0.0,
    )  # fmt: skip
    virtual = None
    if switches.virtual_views and len(start.cameras) >= 2:
        virtual = views_of_cloud(start.cloud, between(start.cameras, budget.virtual_per_gap, mode), weight=0.6 if mode == "360" else 0.3, radius=budget.point_radius)  # fmt: skip
    course = train_splats(scene, start.cameras, images, steps=budget.steps, generator=generator, rates=budget.rates, multi=multi, virtual=virtual, sh_every=max(1, budget.steps // 12) if budget.sh_degree else None, filter_every=budget.filter_every, keep_early=budget.keep_early, optimize_poses=optimize_poses, checkpoint=checkpoint, on_step=on_step)  # fmt: skip
    return scene, course


def between(cameras: Sequence[Camera], n: int, mode: Mode) -> list[Camera]:
    """Virtual cameras along the shortest tour of the photos."""
    closed = mode == "360"
    order = camera_tour(cameras, closed=closed)
    return virtual_cameras([cameras[k] for k in order], n, closed=closed)


def _fit_repair(
    prior: ImageRepairPrior, course: Course, photos: Tensor, generator: torch.Generator, stages: StageStore | None
) -> None:
    """Fit the repair model, or take the fitted one from disk if it can be kept there."""
    keeps = stages is not None and hasattr(prior, "state_dict") and hasattr(prior, "load_state_dict")
    saved = stages.get("repair", generator) if keeps and stages is not None else None
    if saved is not None:
        prior.load_state_dict(saved)  # type: ignore[attr-defined]
        return
    prior.fit(*collect_repair_pairs(course, photos), generator=generator)
    if keeps and stages is not None:
        stages.put("repair", prior.state_dict(), generator)  # type: ignore[attr-defined]


def opposite_notes(walk: Sequence[Camera], *, closed: bool) -> list[str]:
    """Where the walk between photos is a guess, because two that follow each other face opposite ways."""
    steps = zip(walk, [*walk[1:], walk[0]] if closed and len(walk) > 2 else walk[1:], strict=False)
    return [f"Photos {a.name} and {b.name} face opposite ways, so the views between them are a guess." for a, b in steps if opposite(a, b)]  # fmt: skip


def reconstruct(
    images: Sequence[Tensor],  # each [H, W, 3], in [0, 1]
    *,
    stereo_prior: StereoPrior | MultiViewPrior,
    names: Sequence[str] | None = None,
    depth_prior: MonoDepthPrior | None = None,
    normal_prior: MonoNormalPrior | None = None,
    repair_prior: ImageRepairPrior | None = None,
    video_prior: VideoEnhancePrior | None = None,
    K: Tensor | None = None,  # [3, 3]: known intrinsics of the one camera
    mode: Mode = "360",
    switches: Switches | None = None,
    budget: Budget | None = None,
    optimize_poses: bool = False,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    stages: StageStore | None = None,
) -> LMGaussianResult:
    """A handful of photos to a scene of splats.

    With `stages` every finished stage is kept on disk, and training every minute; a run that asks the same goes on from there.

    `stereo_prior` finds the poses; the others are optional, and the report names those that were used. `mode` is "360" for a walk around, "forward"
    for views that look one way; `optimize_poses` moves the cameras together with the splats of stage 1. Raises `InvalidInput` where photos are unusable, do not hang together, or collapse into one place.
    """
    switches, budget = switches or Switches(), budget or Budget()
    check_choice("mode", mode, ("360", "forward"))
    check_at_least("rounds", switches.rounds, 1)
    names = [f"photo_{k:02d}" for k in range(len(images))] if names is None else list(names)
    check_images(images, names)
    generator = torch.Generator().manual_seed(0) if generator is None else generator

    def tell(stage: str) -> Callable[[int, int, Record], None]:
        return lambda step, steps, record: None if progress is None else progress(stage, step, steps)

    saved = None if stages is None else stages.get("start", generator)
    if saved is None:
        start = start_scene(images, stereo_prior, names=names, depth_prior=depth_prior, K=K, switches=switches, budget=budget, generator=generator, progress=progress)  # fmt: skip
        if stages is not None:
            stages.put("start", start_to_dict(start), generator)
    else:
        start = start_from_dict(saved)
    chosen = list(start.registered)
    photos = torch.stack([images[k] for k in chosen])
    mono = None if depth_prior is None else torch.stack([depth_prior.predict(k, images[k]) for k in chosen])
    normals = None if normal_prior is None else torch.stack([normal_prior.predict(k, images[k]) for k in chosen])
    saved = None if stages is None else stages.get("train", generator)
    if saved is None:
        scene, course = train_scene(start, photos, mono_depth=mono, mono_normal=normals, mode=mode, switches=switches, budget=budget, optimize_poses=optimize_poses, generator=generator, checkpoint=None if stages is None else stages.checkpoint("train"), on_step=tell("train"))  # fmt: skip
        if stages is not None:
            stages.put("train", scene_to_dict(scene, course), generator)
    else:
        scene, course = scene_from_dict(saved)
    if course.cameras:
        start = replace(start, cameras=course.cameras)
    history = list(course.history)
    if switches.repair and repair_prior is not None:
        saved = None if stages is None else stages.get("refine", generator)
        if saved is None:
            _fit_repair(repair_prior, course, photos, generator, stages)
            gain = 16.0 if switches.distance_weight and len(start.cameras) >= 3 else None
            again = refine(scene, start.cameras, photos, repair_prior, between(start.cameras, budget.virtual_per_gap, mode), rounds=switches.rounds, steps=budget.refine_steps, strength=budget.repair_strength, gain=gain, rates=replace(budget.rates, means=budget.rates.means / 4), generator=generator, checkpoint=None if stages is None else stages.checkpoint("refine"), on_step=tell("refine"))  # fmt: skip
            if stages is not None:
                stages.put("refine", scene_to_dict(scene, again), generator)
        else:
            scene, again = scene_from_dict(saved)
        history += again.history
    order = camera_tour(start.cameras, closed=mode == "360")
    path = smooth_path([start.cameras[k] for k in order], budget.path_frames, closed=mode == "360")
    enhanced = None
    if switches.enhancement and video_prior is not None:
        frames, enhanced = enhance_video(scene, path, video_prior, generator=generator)
    else:
        frames, _ = render_path(scene, path)
    used = {
        "normals": None if normal_prior is None or not switches.normal_loss else normal_prior.name,
        "repair": None if repair_prior is None or not switches.repair else repair_prior.name,
        "enhancement": None if enhanced is None or video_prior is None else video_prior.name,
    }
    notes = [*start.report.get("notes", []), *opposite_notes([start.cameras[k] for k in order], closed=mode == "360")]
    report = {
        **start.report,
        **used,
        "notes": notes,
        "mode": mode,
        "photos": names,
        "switches": asdict(switches),
        "splats": len(scene),
    }
    return LMGaussianResult(
        scene, start.cameras, start.registered, start.cloud, tuple(path), frames, enhanced, history, report
    )
