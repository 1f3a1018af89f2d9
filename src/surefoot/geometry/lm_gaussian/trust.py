"""Can these poses be believed? What structure from motion left, judged by witnesses that the mapping itself did not use.

- The pixels of a camera are square. Where the two focal lengths are free, wrong poses bend them apart (by more than 3 percent) or drive them to a field
  of view that no ordinary lens has. This is the sharpest witness, and it sees models whose every match agrees.
- By photo, not by pair: of all verified matches of a photo with the others, at least half must agree with the poses (Sampson error below 2 pixels). A
  single far pair may well be wrong by itself, because repeated texture matches repeated texture, and says nothing about the poses.
- The mean reprojection error, and at least 15 points in every photo.
- Two photos whose focal length is unknown: nothing is left that could contradict their poses.
- A focal length that was given takes the first witness away, so it is asked another way: set free from these poses on, does it stay, and stay square?
  Where both of its numbers leave the given one by more than 8 percent to the same side, or part by more than 10, the number or the poses are wrong. Of 56
  random handfuls of 3 to 8 of the fox's photos with a number 20 percent off this leaves 4 wrong ones in silence; of 28 with the right number it
  doubts 2 whose poses are right. It is a weaker witness than the first: wrong poses that fit the right number well enough are believed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surefoot.nn.geometry.rotations import rigid, skew

FEW_MATCHES, MOST_SAMPSON, LEAST_SHARE, MOST_REPROJECTION, FEW_POINTS = 15, 2.0, 0.5, 0.5, 15
# How far a given focal length may move and bend when it is set free, and how many photos can tell.
GIVEN, FREED_SQUARE, PHOTOS_TELL = 0.08, 0.10, 3
SQUARE, FOCAL_RANGE = 0.03, (0.4, 2.0)  # the focal length in units of the longer side


def sampson_errors(
    a: Tensor,  # [M, 2] pixels in the first photo
    b: Tensor,  # [M, 2] pixels in the second
    fundamental: Tensor,  # [3, 3], b^T F a = 0
) -> Tensor:  # [M], pixels
    """First-order distance of matches to the epipolar geometry."""
    ones = torch.ones_like(a[:, :1])
    a, b = torch.cat([a, ones], 1), torch.cat([b, ones], 1)
    fa, fb = a @ fundamental.mT, b @ fundamental
    top = (b * fa).sum(1)
    return top.abs() / (fa[:, :2].square().sum(1) + fb[:, :2].square().sum(1)).clamp_min(1e-12).sqrt()


def fundamental_of(first: Tensor, second: Tensor, K_first: Tensor, K_second: Tensor) -> Tensor:  # w2c [4, 4] twice
    """The fundamental matrix of two posed cameras."""
    relative = second @ torch.linalg.inv(first)
    essential = skew(relative[:3, 3]) @ relative[:3, :3]
    return torch.linalg.inv(K_second).mT @ essential @ torch.linalg.inv(K_first)


def doubts(pycolmap: Any, model: Any, database: Path, names: Mapping[str, str], *, known: bool) -> list[str]:
    """Sentences that a reader must see before using these poses; none where nothing speaks against them. `names` maps files to photos."""
    notes, placed = [], {i: im for i, im in model.images.items() if im.has_pose}
    if not known:
        notes += _focal_doubts(next(iter(placed.values())).camera, len(placed))
    elif len(placed) >= PHOTOS_TELL:
        notes += _given_focal_doubts(pycolmap, model)
    error = model.compute_mean_reprojection_error()
    if error > MOST_REPROJECTION:
        notes.append(f"The mean reprojection error is {error:.2f} pixels; the poses may be off.")
    thin = [names[im.name] for im in placed.values() if sum(p.has_point3D() for p in im.points2D) < FEW_POINTS]
    if thin:
        notes.append(f"Fewer than {FEW_POINTS} points hold {', '.join(sorted(thin))}.")
    for file, share in agreement(pycolmap, model, database).items():
        if share < LEAST_SHARE:
            notes.append(f"Only {share:.0%} of the matches of {names[file]} with the other photos agree with its pose.")
    return notes


def _focal_doubts(camera: Any, placed: int) -> list[str]:
    K, longer = camera.calibration_matrix(), max(camera.width, camera.height)
    notes, ratio = [], K[1, 1] / K[0, 0]
    if placed == 2:
        notes.append("Two photos alone do not tell their focal length, and nothing checks their poses; give a third photo or the intrinsics.")  # fmt: skip
    if abs(ratio - 1) > SQUARE:
        notes.append(f"The focal lengths found along x and y differ by {abs(ratio - 1):.0%}, but pixels are square: the poses are likely wrong.")  # fmt: skip
    if not FOCAL_RANGE[0] < K[0, 0] / longer < FOCAL_RANGE[1]:
        angle = 2 * np.degrees(np.arctan(longer / (2 * K[0, 0])))
        notes.append(f"The field of view found is {angle:.0f} degrees along the longer side, which is unusual: the poses are likely wrong.")  # fmt: skip
    return notes


def _given_focal_doubts(pycolmap: Any, model: Any) -> list[str]:
    given, freed = _focals(model), freed_focals(pycolmap, model)
    ratios = freed / given
    moved = float(np.abs(np.log(ratios)).min()) if len(set(np.sign(np.log(ratios)))) == 1 else 0.0
    bent = abs(ratios[1] / ratios[0] - 1)
    if moved > np.log(1 + GIVEN):
        return [f"The photos fit a focal length of about {freed.mean():.0f} pixels better than the {given.mean():.0f} that was given; one of them or the poses are wrong."]  # fmt: skip
    if bent > FREED_SQUARE:
        return [f"Set free, the focal lengths along x and y part by {bent:.0%}, but pixels are square: the poses or the focal length that was given are likely wrong."]  # fmt: skip
    return []


def freed_focals(pycolmap: Any, model: Any) -> np.ndarray:  # [2]
    """The focal lengths along x and y that bundle adjustment finds from these poses on; the model stays as it is."""
    other = pycolmap.Reconstruction(model)
    adjust = pycolmap.BundleAdjustmentOptions()
    adjust.refine_focal_length = True
    adjust.refine_principal_point = adjust.refine_extra_params = adjust.print_summary = False
    free = pycolmap.BundleAdjustmentConfig()
    for i, image in other.images.items():
        if image.has_pose:
            free.add_image(i)
    free.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
    pycolmap.create_default_bundle_adjuster(adjust, free, other).solve()
    return _focals(other)


def _focals(model: Any) -> np.ndarray:  # [2]
    K = next(iter(model.cameras.values())).calibration_matrix()
    return np.array([K[0, 0], K[1, 1]])


def agreement(pycolmap: Any, model: Any, database: Path) -> dict[str, float]:
    """By file of a placed photo: the share of its verified matches, over all pairs with 15 or more, that agree with the poses; 0 without any."""
    placed = {i: im for i, im in model.images.items() if im.has_pose}
    good, all_ = dict.fromkeys(placed, 0), dict.fromkeys(placed, 0)
    with pycolmap.Database.open(str(database)) as db:
        points = {i: torch.from_numpy(np.asarray(db.read_keypoints(i))[:, :2].astype(np.float64)) for i in placed}
        poses = {i: _pose(im) for i, im in placed.items()}
        ids = sorted(placed)
        for k, i in enumerate(ids):
            for j in ids[k + 1 :]:
                matches = np.asarray(db.read_two_view_geometry(i, j).inlier_matches).reshape(-1, 2).astype(np.int64)
                if len(matches) < FEW_MATCHES:
                    continue
                (first, K_first), (second, K_second) = poses[i], poses[j]
                F_ij = fundamental_of(first, second, K_first, K_second)
                errors = sampson_errors(points[i][matches[:, 0]], points[j][matches[:, 1]], F_ij)
                for at in (i, j):
                    good[at] += int((errors < MOST_SAMPSON).sum())
                    all_[at] += len(matches)
    return {placed[i].name: good[i] / max(1, all_[i]) for i in ids}


def _pose(image: Any) -> tuple[Tensor, Tensor]:  # w2c [4, 4], K [3, 3]
    m = torch.from_numpy(image.cam_from_world().matrix()).double()
    return rigid(m[:, :3], m[:, 3]), torch.from_numpy(image.camera.calibration_matrix()).double()
