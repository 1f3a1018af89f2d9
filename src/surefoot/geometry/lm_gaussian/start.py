"""Stage 0: from photos to cameras, depths and a cleaned cloud, by whichever prior finds the views."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surefoot.errors import InvalidInput, check
from surefoot.geometry.lm_gaussian.align import GlobalAlignment, align_pointmaps
from surefoot.geometry.lm_gaussian.clean import Cleaned, clean_cloud, cloud_of
from surefoot.geometry.lm_gaussian.pairs import PairStore, ask_pairs
from surefoot.geometry.lm_gaussian.priors import MonoDepthPrior, MultiView, MultiViewPrior, StereoPrior
from surefoot.geometry.lm_gaussian.settings import Budget, Progress, Switches
from surefoot.geometry.lm_gaussian.stages import Checkpoint, cameras_from_dict, cameras_to_dict, cloud_to_dict
from surefoot.nn.geometry.cameras import Camera
from surefoot.nn.geometry.ply import PointCloud


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
    checkpoint: Checkpoint | None = None,
    kept: PairStore | None = None,
) -> Start:
    """Stage 0: poses, depths and the cleaned cloud. An alignment that `checkpoint` holds is taken up, and this one kept there; pairs that `kept` holds
    are not asked for again.

    Photos are [H, W, 3] in [0, 1] and of one size (`check_images`); everything moves to their device, wherever the priors answered. Raises
    `InvalidInput` where a prior's answers cannot be used, photos do not hang together, or too few points are left.
    """
    check(K is None or K.shape == (3, 3), f"K must be [3, 3], the intrinsics of the one camera, got {None if K is None else list(K.shape)}.")  # fmt: skip
    stack = torch.stack(list(images))
    mono = (
        None
        if depth_prior is None
        else torch.stack([depth_prior.predict(k, im).to(stack) for k, im in enumerate(images)])
    )
    report: dict[str, Any] = {"stereo": stereo_prior.name, "depth": None if depth_prior is None else depth_prior.name}
    if isinstance(stereo_prior, StereoPrior):
        n = len(images)
        pairs = [pair.to(stack.device) for pair in ask_pairs(stereo_prior, images, store=kept)]
        known = None if K is None else K.to(stack).expand(n, 3, 3)

        def tell(step: int, steps: int, loss: float) -> None:
            if progress is not None:
                progress("align", step, steps)

        fit = align_pointmaps(pairs, names=names, mono_depth=mono if switches.depth_guidance else None, K=known, clean_every=50 if switches.cleaning else None, depth_scope=switches.depth_scope, adaptor=switches.adaptor, tol=budget.tol, steps=budget.align_steps, generator=generator, progress=tell, checkpoint=checkpoint)  # fmt: skip
        report |= {"notes": list(fit.notes)} if fit.notes else {}
        return _cleaned(fit, tuple(range(n)), stack, mono, names, switches, budget, generator, report)
    found: MultiView = stereo_prior.reconstruct(images, names, K).to(stack.device)
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
    chosen = torch.randperm(len(cloud.points), generator=generator, device=generator.device)[:at_most].sort().values.to(cloud.points.device)  # fmt: skip
    return PointCloud(cloud.points[chosen], cloud.rgb[chosen])
