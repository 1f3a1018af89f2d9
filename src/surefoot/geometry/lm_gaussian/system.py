"""The whole method: photos in, cameras, cloud, splats and a path out. Each contribution has its switch, because the ablation is the evidence."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from surefoot.errors import InvalidInput, check_choice
from surefoot.geometry.lm_gaussian.enhance import distill, enhance_video, render_path, smooth_path
from surefoot.geometry.lm_gaussian.evaluate import score_views
from surefoot.geometry.lm_gaussian.losses import camera_tour, virtual_cameras
from surefoot.geometry.lm_gaussian.pairs import PairStore
from surefoot.geometry.lm_gaussian.priors import (
    ImageRepairPrior,
    MonoDepthPrior,
    MonoNormalPrior,
    MultiViewPrior,
    StereoPrior,
    VideoEnhancePrior,
)
from surefoot.geometry.lm_gaussian.settings import Budget, Mode, Progress, Switches
from surefoot.geometry.lm_gaussian.stages import Checkpoint, StageStore, once, scene_from_dict, scene_to_dict
from surefoot.geometry.lm_gaussian.start import Start, check_images, start_from_dict, start_scene, start_to_dict
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
from surefoot.nn.geometry.camera_files import save_colmap
from surefoot.nn.geometry.cameras import Camera, opposite
from surefoot.nn.geometry.ply import PointCloud, save_splats
from surefoot.nn.geometry.rasterizer import rasterizer_name
from surefoot.nn.geometry.splats import GaussianScene

T = TypeVar("T")


@dataclass(frozen=True)
class LMGaussianResult:
    """A reconstructed place. `frames` before and `enhanced` after stage 3 are kept apart, and so are the scene as stages 1 and 2 left it
    (`undistilled`) and the `scene` that learned from the enhanced frames, with its `distilled` frames, where that was asked for."""

    scene: GaussianScene
    cameras: tuple[Camera, ...]
    registered: tuple[int, ...]
    cloud: PointCloud
    path: tuple[Camera, ...]
    frames: Tensor  # [F, H, W, 3]
    enhanced: Tensor | None
    history: list[Record]
    report: dict[str, Any]
    undistilled: GaussianScene | None = None
    distilled: Tensor | None = None  # [F, H, W, 3]

    @property
    def points(self) -> Tensor:  # [N, 3]
        """The cleaned cloud, in the world's units."""
        return self.cloud.points

    def to_dict(self) -> dict[str, Any]:
        """The report with the training curve, for JSON."""
        return {**self.report, "history": self.history}

    def save_ply(self, path: Path | str) -> None:
        """The splats, for any viewer."""
        save_splats(self.scene, Path(path))

    def save_colmap(self, folder: Path | str) -> None:
        """Cameras and points as a COLMAP model."""
        save_colmap(Path(folder), self.cameras, self.cloud)

    def render_path(self, frames: int = 60) -> Tensor:  # [F, H, W, 3]
        """The walk anew, in so many frames."""
        return render_path(self.scene, walk(self.cameras, frames, self.report["mode"]))[0]


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
    """Stage 1: splats from what `start_scene` left, under photos, depth, normals and virtual views as the switches say. With `optimize_poses` the
    cameras move too, and `Course.cameras` holds where they end. `mono_depth` is [V, H, W], `mono_normal` [V, H, W, 3], of the registered photos."""
    check_choice("mode", mode, ("360", "forward"))
    scene = GaussianScene.from_points(start.cloud.points, start.cloud.rgb, degree=budget.sh_degree)
    multi = MultiModalLoss(
        mono_depth=mono_depth if switches.depth_loss else None, mono_normal=mono_normal if switches.normal_loss else None,
        lam_dn=0.05 if mode == "forward" else 0.0, dn_from=budget.depth_normal_from,
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


def walk(cameras: Sequence[Camera], frames: int, mode: Mode) -> list[Camera]:
    """The path of stage 3: past the photos on the shortest tour, smoothly."""
    closed = mode == "360"
    return smooth_path([cameras[k] for k in camera_tour(cameras, closed=closed)], frames, closed=closed)


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
    steps: int | None = None,
    optimize_poses: bool = False,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    stages: StageStore | None = None,
) -> LMGaussianResult:
    """A handful of photos to a scene of splats.

    `stereo_prior` finds the poses; the others are optional, and the report names those that were used. `mode` is "360" for a walk around, "forward"
    for views that look one way; `optimize_poses` moves the cameras together with the splats of stage 1. `steps` scales every schedule of the budget
    to so many training steps in all (`Budget.of`, or `budget.scaled` of the one given). Splats are trained where the photos are.

    With `stages` every finished stage is kept on disk, alignment and training every minute; a run that asks the same goes on from there. Raises
    `InvalidInput` where photos are unusable, do not hang together, or collapse into one place.
    """
    check_choice("mode", mode, ("360", "forward"))
    names = [f"photo_{k:02d}" for k in range(len(images))] if names is None else list(names)
    check_images(images, names)
    switches = switches or Switches()
    repair_prior, video_prior = repair_prior if switches.repair else None, video_prior if switches.enhancement else None
    if budget is None:
        budget = Budget.of(mode, steps=steps, device=images[0].device, refined=repair_prior is not None)
    elif steps is not None:
        budget = budget.scaled(steps, refined=repair_prior is not None)
    if budget.distill_steps and video_prior is None:
        raise InvalidInput("distill_steps feeds enhanced frames back, and nobody enhances them; give a video_prior, or set distill_steps to 0.")  # fmt: skip
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    run = _Run(mode, switches, budget, generator, progress, stages)
    pairs = None if stages is None or not isinstance(stereo_prior, StereoPrior) else PairStore.of(stages.folder, stereo_prior, images)  # fmt: skip
    start = run.once("start", lambda: start_scene(images, stereo_prior, names=names, depth_prior=depth_prior, K=K, switches=switches, budget=budget, generator=generator, progress=progress, checkpoint=run.kept("start"), kept=pairs), start_to_dict, start_from_dict)  # fmt: skip
    if pairs is not None:
        pairs.clear()
    photos = torch.stack([images[k] for k in start.registered])
    mono, normals = (None if p is None else torch.stack([p.predict(k, images[k]).to(photos) for k in start.registered]) for p in (depth_prior, normal_prior))  # fmt: skip
    scene, course = run.train(start, photos, mono, normals, optimize_poses)
    start, history = replace(start, cameras=course.cameras or start.cameras), list(course.history)
    if repair_prior is not None:
        scene, again = run.refine(scene, course, start, photos, repair_prior)
        history += again.history
    path = walk(start.cameras, budget.path_frames, mode)
    film = run.film(scene, start, photos, path, video_prior)
    used = {
        "rasteriser": rasterizer_name(scene, start.cameras[0]),
        "normals": None if normal_prior is None or not switches.normal_loss else normal_prior.name,
        "repair": None if repair_prior is None else repair_prior.name,
        "enhancement": None if video_prior is None else video_prior.name,
    }
    tour = [start.cameras[k] for k in camera_tour(start.cameras, closed=mode == "360")]
    notes = [*start.report.get("notes", []), *opposite_notes(tour, closed=mode == "360")]
    report = {**start.report, **used, "notes": notes, "mode": mode, "photos": names, "switches": asdict(switches), "budget": asdict(budget), "splats": len(scene)}  # fmt: skip
    if film.scores is not None:
        report["distillation"] = film.scores
    return LMGaussianResult(
        film.scene, start.cameras, start.registered, start.cloud, tuple(path), film.frames, film.enhanced, [*history, *film.history], report,
        undistilled=None if film.scores is None else scene, distilled=film.distilled,
    )  # fmt: skip


@dataclass(frozen=True)
class _Film:
    """What stage 3 leaves."""

    scene: GaussianScene
    frames: Tensor  # [F, H, W, 3]
    enhanced: Tensor | None = None
    distilled: Tensor | None = None
    scores: dict[str, Any] | None = None
    history: tuple[Record, ...] = ()


@dataclass(frozen=True)
class _Run:
    """What was asked, and each stage either done or taken from disk."""

    mode: Mode
    switches: Switches
    budget: Budget
    generator: torch.Generator
    progress: Progress | None
    stages: StageStore | None

    def tell(self, stage: str) -> Callable[[int, int, Record], None]:
        return lambda step, steps, record: None if self.progress is None else self.progress(stage, step, steps)

    def kept(self, stage: str) -> Checkpoint | None:
        return None if self.stages is None else self.stages.checkpoint(stage)

    def once(self, stage: str, make: Callable[[], T], pack: Callable[[T], dict[str, Any]], unpack: Callable[[dict[str, Any]], T]) -> T:  # fmt: skip
        return once(self.stages, stage, self.generator, make, pack, unpack)

    def trained(self, stage: str, make: Callable[[], tuple[GaussianScene, Course]]) -> tuple[GaussianScene, Course]:
        return self.once(stage, make, lambda pair: scene_to_dict(*pair), scene_from_dict)

    def train(
        self, start: Start, photos: Tensor, mono: Tensor | None, normals: Tensor | None, optimize_poses: bool
    ) -> tuple[GaussianScene, Course]:
        return self.trained("train", lambda: train_scene(start, photos, mono_depth=mono, mono_normal=normals, mode=self.mode, switches=self.switches, budget=self.budget, optimize_poses=optimize_poses, generator=self.generator, checkpoint=self.kept("train"), on_step=self.tell("train")))  # fmt: skip

    def refine(
        self, scene: GaussianScene, course: Course, start: Start, photos: Tensor, prior: ImageRepairPrior
    ) -> tuple[GaussianScene, Course]:
        self._fit(prior, course, photos)
        budget, switches = self.budget, self.switches

        def make() -> tuple[GaussianScene, Course]:
            gain = 16.0 if switches.distance_weight and len(start.cameras) >= 3 else None
            return scene, refine(
                scene, start.cameras, photos, prior, between(start.cameras, budget.virtual_per_gap, self.mode),
                rounds=min(switches.rounds, budget.refine_steps), steps=budget.refine_steps, strength=budget.repair_strength, gain=gain,
                rates=self._late_rates(), mask_unreliable=switches.mask_unreliable, generator=self.generator, checkpoint=self.kept("refine"),
                on_step=self.tell("refine"),
            )  # fmt: skip

        return self.trained("refine", make)

    def _late_rates(self) -> Rates:
        return replace(self.budget.rates, means=self.budget.rates.means / 4)

    def _fit(self, prior: ImageRepairPrior, course: Course, photos: Tensor) -> None:
        """Fit the repair model, or take the fitted or half fitted one from disk if it can be kept there. Stage 3 may ask it even where stage 2 is
        finished."""
        stages = self.stages
        keeps = stages is not None and hasattr(prior, "state_dict") and hasattr(prior, "load_state_dict")
        saved = stages.get("repair", self.generator) if keeps and stages is not None else None
        if saved is not None:
            prior.load_state_dict(saved)  # type: ignore[attr-defined]
        elif keeps or stages is None or not stages.finished("refine"):
            inside = {"checkpoint": self.kept("repair")} if keeps and "checkpoint" in inspect.signature(prior.fit).parameters else {}  # fmt: skip
            prior.fit(*collect_repair_pairs(course, photos), generator=self.generator, **inside)
            if keeps and stages is not None:
                stages.put("repair", prior.state_dict(), self.generator)  # type: ignore[attr-defined]

    def film(
        self, scene: GaussianScene, start: Start, photos: Tensor, path: Sequence[Camera], prior: VideoEnhancePrior | None
    ) -> _Film:  # fmt: skip
        if prior is None:
            return _Film(scene, render_path(scene, path)[0])
        frames, enhanced = self.once(
            "enhance", lambda: enhance_video(scene, path, prior, generator=self.generator),
            lambda pair: {"frames": pair[0], "enhanced": pair[1]}, lambda saved: (saved["frames"], saved["enhanced"]),
        )  # fmt: skip
        steps, weight = self.budget.distill_steps, self.budget.distill_weight
        if steps == 0:
            return _Film(scene, frames, enhanced)

        def make() -> tuple[GaussianScene, Course]:
            other = copy.deepcopy(scene)
            return other, distill(other, start.cameras, photos, path, enhanced, steps=steps, weight=weight, rates=self._late_rates(), generator=self.generator, checkpoint=self.kept("distill"), on_step=self.tell("distill"))  # fmt: skip

        after, course = self.trained("distill", make)
        scores: dict[str, Any] = {"steps": steps, "weight": weight}
        for when, one in (("before", scene), ("after", after)):
            found = score_views(one, start.cameras, photos)
            scores[when] = {"train_psnr": found.psnr, "train_ssim": found.ssim}
        history = tuple({**record, "distilling": 1.0} for record in course.history)
        return _Film(after, frames, enhanced, render_path(after, path)[0], scores, history)
