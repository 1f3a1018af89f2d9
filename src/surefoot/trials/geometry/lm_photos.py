"""LM-Gaussian on real photographs, without poses or intrinsics: how many photos it takes, and what the method adds to plain splatting.

Two scenes, both from the folder of standard data (`multiview/`): the fox of instant-ngp (50 phone photos along an arc, undistorted first; n = 3, 6, 9, 16 of
them spread evenly, every eighth of the rest held out) and the Middlebury dino ring (8 of 16 views of an object without texture on black, the other 8 held
out). The ring is the failure case: its views stand too far apart for SIFT, and the question is whether the run says so.

    full     the whole pipeline: `ColmapPrior` on the full-size photos, plane sweep, cleaning, virtual views, two rounds of patch repair
    plain    3D Gaussian splatting with the same poses and the same processor time: the sparse cloud, densification, photometric loss

Both see 72 x 128 (dino: 128 x 96) pixels and hold at most 5,000 splats. The whole method trains 280 steps and fits its repair model; plain splatting trains
850 steps, which costs as much. The rate of the means is one of two for both, chosen on photos that are neither
trained nor tested; with two, the better is always at an end, and on those photos the other was within 1.2 dB in every arm. The ring has no photos to spare
and takes the higher rate. Pose-free scores: held-out cameras mapped by the similarity between estimated and published training cameras (`psnr`, `ssim`,
`feature_distance`), then fitted to their photos (`psnr_refined`). A refusal is a result: `registered`, `rung` and `warned` are always there, the rest
only where three or more photos found their place. `whole_seconds` (CPU time) counts the poses for both arms.

There is no monocular network among the embedded backends, so the depth and normal losses are off. The photos are not the seed's: seeds differ by RANSAC,
the order of the photos, the repair model and its noise.
"""

from __future__ import annotations

import io
import math
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from surefoot.core.task import Split, Task
from surefoot.core.trial import Arm, Claim, Metrics
from surefoot.datasets.standard import data_folder
from surefoot.errors import InvalidInput, MissingExtra, check
from surefoot.geometry.lm_gaussian import (
    Budget,
    PatchDenoiserRepair,
    Rates,
    Switches,
    reconstruct,
    score_pose_free,
    train_splats,
)
from surefoot.geometry.lm_gaussian.colmap import ColmapPrior, ColmapViews
from surefoot.geometry.lm_gaussian.evaluate import perceptual_distance
from surefoot.geometry.lm_gaussian.run import KnownViews, views_of
from surefoot.nn.geometry.cameras import Camera
from surefoot.nn.geometry.densification import DensificationStrategy
from surefoot.nn.geometry.rotations import invert_rigid
from surefoot.nn.geometry.splats import GaussianScene

COUNTS = (3, 6, 9, 16)
STEPS, REFINE_STEPS, PLAIN_STEPS, SPLATS, FIT_STEPS, VIRTUAL = 200, 80, 850, 5000, 25, 12
MEANS = (2e-3, 6e-3)  # x extent
REPAIR = PatchDenoiserRepair(fit_steps=200, batch=16, lr=2e-3, widths=(16, 32, 48))
SWITCHES = Switches(rounds=2, enhancement=False)


# ------------------------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True)
class PhotoScene:
    """Real photos with published cameras."""

    name: str
    images: tuple[Tensor, ...]  # full size, [H, W, 3]
    cameras: tuple[Camera, ...]  # of the full-size photos
    names: tuple[str, ...]
    work_size: tuple[int, int]  # width, height of what is splatted

    def split(self, n: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Indices of the photos to train on, spread evenly, to choose settings on, and to test on."""
        total = len(self.images)
        check(2 <= n < total, f"n must be from 2 to {total - 1}, got {n}.")
        if 2 * n >= total:  # a ring of few: every second
            return tuple(range(0, total, 2)), (), tuple(range(1, total, 2))
        train = tuple(int(k) for k in np.round(np.linspace(0, total - 1, n)))
        rest = [k for k in range(total) if k not in train]
        return train, tuple(rest[4::16]), tuple(rest[::8])

    def small(self, chosen: tuple[int, ...]) -> Tensor:  # [V, h, w, 3]
        width, height = self.work_size
        full = torch.stack([self.images[k] for k in chosen]).permute(0, 3, 1, 2)
        x = F.interpolate(full, size=(height, width), mode="bilinear", antialias=True)
        return x.permute(0, 2, 3, 1).clamp(0, 1).contiguous()

    def true(self, chosen: tuple[int, ...]) -> list[Camera]:
        return [self.cameras[k].resized(*self.work_size) for k in chosen]


def from_opengl(c2w: Tensor) -> Tensor:  # [4, 4] -> w2c [4, 4]
    """World-to-camera of a camera-to-world pose whose camera looks along -z with y up."""
    return invert_rigid(c2w @ torch.diag(c2w.new_tensor([1.0, -1.0, -1.0, 1.0])))


@cache
def fox(data_dir: Path) -> PhotoScene:
    """`multiview/fox_270x480.npz`, undistorted."""
    try:
        import cv2
    except ImportError as error:
        raise MissingExtra("opencv-python-headless", "geometry") from error
    file = np.load(_file(data_dir, "fox_270x480.npz"))
    K = np.array([[file["fx"], 0, file["cx"]], [0, file["fy"], file["cy"]], [0, 0, 1]], np.float64)
    straight = [cv2.undistort(image, K, file["distortion_k1k2p1p2"]) for image in file["images"]]
    names = tuple(Path(str(name)).name for name in file["names"])
    poses = [from_opengl(torch.from_numpy(p).double()).float() for p in file["cam_to_world"]]
    height, width = straight[0].shape[:2]
    cameras = [Camera(torch.from_numpy(K).float(), w, width, height, n) for w, n in zip(poses, names, strict=True)]
    images = tuple(torch.from_numpy(image).float() / 255 for image in straight)
    return PhotoScene("fox", images, tuple(cameras), names, (72, 128))


@cache
def dino_ring(data_dir: Path) -> PhotoScene:
    """`multiview/dinoSparseRing.zip`: P = K [R t], y down, z forward."""
    from PIL import Image

    archive = zipfile.ZipFile(_file(data_dir, "dinoSparseRing.zip"))
    lines = archive.read("dinoSparseRing/dinoSR_par.txt").decode().split("\n")[1:17]
    images, cameras, names = [], [], []
    for name, *numbers in (line.split() for line in lines):
        values = torch.tensor([float(v) for v in numbers])
        w2c = torch.eye(4)
        w2c[:3] = torch.cat([values[9:18].view(3, 3), values[18:21, None]], 1)
        pixels = np.array(Image.open(io.BytesIO(archive.read(f"dinoSparseRing/{name}"))).convert("RGB"))
        images.append(torch.from_numpy(pixels).float() / 255)
        cameras.append(Camera(values[:9].view(3, 3), w2c, pixels.shape[1], pixels.shape[0], name))
        names.append(name)
    return PhotoScene("dino ring", tuple(images), tuple(cameras), tuple(names), (128, 96))


def _file(data_dir: Path, name: str) -> Path:
    path = data_dir / "multiview" / name
    check(path.is_file(), f"The photos are missing: {path}.")
    return path


SCENES = {"fox": fox, "dino": dino_ring}


def photo_task(seed: int, data_dir: Path | None) -> Task:
    """The fox's photos at splat size, as splits of n = 16; arms with another n or scene split for themselves."""
    folder = data_folder(data_dir)
    scene = fox(folder)
    train, valid, test = (Split(scene.small(part).permute(0, 3, 1, 2)) for part in scene.split(16))
    return Task("multiview photos", train, valid, test, num_classes=1, seed=seed, facts={"data_dir": str(folder)})


# ------------------------------------------------------------------------------------------------------------------ arms


@cache
def registered(folder: Path, name: str, n: int, seed: int) -> tuple[ColmapViews | None, float]:
    """What structure from motion finds on the full-size photos, None where it refuses; and its CPU seconds."""
    scene, began = SCENES[name](folder), time.process_time()
    train = scene.split(n)[0]
    try:
        found = ColmapPrior(scene.work_size, seed=seed).reconstruct([scene.images[k] for k in train], [scene.names[k] for k in train])  # fmt: skip
    except InvalidInput:
        found = None
    return found, time.process_time() - began


def photo_arm(
    task: Task, generator: torch.Generator, *, scene: str, n: int, means: float, plain: bool = False
) -> Metrics:
    """One arm at one n."""
    folder = Path(str(task.facts["data_dir"]))
    photos = SCENES[scene](folder)
    train, valid, test = photos.split(n)
    found, seconds = registered(folder, scene, n, task.seed)
    known = {
        "registered": 0.0 if found is None else float(len(found.registered)),
        "rung": 0.0 if found is None else float(found.rung),
        "warned": float(found is None or bool(found.doubts) or len(found.registered) < len(train)),
    }
    if found is None or len(found.registered) < 3:
        return {**known, "whole_seconds": seconds}
    chosen = tuple(train[k] for k in found.registered)
    images, began = photos.small(chosen), time.process_time()
    run = _plain if plain else _full
    made, cameras = run(found, images, means, generator)
    seconds += time.process_time() - began
    held_out = valid if len(task.test) == len(task.valid) else test  # tuning puts the one in the other's place
    perceptual = perceptual_distance()
    scores = score_pose_free(
        made, cameras, photos.true(chosen), photos.true(held_out), photos.small(held_out), steps=FIT_STEPS,
        distance=None if perceptual is None else perceptual[1],
    )  # fmt: skip
    metrics = {
        **known, "rotation_error": float(scores.poses.rotation_degrees.max()), "ate": scores.poses.ate, "psnr": scores.mapped.psnr,
        "psnr_refined": scores.refined.psnr, "ssim": scores.mapped.ssim, "feature_distance": scores.mapped.feature_distance,
        "feature_distance_refined": scores.refined.feature_distance, "splats": float(len(made)), "whole_seconds": seconds,
    }  # fmt: skip
    return {key: value for key, value in metrics.items() if math.isfinite(value)}


def _full(
    found: ColmapViews, images: Tensor, means: float, generator: torch.Generator
) -> tuple[GaussianScene, tuple[Camera, ...]]:
    budget = Budget(steps=STEPS, refine_steps=REFINE_STEPS, splats=SPLATS, virtual_per_gap=max(1, VIRTUAL // len(images)), path_frames=2, rates=Rates(means=means))  # fmt: skip
    prior = KnownViews(views_of(found, found.registered), ColmapPrior.name)
    result = reconstruct(list(images), stereo_prior=prior, repair_prior=replace(REPAIR), mode="forward", switches=SWITCHES, budget=budget, generator=generator)  # fmt: skip
    return result.scene, result.cameras


def _plain(
    found: ColmapViews, images: Tensor, means: float, generator: torch.Generator
) -> tuple[GaussianScene, tuple[Camera, ...]]:
    scene = GaussianScene.from_points(found.cloud.points, found.cloud.rgb, degree=0)
    grow = DensificationStrategy(start=PLAIN_STEPS // 8, stop=round(0.7 * PLAIN_STEPS), every=PLAIN_STEPS // 16, reset_every=None, most_splats=SPLATS)  # fmt: skip
    train_splats(scene, found.cameras, images, steps=PLAIN_STEPS, generator=generator, rates=Rates(means=means), strategy=grow)  # fmt: skip
    return scene, found.cameras


def photo_arms() -> Mapping[str, Arm]:
    """`full_3`, `plain_3`, ... `full_dino`, `plain_dino`."""
    arms = {}
    for n in COUNTS:
        arms[f"full_{n}"] = Arm(partial(photo_arm, scene="fox", n=n), {"means": MEANS}, system=True)
        arms[f"plain_{n}"] = Arm(partial(photo_arm, scene="fox", n=n, plain=True), {"means": MEANS}, system=True)
    for name, plain in (("full_dino", False), ("plain_dino", True)):
        arms[name] = Arm(partial(photo_arm, scene="dino", n=8, means=MEANS[1], plain=plain), system=True)
    return arms


def _refuses(arms: Mapping[str, Metrics]) -> float:
    return arms["full_dino"]["warned"]


def photo_claims() -> tuple[Claim, ...]:
    """The curve over n in four sentences, and that no scene comes from wrong poses in silence."""
    better = tuple(Claim(f"From {n} photos the whole method has a higher PSNR on fitted held-out views than plain splatting.", "psnr_refined", f"full_{n}", f"plain_{n}") for n in COUNTS)  # fmt: skip
    return (*better, Claim("The run on the dino ring names what it could not place or does not trust.", effect=_refuses, at_least=1.0, every_seed=True))  # fmt: skip
