"""LM-Gaussian on trial: eight unposed views of an analytic courtyard, every contribution added one at a time, four rivals.

The seed turns the ring of cameras and draws all errors of the simulated stereo, depth and normal priors; 24 views between the photos are held out. 48
pixels, 4,000 splats, 300 steps for every arm (the pose-optimising rival gets 600), black background, no spherical harmonics.

    vanilla       3D Gaussian splatting: TRUE poses, random points in the scene's box, densification
    stereo        (B) splats from the aligned pointmaps, nothing cleaned, photometric loss
    cleaned       (C) + geometric, confidence and cross-view cleaning, background
    guided        (D) + monocular depth in the alignment
    regularised   (E) + depth, normal and virtual-view losses
    repaired      (F) the last 100 steps on photos and repaired virtual views, two rounds: the whole method
    even_weights  (G) F with every repaired view at weight 1;    one_round (H) F with one round
    no_normals    E without the normal loss;                     regularised_8k  E from 8,000 points
    fsgs_like     (S) B with 8,000 splats, from 8,000 points or by densification (searched), under a Pearson depth loss (weight searched)
    instantsplat_like   B with its camera poses optimised beside the splats, twice the steps (rate of the poses searched)
    oracle        (O) true depth and poses, photometric loss: what is left for the others to gain

Every arm searches the rate of the means on one more seed's own held-out views. Test views are mapped by the similarity between estimated and true
training cameras; `psnr` is as mapped, `psnr_refined` after fitting each pose to its photo (four of the views). Floaters twice: `floating_points` of the
exported cloud, `floating_mass` of the rendering over the foreground. `background_order` is Spearman's correlation of aligned with true depths beyond 5.
Stage 0 and stage 1 are shared between the arms of a seed that ask for the same; `whole_seconds` (CPU time) counts them for each that used them.

Left out: the run with 10 percent outliers, C from 8,000 points, larger pictures. Real photographs are the standard tier (`lm_photos.py`).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surefoot.core.task import Split, Task
from surefoot.core.trial import Arm, Claim, Metrics, Setup, Trial
from surefoot.datasets.embedded import seeded
from surefoot.datasets.scenes import View, courtyard360
from surefoot.geometry.lm_gaussian import (
    Budget,
    MultiModalLoss,
    OracleMonoPrior,
    OracleStereoPrior,
    PatchDenoiserRepair,
    Rates,
    Switches,
    TemporalFilterEnhance,
    collect_repair_pairs,
    refine,
    refine_pose,
    render_path,
    score_views,
    train_scene,
    train_splats,
    virtual_cameras,
)
from surefoot.geometry.lm_gaussian.evaluate import point_floaters, rendered_floaters
from surefoot.geometry.lm_gaussian.simulated import oracle_cloud
from surefoot.geometry.lm_gaussian.stages import Course
from surefoot.geometry.lm_gaussian.start import Start, start_scene
from surefoot.geometry.lm_gaussian.system import between
from surefoot.nn.geometry.alignment import pose_errors
from surefoot.nn.geometry.cameras import Camera
from surefoot.nn.geometry.densification import DensificationStrategy
from surefoot.nn.geometry.image_metrics import effnet_feature_distance
from surefoot.nn.geometry.ply import PointCloud
from surefoot.nn.geometry.splats import GaussianScene
from surefoot.trials.geometry.lm_photos import photo_arms, photo_claims, photo_task

SIZE, TRAIN, VALID, TEST = 48, 8, 10, 24
SPLATS, STEPS, REFINE_STEPS = 4000, 300, 100
FAR = 5.0  # where the background begins
MEANS = (1e-3, 4e-3, 1e-2)  # x extent
BOX = ((-7.0, -7.0, -0.6), (7.0, 7.0, 1.8))
REPAIR = PatchDenoiserRepair(fit_steps=600, batch=16, lr=2e-3, widths=(16, 32, 48))
WHOLE = Switches(rounds=2, repair=False)


# ------------------------------------------------------------------------------------------------------------------ data


@cache
def views(seed: int, count: int) -> tuple[View, ...]:
    """The photos of a seed (`count` = 0), or that many held-out views with all that is true of them."""
    turn = 2 * math.pi * float(torch.rand((), generator=seeded(seed, "turn")))
    scene = courtyard360(SIZE, train=TRAIN, test=count or TEST, turn=turn)
    return tuple(scene.view(camera) for camera in (scene.test if count else scene.train))


def pictures(of: tuple[View, ...]) -> Tensor:  # [V, H, W, 3]
    return torch.stack([view.rgb for view in of])


def courtyard_task(seed: int, data_dir: Path | None) -> Task:
    train, valid, test = (Split(pictures(views(seed, count)).permute(0, 3, 1, 2)) for count in (0, VALID, TEST))
    return Task("courtyard360", train, valid, test, num_classes=1, seed=seed)


# ---------------------------------------------------------------------------------------------------------- shared stages


@dataclass(frozen=True)
class Begun:
    """What arms share, with the CPU seconds it took."""

    start: Start
    seconds: float


@cache
def begun(seed: int, cleaning: bool, guided: bool, splats: int = SPLATS) -> Begun:
    """Stage 0."""
    photos, began = views(seed, 0), time.process_time()
    switches = replace(WHOLE, depth_guidance=guided, cleaning=cleaning, cross_view=cleaning, background=cleaning)
    names = [view.camera.name for view in photos]
    start = start_scene(
        list(pictures(photos)), OracleStereoPrior(photos, seed=seed), names=names, depth_prior=OracleMonoPrior(photos, seed=seed), switches=switches,
        budget=Budget(splats=splats), generator=seeded(seed, "align"),
    )  # fmt: skip
    return Begun(start, time.process_time() - began)


@cache
def mono(seed: int) -> tuple[Tensor, Tensor]:  # depths [V, H, W], normals [V, H, W, 3]
    photos = views(seed, 0)
    prior = OracleMonoPrior(photos, seed=seed)
    answers = [(prior.predict(k, v.rgb), prior.predict_normals(k, v.rgb)) for k, v in enumerate(photos)]
    return torch.stack([a for a, _ in answers]), torch.stack([b for _, b in answers])


@dataclass(frozen=True)
class Fitted:
    scene: GaussianScene
    course: Course
    repair: PatchDenoiserRepair
    seconds: float


@cache
def fitted(seed: int, means: float) -> Fitted:
    """Stage 1 cut short and the repair model fitted to it: where F, G and H part ways."""
    start, (depth, normal), began = begun(seed, True, True).start, mono(seed), time.process_time()
    budget = Budget(steps=STEPS - REFINE_STEPS, splats=SPLATS, rates=Rates(means=means))
    scene, course = train_scene(start, pictures(views(seed, 0)), mono_depth=depth, mono_normal=normal, switches=WHOLE, budget=budget, generator=seeded(seed, "stage 1"))  # fmt: skip
    repair = replace(REPAIR)
    repair.fit(*collect_repair_pairs(course, pictures(views(seed, 0))), generator=seeded(seed, "repair"))
    return Fitted(scene, course, repair, time.process_time() - began)


# ------------------------------------------------------------------------------------------------------------------- arms


def regularised(
    task: Task, generator: torch.Generator, *, means: float, switches: Switches, splats: int = SPLATS
) -> Metrics:
    """Stages 0 and 1 with what `switches` leaves on: arms B to E."""
    made = begun(task.seed, switches.cleaning, switches.depth_guidance, splats)
    (depth, normal), began = mono(task.seed), time.process_time()
    budget = Budget(steps=STEPS, splats=splats, rates=Rates(means=means))
    scene, _ = train_scene(made.start, photos_of(task), mono_depth=depth, mono_normal=normal, switches=switches, budget=budget, generator=generator)  # fmt: skip
    return measured(task, scene, made.start, made.seconds + time.process_time() - began)


def repaired(
    task: Task, generator: torch.Generator, *, means: float, rounds: int = 2, gain: float | None = 16.0
) -> Metrics:
    """The whole method, arms F to H."""
    start, made = begun(task.seed, True, True), fitted(task.seed, means)
    scene, began = copy.deepcopy(made.scene), time.process_time()
    virtual = between(start.start.cameras, 4, "360")
    refine(scene, start.start.cameras, photos_of(task), made.repair, virtual, rounds=rounds, steps=REFINE_STEPS, strength=Budget().repair_strength, gain=gain, rates=Rates(means=means / 4), generator=generator)  # fmt: skip
    seconds = start.seconds + made.seconds + time.process_time() - began
    return measured(task, scene, start.start, seconds, video=TemporalFilterEnhance(made.repair))


def vanilla(task: Task, generator: torch.Generator, *, means: float) -> Metrics:
    """3D Gaussian splatting from random points, with the true poses."""
    low, high = torch.tensor(BOX)
    draw = torch.rand(2, SPLATS, 3, generator=generator)
    cloud = PointCloud(low + (high - low) * draw[0], draw[1])
    start = Start(tuple(v.camera for v in views(task.seed, 0)), tuple(range(TRAIN)), cloud, None, None, {})
    return trained(task, start, generator, 0.0, rates=Rates(means=means), strategy=densification())


def oracle(task: Task, generator: torch.Generator, *, means: float) -> Metrics:
    photos = views(task.seed, 0)
    cloud = oracle_cloud(photos, at_most=SPLATS, generator=generator)
    start = Start(tuple(v.camera for v in photos), tuple(range(TRAIN)), cloud, None, None, {})
    return trained(task, start, generator, 0.0, rates=Rates(means=means))


def fsgs_like(task: Task, generator: torch.Generator, *, means: float, lam_depth: float, grow: bool) -> Metrics:
    """Pearson depth loss, 8,000 splats: given at the start, or grown."""
    made = begun(task.seed, False, False, SPLATS if grow else 2 * SPLATS)
    multi = MultiModalLoss(mono_depth=mono(task.seed)[0], lam_depth=lam_depth)
    return trained(task, made.start, generator, made.seconds, rates=Rates(means=means), multi=multi, strategy=densification() if grow else None)  # fmt: skip


def instantsplat_like(task: Task, generator: torch.Generator, *, means: float, pose_rate: float) -> Metrics:
    """Poses optimised beside the splats."""
    made = begun(task.seed, False, False)
    return trained(task, made.start, generator, made.seconds, rates=Rates(means=means), steps=2 * STEPS, optimize_poses=True, pose_rate=pose_rate)  # fmt: skip


def densification() -> DensificationStrategy:
    """From half to 70 percent of the run; no opacity reset, which a run this short does not outlive."""
    return DensificationStrategy(start=STEPS // 2, stop=round(0.7 * STEPS), every=STEPS // 10, reset_every=None, most_splats=2 * SPLATS)  # fmt: skip


def trained(task: Task, start: Start, generator: torch.Generator, seconds: float, *, rates: Rates, steps: int = STEPS, **options: Any) -> Metrics:  # fmt: skip
    """Splats from `start` under the photometric loss and what `options` of `train_splats` add."""
    began = time.process_time()
    scene = GaussianScene.from_points(start.cloud.points, start.cloud.rgb, degree=0)
    course = train_splats(
        scene, start.cameras, photos_of(task), steps=steps, generator=generator, rates=rates, **options
    )
    cameras = getattr(course, "cameras", None) or start.cameras
    return measured(task, scene, replace(start, cameras=tuple(cameras)), seconds + time.process_time() - began)


def photos_of(task: Task) -> Tensor:  # [V, H, W, 3]
    return task.train.x.permute(0, 2, 3, 1)


# -------------------------------------------------------------------------------------------------------------- measuring


def measured(
    task: Task, scene: GaussianScene, start: Start, seconds: float, video: TemporalFilterEnhance | None = None
) -> Metrics:
    """Everything that is true of a scene; on tuning seeds only what tuning reads."""
    photos, held_out = views(task.seed, 0), views(task.seed, len(task.test))
    errors = pose_errors(start.cameras, [v.camera for v in photos])
    back = errors.similarity.inverse()
    K = torch.stack([c.K for c in start.cameras]).mean(0)
    mapped = [Camera(K, back.camera(v.camera.to(torch.float64)).w2c.float(), SIZE, SIZE) for v in held_out]
    images = pictures(held_out)
    if len(held_out) == VALID:
        return {"psnr": score_views(scene, mapped, images).psnr}
    test = score_views(scene, mapped, images, distance=effnet_feature_distance)
    train = score_views(scene, start.cameras, pictures(photos))
    few, some = slice(0, None, 6), slice(0, None, 3)
    better = [refine_pose(scene, c, image, steps=25) for c, image in zip(mapped[few], images[few], strict=True)]
    true_cameras, true_depths = [v.camera for v in held_out], torch.stack([v.depth for v in held_out])
    near, far = rendered_floaters(
        scene, mapped[some], true_depths[some] * float(back.scale), foreground=FAR * float(back.scale)
    )
    points = errors.similarity.apply(start.cloud.points.double()).float()
    metrics = {
        "psnr": test.psnr, "ssim": test.ssim, "feature_distance": test.feature_distance, "psnr_refined": score_views(scene, better, images[few]).psnr,
        "gap": train.psnr - test.psnr, "floating_points": point_floaters(points, true_cameras, true_depths),
        "floating_mass": near, "floating_mass_far": far, "rotation_error": float(errors.rotation_degrees.max()), "ate": errors.ate,
        "splats": float(len(scene)), "whole_seconds": seconds,
    }  # fmt: skip
    if start.aligned is not None:
        metrics["background_order"] = background_order(start.aligned, torch.stack([v.depth for v in photos]))
    if video is not None:
        metrics |= enhanced(scene, mapped, images, video)
    return metrics


def background_order(depths: Tensor, true: Tensor) -> float:
    """Mean over photos of Spearman's correlation beyond `FAR`, where the sky (no depth of its own) is left out."""
    values = []
    for found, depth in zip(depths, true, strict=True):
        where = (depth > FAR) & (depth < 20)
        a, b = (t[where].argsort().argsort().double() for t in (found, depth))
        values.append(float(torch.corrcoef(torch.stack([a, b]))[0, 1]))
    return sum(values) / len(values)


@torch.no_grad()
def enhanced(scene: GaussianScene, cameras: list[Camera], images: Tensor, video: TemporalFilterEnhance) -> Metrics:
    """Feature distance of every third held-out view before and after stage 3, as the middle of a clip whose frames stand five degrees apart."""
    path, before, after = virtual_cameras(cameras, 3, closed=True), [], []
    for k in range(1, len(cameras), 3):
        clip = path[3 * k - 1 : 3 * k + 2]
        frames, depths = render_path(scene, clip)
        better = video.enhance(frames, depths, clip, strength=0.1, generator=torch.Generator().manual_seed(k))
        before.append(effnet_feature_distance(frames[1], images[k]))
        after.append(effnet_feature_distance(better[1].clamp(0, 1), images[k]))
    return {"clip_distance": sum(before) / len(before), "clip_distance_enhanced": sum(after) / len(after)}


def enhancement(arms: Mapping[str, Metrics]) -> float:
    return arms["repaired"]["clip_distance"] - arms["repaired"]["clip_distance_enhanced"]


# -------------------------------------------------------------------------------------------------------------- the trial

PHOTOMETRIC = replace(WHOLE, depth_loss=False, normal_loss=False, virtual_views=False)
SEARCH = {"means": MEANS}


def stage1(switches: Switches, splats: int = SPLATS) -> Arm:
    return Arm(partial(regularised, switches=switches, splats=splats), SEARCH, system=True)


ARMS = {
    "vanilla": Arm(vanilla, SEARCH, system=True),
    "stereo": stage1(replace(PHOTOMETRIC, depth_guidance=False, cleaning=False)),
    "cleaned": stage1(replace(PHOTOMETRIC, depth_guidance=False)),
    "guided": stage1(PHOTOMETRIC),
    "no_normals": stage1(replace(WHOLE, normal_loss=False)),
    "regularised": stage1(WHOLE),
    "regularised_8k": stage1(WHOLE, 2 * SPLATS),
    "repaired": Arm(repaired, SEARCH, system=True),
    "even_weights": Arm(partial(repaired, gain=None), SEARCH, system=True),
    "one_round": Arm(partial(repaired, rounds=1), SEARCH, system=True),
    "fsgs_like": Arm(fsgs_like, {**SEARCH, "lam_depth": (0.1, 0.3), "grow": (False, True)}, system=True),
    "instantsplat_like": Arm(instantsplat_like, {**SEARCH, "pose_rate": (1e-4, 1e-3)}, system=True),
    "oracle": Arm(oracle, SEARCH, system=True),
}

CLAIMS = (
    Claim("Cleaning takes floating points out of the cloud.", "floating_points", "cleaned", "stereo", better="lower"),
    Claim("Depth guidance puts the background in order.", "background_order", "guided", "cleaned"),
    Claim("Depth, normal and virtual-view losses raise the PSNR of held-out views.", "psnr", "regularised", "guided"),
    Claim("They lower the mass that floats before the foreground.", "floating_mass", "regularised", "guided", better="lower"),
    Claim("The train-test gap is smaller than plain splatting's with true poses.", "gap", "regularised", "vanilla", better="lower"),
    Claim("Repaired views lower the feature distance.", "feature_distance", "repaired", "regularised", better="lower"),
    Claim("Two rounds of repair beat one in feature distance.", "feature_distance", "repaired", "one_round", better="lower"),
    Claim("Enhancement lowers the feature distance of the frames.", effect=enhancement),
    Claim("At equal splats the regularised scene has a higher SSIM than the FSGS-like one.", "ssim", "regularised_8k", "fsgs_like"),
    Claim("The whole method has a higher PSNR than the InstantSplat-like rival.", "psnr", "repaired", "instantsplat_like"),
)  # fmt: skip

TRIAL = Trial(
    "geometry/lm_gaussian",
    {
        "embedded": Setup(courtyard_task, ARMS, CLAIMS, tune_on="psnr"),
        "standard": Setup(photo_task, photo_arms(), photo_claims(), tune_on="psnr"),
    },
    notes="The priors are simulators with a network's failure modes, planted on an analytic scene; the repair and video models are the embedded ones.",
)
