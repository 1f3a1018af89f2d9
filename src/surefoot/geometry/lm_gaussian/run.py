"""From a folder of photos to a folder of results: the chosen backends wired together, and views held out to tell how good it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surefoot.errors import InvalidInput, check, check_at_least
from surefoot.geometry.lm_gaussian.backends import (
    Answers,
    Backends,
    aligned,
    asked,
    first_depths,
    oriented,
    resized,
)
from surefoot.geometry.lm_gaussian.evaluate import perceptual_distance, refine_pose, score_views
from surefoot.geometry.lm_gaussian.pairs import PairStore, ask_pairs
from surefoot.geometry.lm_gaussian.priors import MultiView, StereoPrior
from surefoot.geometry.lm_gaussian.settings import Budget, Mode, Progress, Switches
from surefoot.geometry.lm_gaussian.stages import StageStore, cameras_from_dict, cameras_to_dict, cloud_to_dict, once
from surefoot.geometry.lm_gaussian.start import check_images
from surefoot.geometry.lm_gaussian.system import LMGaussianResult, reconstruct
from surefoot.nn.geometry.cameras import Camera
from surefoot.nn.geometry.ply import PointCloud
from surefoot.nn.geometry.rasterizer import rasterize


@dataclass(frozen=True)
class KnownViews:
    """A prior that answers with views found before, for the photos named."""

    found: MultiView
    name: str

    def reconstruct(self, images: Sequence[Tensor], names: Sequence[str], K: Tensor | None) -> MultiView:
        return self.found


def views_of(found: MultiView, chosen: Sequence[int]) -> MultiView:
    """The part of what a prior found that concerns these photos, which are then counted from 0."""
    rows = [found.registered.index(k) for k in chosen]
    return replace(
        found,
        cameras=tuple(found.cameras[r] for r in rows),
        registered=tuple(range(len(rows))),
        depths=None if found.depths is None else found.depths[rows],
        conf=None if found.conf is None else found.conf[rows],
    )


@dataclass(frozen=True)
class HeldOut:
    """Photos that trained nothing, beside their renderings; poses as registered, and fitted to the photo with the splats frozen."""

    names: tuple[str, ...]
    photos: Tensor  # [V, H, W, 3]
    renders: Tensor  # [V, H, W, 3], at the fitted poses
    scores: dict[str, Any]


NETWORK_SIDE = 1024  # the longer side of the photos that networks are shown; they shrink them further


def reconstruct_photos(
    images: Sequence[Tensor],  # full size, each [H, W, 3] in [0, 1]
    names: Sequence[str],
    *,
    size: int = 96,
    mode: Mode = "360",
    eval_every: int | None = None,
    backends: Backends | None = None,
    switches: Switches | None = None,
    budget: Budget | None = None,
    K: Tensor | None = None,  # [3, 3]: known intrinsics of the one camera, at the photos' size
    optimize_poses: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    progress: Progress | None = None,
) -> tuple[
    LMGaussianResult, HeldOut | None, Tensor
]:  # the result, the held-out views, the training photos at splat size
    """Poses, depths and normals from the photos as large as the backends want them, splats at `size` pixels on the longer side.

    `eval_every=k` holds every k-th registered photo out of training: it finds its place with the others, and gives no point. With `folder` finished
    stages are kept there. Splats are trained on `device`. Raises `InvalidInput` where too few photos find their place.
    """
    from surefoot.geometry.lm_gaussian.photos import resize

    check_at_least("size", size, 16)
    backends, switches = backends or Backends(), switches or Switches()
    budget = budget or Budget.of(mode, device=device)
    check_images(images, names)
    small, large = resize(images, size), resize(images, NETWORK_SIDE)
    height, width = small[0].shape[:2]
    mono = None if backends.depth is None else asked(backends.depth.predict, large, width, height)
    priors = [None if p is None else p.name for p in (backends.stereo, backends.depth)]
    asked_for = (list(names), size, seed, priors, backends.asked, switches, budget, None if K is None else K.tolist())
    views = None if folder is None else StageStore.of(folder / "stages", large, *asked_for)
    pairs = None if folder is None or not isinstance(backends.stereo, StereoPrior) else PairStore.of(folder / "stages", backends.stereo, large, backends.asked[:1], (width, height))  # fmt: skip
    found, note, who = once(
        views, "views", torch.Generator(),
        lambda: _views(images, large, names, mono, (width, height), backends, switches, budget, K, seed, progress, views, pairs),
        _views_to_dict, _views_from_dict,
    )  # fmt: skip
    if pairs is not None:
        pairs.clear()
    mono = mono if mono is None or note is None else -mono
    held = list(found.registered[::eval_every]) if eval_every else []
    train = [k for k in found.registered if k not in held]
    if len(train) < 2:
        raise InvalidInput(f"{len(found.registered)} photos found their place and {len(held)} of them are held out; give more photos or a larger --eval-every.")  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    chosen = [small[k].to(device) for k in train]
    depth = None if mono is None or backends.depth is None else Answers(mono[train], backends.depth.name)
    normals = None
    if backends.normals is not None:
        shown = [large[k] for k in train]
        normals = Answers(asked(backends.normals.predict, shown, width, height), backends.normals.name)
    others = (backends.depth, backends.normals, backends.repair, backends.enhance)
    settings = (
        sorted(names),
        train,
        size,
        mode,
        switches,
        budget,
        seed,
        who,
        [None if p is None else p.name for p in others],
        backends.asked,
        None if K is None else K.tolist(),
        optimize_poses,
    )
    stages = None if folder is None else StageStore.of(folder / "stages", chosen, *settings)
    result = reconstruct(
        chosen, stereo_prior=KnownViews(views_of(found, train), who), names=[names[k] for k in train], depth_prior=depth, normal_prior=normals,
        repair_prior=backends.repair, video_prior=backends.enhance, mode=mode, switches=switches, budget=budget,
        optimize_poses=optimize_poses, generator=generator, progress=progress, stages=stages,
    )  # fmt: skip
    if K is not None:
        result.report["intrinsics"] = K.tolist()
    result.report["unregistered"] = [names[k] for k in range(len(names)) if k not in found.registered]
    cameras = [found.cameras[found.registered.index(k)] for k in held]
    kept_out = cameras, [small[k].to(device) for k in held], [names[k] for k in held]
    scored = held_out(result, *kept_out)
    if scored is not None and result.undistilled is not None:
        before = held_out(replace(result, scene=result.undistilled), *kept_out)
        scored.scores["before_distilling"] = {} if before is None else before.scores
    return result, scored, torch.stack(chosen)


def _views(
    images: Sequence[Tensor], large: Sequence[Tensor], names: Sequence[str], mono: Tensor | None, size: tuple[int, int], backends: Backends,
    switches: Switches, budget: Budget, K: Tensor | None, seed: int, progress: Progress | None, stages: StageStore | None,
    kept: PairStore | None,
) -> tuple[MultiView, str | None, str]:  # fmt: skip
    """The views at splat size, why the mono depths have to be turned over (None where not), and who found the views."""
    width, height = size
    note = None

    def intrinsics_at(columns: int, rows: int) -> Tensor | None:
        full = images[0].shape
        return None if K is None else K * K.new_tensor([columns / full[1], rows / full[0], 1.0])[:, None]

    def tell(stage: str) -> Callable[..., None]:
        return lambda step, steps, *_: None if progress is None else progress(stage, step, steps)

    tell("poses")(0, 1)
    prior = backends.stereo
    if isinstance(prior, StereoPrior):
        pairs = ask_pairs(prior, large, size=size, store=kept, progress=tell("poses"))
        if mono is not None:
            mono, note = oriented(mono, *first_depths(pairs, len(images)))
        guide = mono if switches.depth_guidance else None
        found = aligned(pairs, names, mono_depth=guide, K=intrinsics_at(width, height), cleaning=switches.cleaning, depth_scope=switches.depth_scope, adaptor=switches.adaptor, steps=budget.align_steps, tol=budget.tol, seed=seed, progress=tell("align"), checkpoint=None if stages is None else stages.checkpoint("views"))  # fmt: skip
    else:
        if prior is None:
            from surefoot.geometry.lm_gaussian.colmap import ColmapPrior

            prior = ColmapPrior(work_size=size, seed=seed)
            found = prior.reconstruct(images, names, K)
        else:
            K = intrinsics_at(large[0].shape[1], large[0].shape[0])
            found = resized(prior.reconstruct(large, names, K), width, height)
        if mono is not None and found.depths is not None and found.conf is not None:
            _, note = oriented(mono[list(found.registered)], found.depths, found.conf)
    if note is not None:
        found = replace(found, notes=(*found.notes, note))
    return found, note, prior.name


def _views_to_dict(views: tuple[MultiView, str | None, str]) -> dict[str, Any]:
    found, note, who = views
    rest = {
        "registered": list(found.registered),
        "depths": found.depths,
        "conf": found.conf,
        "notes": list(found.notes),
    }
    return {**cameras_to_dict(found.cameras), **cloud_to_dict(found.cloud), **rest, "note": note, "who": who}


def _views_from_dict(saved: dict[str, Any]) -> tuple[MultiView, str | None, str]:
    cloud = PointCloud(saved["points"], saved["rgb"])
    found = MultiView(cameras_from_dict(saved), tuple(saved["registered"]), cloud, saved["depths"], saved["conf"], tuple(saved["notes"]))  # fmt: skip
    return found, saved["note"], saved["who"]


def held_out(
    result: LMGaussianResult, cameras: Sequence[Camera], photos: Sequence[Tensor], names: Sequence[str]
) -> HeldOut | None:
    """Scores of views that trained nothing; None without any."""
    if not cameras:
        return None
    check(len(cameras) == len(photos) == len(names), "cameras, photos and names must be equally many.")
    images = torch.stack(list(photos))
    fitted = [refine_pose(result.scene, c.to(images), image) for c, image in zip(cameras, images, strict=True)]
    perceptual = perceptual_distance()
    distance = None if perceptual is None else perceptual[1]
    mapped, refined = (
        score_views(result.scene, [c.to(images) for c in views], images, distance=distance)
        for views in (cameras, fitted)
    )
    with torch.no_grad():
        renders = torch.stack([rasterize(result.scene, c).rgb.clamp(0, 1) for c in fitted])
    scores = {
        "psnr": mapped.psnr, "ssim": mapped.ssim, "psnr_fitted": refined.psnr, "ssim_fitted": refined.ssim,
        "each_psnr_fitted": list(refined.each_psnr),
        "perceptual": "none: the extra vision is not installed" if perceptual is None else perceptual[0],
    }  # fmt: skip
    if perceptual is not None:
        scores |= {"feature_distance": mapped.feature_distance, "feature_distance_fitted": refined.feature_distance}
    return HeldOut(tuple(names), images, renders, scores)
