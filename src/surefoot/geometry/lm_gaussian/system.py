"""The whole method: photos in, cameras, cloud, splats and a path out. Each contribution has its switch, because the ablation is the evidence."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from surefoot.errors import InvalidInput, check, check_at_least, check_choice
from surefoot.geometry.lm_gaussian.align import GlobalAlignment, align_pointmaps
from surefoot.geometry.lm_gaussian.clean import Cleaned, clean_cloud, cloud_of
from surefoot.geometry.lm_gaussian.enhance import enhance_video, render_path, smooth_path
from surefoot.geometry.lm_gaussian.losses import camera_tour, virtual_cameras
from surefoot.geometry.lm_gaussian.priors import (
    ImageRepairPrior,
    MonoDepthPrior,
    MonoNormalPrior,
    MultiView,
    MultiViewPrior,
    StereoPrior,
    VideoEnhancePrior,
    all_pairs,
)
from surefoot.geometry.lm_gaussian.stages import (
    Checkpoint,
    StageStore,
    cameras_from_dict,
    cameras_to_dict,
    cloud_to_dict,
    scene_from_dict,
    scene_to_dict,
)
from surefoot.geometry.lm_gaussian.terms import views_of_cloud
from surefoot.geometry.lm_gaussian.train import (
    Course,
    MultiModalLoss,
    Rates,
    Record,
    collect_repair_pairs,
    refine,
    train_splats,
)
from surefoot.nn.geometry.cameras import Camera, opposite
from surefoot.nn.geometry.ply import PointCloud
from surefoot.nn.geometry.splats import GaussianScene

Mode = Literal["360", "forward"]
Progress = Callable[[str, int, int], None]  # stage, step, steps


@dataclass(frozen=True)
class Switches:
    """Every contribution of the paper, on by default."""

    depth_guidance: bool = True  # C1b, in the alignment
    cleaning: bool = True  # C1c, geometric and by confidence
    cross_view: bool = True  # C1c', support and flying pixels
    background: bool = True  # C1d
    depth_loss: bool = True  # C2b
    normal_loss: bool = True  # C2c
    virtual_views: bool = True  # C2d
    repair: bool = True  # C3a, C3b
    distance_weight: bool = True  # C3c
    rounds: int = 3  # C3d
    enhancement: bool = True  # C4


@dataclass(frozen=True)
class Budget:
    """How long and how large. The defaults are for two CPU cores and pictures of up to 64 pixels; `full` is the paper's."""

    align_steps: int = 500
    steps: int = 350
    refine_steps: int = 150
    splats: int = 4000
    sh_degree: int = 0
    virtual_per_gap: int = 10
    point_radius: float = 1.0
    confidence: float = 3.0
    background_confidence: float = 1.5
    background_quantile: float = 0.6
    jump: float = 0.08
    tol: float = 0.03
    keep_early: int = 6
    repair_strength: float = 0.3
    path_frames: int = 60
    filter_every: int | None = None
    rates: Rates = field(default_factory=Rates)

    @classmethod
    def full(cls, mode: Mode) -> Budget:
        """12,000 + 18,000 steps in 360 mode, 3,000 + 9,000 in forward mode; for a GPU."""
        steps, more = (12_000, 18_000) if mode == "360" else (3_000, 9_000)
        return cls(steps=steps, refine_steps=more, splats=200_000, sh_degree=3, confidence=5.0, background_quantile=0.8, jump=0.05, keep_early=50, repair_strength=0.2, path_frames=300, filter_every=100, rates=Rates.full(mode))  # fmt: skip


@dataclass(frozen=True)
class Start:
    """What stage 0 leaves: the photos that found their place, and the cleaned cloud."""

    cameras: tuple[Camera, ...]
    registered: tuple[int, ...]
    cloud: PointCloud
    depths: Tensor | None
    cleaned: Cleaned | None
    report: dict[str, Any]
    aligned: Tensor | None = None  # [V, H, W], the depths before the cleaning put the background in its place


def start_to_dict(start: Start) -> dict[str, Any]:
    """The part of stage 0 that later stages need, as tensors and plain values."""
    report = json.dumps(start.report)
    return {
        **cameras_to_dict(start.cameras),
        **cloud_to_dict(start.cloud),
        "registered": list(start.registered),
        "report": report,
    }


def start_from_dict(saved: dict[str, Any]) -> Start:
    cloud = PointCloud(saved["points"], saved["rgb"])
    return Start(cameras_from_dict(saved), tuple(saved["registered"]), cloud, None, None, json.loads(saved["report"]))


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


def check_images(images: Sequence[Tensor], names: Sequence[str]) -> None:
    """Two or more photos [H, W, 3] in [0, 1], of one size."""
    check(len(images) == len(names), f"There are {len(names)} names for {len(images)} images.")
    if len(images) < 2:
        raise InvalidInput(f"A reconstruction needs at least two photos, and there is {len(images)}.")
    for image, name in zip(images, names, strict=True):
        check(image.dim() == 3 and image.shape[2] == 3, f"Photo {name} must be [H, W, 3], got {list(image.shape)}.")
        check(
            bool(torch.isfinite(image).all()) and float(image.min()) >= 0 and float(image.max()) <= 1,
            f"Photo {name} must lie in [0, 1].",
        )
    sizes = {tuple(image.shape[:2]) for image in images}
    if len(sizes) > 1:
        odd = [f"{name} ({image.shape[1]} x {image.shape[0]})" for image, name in zip(images, names, strict=True)]
        raise InvalidInput(f"The photos must have one size; crop or resize these: {', '.join(odd[:6])}.")


def start_scene(
    images: Sequence[Tensor],
    stereo_prior: StereoPrior | MultiViewPrior,
    *,
    names: Sequence[str],
    depth_prior: MonoDepthPrior | None = None,
    K: Tensor | None = None,  # [3, 3], shared
    switches: Switches,
    budget: Budget,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Start:
    """Stage 0: poses, depths and the cleaned cloud."""
    stack = torch.stack(list(images))
    mono = None if depth_prior is None else torch.stack([depth_prior.predict(k, im) for k, im in enumerate(images)])
    report: dict[str, Any] = {"stereo": stereo_prior.name, "depth": None if depth_prior is None else depth_prior.name}
    if hasattr(stereo_prior, "predict"):
        n = len(images)
        pairs = [stereo_prior.predict(i, j, images[i], images[j]) for i, j in all_pairs(n)]  # type: ignore[union-attr]
        known = None if K is None else K.expand(n, 3, 3)

        def tell(step: int, steps: int, loss: float) -> None:
            if progress is not None:
                progress("align", step, steps)

        fit = align_pointmaps(pairs, mono_depth=mono if switches.depth_guidance else None, K=known, clean_every=50 if switches.cleaning else None, tol=budget.tol, steps=budget.align_steps, generator=generator, progress=tell)  # fmt: skip
        return _cleaned(fit, tuple(range(n)), stack, mono, names, switches, budget, generator, report)
    found: MultiView = stereo_prior.reconstruct(images, names, K)  # type: ignore[union-attr]
    report["notes"] = list(found.notes)
    missing = [names[k] for k in range(len(images)) if k not in found.registered]
    report["unregistered"] = missing
    if found.depths is None or found.conf is None:
        return Start(found.cameras, found.registered, _thin(found.cloud, budget.splats, generator), None, None, report)
    chosen = list(found.registered)
    w2c, Ks = torch.stack([c.w2c for c in found.cameras]), torch.stack([c.K for c in found.cameras])
    fit = GlobalAlignment(w2c, Ks, found.depths, found.conf, {}, {})
    return _cleaned(fit, found.registered, stack[chosen], None if mono is None else mono[chosen], [names[k] for k in chosen], switches, budget, generator, report)  # fmt: skip


def _cleaned(
    fit: GlobalAlignment, registered: tuple[int, ...], images: Tensor, mono: Tensor | None, names: Sequence[str], switches: Switches, budget: Budget,
    generator: torch.Generator, report: dict[str, Any],
) -> Start:  # fmt: skip
    height, width = images.shape[1:3]
    cameras = tuple(Camera(k, w, width, height, name) for k, w, name in zip(fit.K, fit.w2c, names, strict=True))
    known = fit.depths > 0
    report |= {"dropped_pairs": [list(e) for e in fit.dropped], "focal": float(fit.K[:, 0, 0].mean())}
    if switches.cleaning:
        cleaned = clean_cloud(
            fit.depths.clamp_min(1e-6), torch.where(known, fit.conf, torch.zeros_like(fit.conf)), images, fit.w2c, fit.K, mono_depth=mono, tol=budget.tol,
            threshold=budget.confidence, background_threshold=budget.background_confidence, background_quantile=budget.background_quantile,
            cross_view=switches.cross_view, background=switches.background, jump=budget.jump,
        )  # fmt: skip
        keep, depths = cleaned.keep, cleaned.depths
        report["removed"] = cleaned.removed
    else:
        cleaned, keep, depths = None, known, fit.depths
    cloud = cloud_of(depths, keep, images, fit.w2c, fit.K, at_most=budget.splats, generator=generator)
    report["points"] = len(cloud.points)
    return Start(cameras, registered, cloud, depths, cleaned, report, fit.depths)


def _thin(cloud: PointCloud, at_most: int, generator: torch.Generator) -> PointCloud:
    if len(cloud.points) <= at_most:
        return cloud
    chosen = torch.randperm(len(cloud.points), generator=generator)[:at_most].sort().values
    return PointCloud(cloud.points[chosen], cloud.rgb[chosen])


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
