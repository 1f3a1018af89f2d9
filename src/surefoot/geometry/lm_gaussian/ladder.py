"""Three ways from matches to poses, tried in order until one places every photo and nothing speaks against its poses.

1. Incremental mapping with pycolmap's own thresholds. 2. The same with looser ones for wide baselines. 3. A chain of OpenCV's: the essential matrix of the best
pair by RANSAC under the likeliest focal length, then photo after photo by PnP against what is triangulated so far, pycolmap's bundle adjustment after each. The
chain asks for less, two photos with a score of matches, and it does not start from a guess of the focal length that a few photos cannot
correct. No way matches more widely than another; that gives more points and worse poses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

LOOSE = {
    "init_min_num_inliers": 30,
    "init_min_tri_angle": 4.0,
    "abs_pose_min_num_inliers": 15,
    "abs_pose_min_inlier_ratio": 0.15,
}
RUNGS = ("default settings", "loose thresholds", "essential matrix and PnP chain")
FOCALS = (0.6, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)  # in units of the longer side, where the focal length is unknown
SEED_MATCHES, PNP_POINTS, PIXELS, PNP_PIXELS, LEAST_ANGLE = 20, 10, 1.0, 4.0, 2.0


@dataclass(frozen=True)
class Climb:
    """The largest model of the chosen rung; None where no rung places two photos."""

    model: Any
    rung: int  # 1, 2 or 3; 0 without a model
    tried: tuple[str, ...]  # a sentence for each rung
    groups: tuple[tuple[str, ...], ...] = ()  # the photos of each model of that rung, the largest first
    doubts: tuple[str, ...] = ()


def climb(
    pycolmap: Any,
    database: Path,
    photos: Path,
    count: int,
    *,
    known: bool,  # the focal lengths in the database are the truth and stay
    seed: int,
    judge: Callable[[Any], list[str]],  # what speaks against a model
) -> Climb:
    """The first rung that places all photos without a doubt; else a model without doubts before one with,
    the larger before the smaller, fewer doubts before more."""
    found, tried = [], []
    for rung, name in enumerate(RUNGS, 1):
        if rung < 3:
            models = _mapped(pycolmap, database, photos, rung == 2, known, seed)
        else:
            models = [m for m in [chained(pycolmap, database, photos, known=known, seed=seed)] if m is not None]
        models.sort(key=lambda m: (m.num_reg_images(), m.num_points3D()), reverse=True)
        placed = models[0].num_reg_images() if models else 0
        against = judge(models[0]) if placed >= 2 else []
        tried.append(f"{name}: {placed} of {count} photos{f' in {len(models)} groups' if len(models) > 1 else ''}{', doubtful' if against else ''}")  # fmt: skip
        if placed >= 2:
            groups = tuple(_names(m) for m in models)
            found.append(
                (not against, placed, -len(against), -rung, Climb(models[0], rung, (), groups, tuple(against)))
            )
        if placed == count and not against:
            break
    best = max(found, key=lambda f: f[:4])[4] if found else Climb(None, 0, ())
    return replace(best, tried=tuple(tried))


def _names(model: Any) -> tuple[str, ...]:
    return tuple(sorted(image.name for image in model.images.values() if image.has_pose))


def _mapped(pycolmap: Any, database: Path, photos: Path, loose: bool, known: bool, seed: int) -> list[Any]:
    options = pycolmap.IncrementalPipelineOptions()
    options.min_model_size, options.min_num_matches = 2, 10 if loose else 15
    options.num_threads, options.random_seed = 1, seed
    options.ba_refine_focal_length = options.mapper.abs_pose_refine_focal_length = not known
    for key, value in (LOOSE if loose else {}).items():
        setattr(options.mapper, key, value)
    out = database.parent / ("loose" if loose else "default")
    out.mkdir(exist_ok=True)
    return list(pycolmap.incremental_mapping(database, photos, out, options).values())


# ---------------------------------------------------------------------------------------------------------- the chain


@dataclass(frozen=True)
class Pair:
    """Matches of two photos before any verification, as rows of their keypoints and as pixels."""

    i: int
    j: int
    rows: np.ndarray  # int [M, 2]
    a: np.ndarray  # float64 [M, 2]
    b: np.ndarray  # float64 [M, 2]


def read_pairs(pycolmap: Any, database: Path, least: int) -> tuple[list[Any], dict[int, Any], list[Pair]]:
    """The photos, their cameras by photo, and all pairs with at least `least` raw matches."""
    with pycolmap.Database.open(str(database)) as db:
        images = sorted(db.read_all_images(), key=lambda image: image.name)
        cameras = {camera.camera_id: camera for camera in db.read_all_cameras()}
        points = {im.image_id: np.asarray(db.read_keypoints(im.image_id))[:, :2].astype(np.float64) for im in images}
        pairs = []
        for k, first in enumerate(images):
            for second in images[k + 1 :]:
                i, j = first.image_id, second.image_id
                rows = np.asarray(db.read_matches(i, j)).reshape(-1, 2).astype(np.int64)
                if len(rows) >= least:
                    pairs.append(Pair(i, j, rows, points[i][rows[:, 0]], points[j][rows[:, 1]]))
    return images, {im.image_id: cameras[im.camera_id] for im in images}, pairs


def chained(pycolmap: Any, database: Path, photos: Path, *, known: bool, seed: int, starts: int = 3) -> Any:
    """The largest reconstruction that the chain builds from its best first pairs; None where no pair will do."""
    images, cameras, pairs = read_pairs(pycolmap, database, SEED_MATCHES)
    if not pairs:
        return None
    K = cameras[images[0].image_id].calibration_matrix()
    if not known:
        longer = max(cameras[images[0].image_id].width, cameras[images[0].image_id].height)
        K[0, 0] = K[1, 1] = longer * guess_focal(pairs, K, longer)
    seeds = sorted((s for s in (_seed_pose(pair, K) for pair in pairs) if s is not None), key=lambda s: -s[0])
    best = None
    for _, pair, pose in seeds[:starts]:
        model = _grown(pycolmap, database, photos, images, K, pair, pose, known, seed)
        if model is not None and (best is None or model.num_reg_images() > best.num_reg_images()):
            best = model
        if best is not None and best.num_reg_images() == len(images):
            break
    return best


def guess_focal(pairs: list[Pair], K: np.ndarray, longer: int) -> float:
    """The focal length, in units of the longer side, under which most matches agree with some essential matrix."""

    def agreeing(focal: float) -> int:
        guess = K.copy()
        guess[0, 0] = guess[1, 1] = focal * longer
        return sum(int(_essential(pair, guess)[1].sum()) for pair in pairs)

    return max(FOCALS, key=agreeing)


def _essential(pair: Pair, K: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:  # [3, 3], bool [M]
    import cv2

    E, mask = cv2.findEssentialMat(pair.a, pair.b, K, method=cv2.RANSAC, prob=0.9999, threshold=PIXELS, maxIters=5000)
    if E is None or E.shape != (3, 3) or mask is None:
        return None, np.zeros(len(pair.a), bool)
    return E, mask.ravel() > 0


def _seed_pose(pair: Pair, K: np.ndarray) -> tuple[float, Pair, np.ndarray] | None:
    """(how good a start, the pair, world-to-camera [3, 4] of its second photo); None for too few points or too small an angle."""
    import cv2

    E, mask = _essential(pair, K)
    if E is None or mask.sum() < SEED_MATCHES:
        return None
    a, b = pair.a[mask], pair.b[mask]
    _, R, t, _, X = cv2.recoverPose(E, a, b, K, distanceThresh=1e3)
    X = (X[:3] / np.where(np.abs(X[3]) < 1e-12, 1e-12, X[3])).T
    second = X @ R.T + t.ravel()
    front = (X[:, 2] > 0) & (second[:, 2] > 0) & (X[:, 2] < 1e3)
    if front.sum() < SEED_MATCHES:
        return None
    rays, others = X[front], X[front] + R.T @ t.ravel()  # from either centre
    cosine = (rays * others).sum(1) / np.maximum(np.linalg.norm(rays, axis=1) * np.linalg.norm(others, axis=1), 1e-12)
    angle = float(np.degrees(np.median(np.arccos(cosine.clip(-1, 1)))))
    if angle < LEAST_ANGLE:
        return None
    return float(front.sum()) * min(1.0, angle / 8), pair, np.concatenate([R, t.reshape(3, 1)], 1)


def _grown(
    pycolmap: Any,
    database: Path,
    photos: Path,
    images: list[Any],
    K: np.ndarray,
    pair: Pair,
    pose: np.ndarray,
    known: bool,
    seed: int,
) -> Any:
    """A reconstruction from a first pair; photos join in the order of how many triangulated points they see."""
    poses = {pair.i: np.eye(3, 4), pair.j: pose}
    refused: set[tuple[int, int]] = set()
    while True:
        model = _triangulated(pycolmap, database, photos, images, K, poses, known, seed)
        if model is None:
            return None
        K = next(iter(model.cameras.values())).calibration_matrix()
        poses = {i: model.images[i].cam_from_world().matrix() for i in poses}
        offers = {im.image_id: _seen(pycolmap, database, model, im.image_id, poses) for im in images if im.image_id not in poses}  # fmt: skip
        offers = {i: (x, X) for i, (x, X) in offers.items() if len(x) >= PNP_POINTS and (i, len(poses)) not in refused}
        if not offers:
            return model
        chosen = max(offers, key=lambda i: len(offers[i][0]))
        found = _pnp(*offers[chosen], K)
        if found is None:
            refused.add((chosen, len(poses)))
        else:
            poses[chosen] = found


def _triangulated(
    pycolmap: Any,
    database: Path,
    photos: Path,
    images: list[Any],
    K: np.ndarray,
    poses: dict[int, np.ndarray],
    known: bool,
    seed: int,
) -> Any:
    """Tracks for these poses, then bundle adjustment; the focal length moves only if it is unknown and three photos or more hold it."""
    model = pycolmap.Reconstruction()
    with pycolmap.Database.open(str(database)) as db:
        camera = db.read_camera(images[0].camera_id)
        camera.params = [K[0, 0], K[1, 1], K[0, 2], K[1, 2]]
        model.add_camera_with_trivial_rig(camera)
        for im in images:
            if im.image_id in poses:
                points = np.asarray(db.read_keypoints(im.image_id))[:, :2].astype(np.float64)
                image = pycolmap.Image(name=im.name, keypoints=points, camera_id=im.camera_id, image_id=im.image_id)
                model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(poses[im.image_id]))
    options = pycolmap.IncrementalPipelineOptions()
    options.num_threads, options.random_seed, options.min_num_matches = 1, seed, PNP_POINTS
    options.triangulation.ignore_two_view_tracks = False
    options.triangulation.random_seed = seed
    out = database.parent / "chain"
    out.mkdir(exist_ok=True)
    model = pycolmap.triangulate_points(model, database, photos, out, options=options)
    if model.num_points3D() < PNP_POINTS:
        return None
    adjust = pycolmap.BundleAdjustmentOptions()
    adjust.refine_focal_length = not known and len(poses) >= 3
    adjust.refine_principal_point = adjust.refine_extra_params = adjust.print_summary = False
    held = pycolmap.BundleAdjustmentConfig()
    for i in poses:
        held.add_image(i)
    held.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
    pycolmap.create_default_bundle_adjuster(adjust, held, model).solve()  # bundle_adjustment() itself turns messages on
    model.update_point_3d_errors()
    return model


def _seen(
    pycolmap: Any, database: Path, model: Any, i: int, poses: dict[int, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [M, 2] in photo i and the triangulated points [M, 3] that its verified matches say they show."""
    pixels: dict[tuple[int, int], np.ndarray] = {}
    points: dict[tuple[int, int], np.ndarray] = {}
    with pycolmap.Database.open(str(database)) as db:
        mine = np.asarray(db.read_keypoints(i))[:, :2].astype(np.float64)
        for j in poses:
            there = model.images[j].points2D
            matches = np.asarray(db.read_two_view_geometry(i, j).inlier_matches).reshape(-1, 2).astype(np.int64)
            for row, other in matches.tolist():
                if there[other].has_point3D():
                    point = there[other].point3D_id
                    pixels[row, point], points[row, point] = mine[row], model.points3D[point].xyz
    return np.array(list(pixels.values())).reshape(-1, 2), np.array(list(points.values())).reshape(-1, 3)


def _pnp(pixels: np.ndarray, points: np.ndarray, K: np.ndarray) -> np.ndarray | None:  # world-to-camera [3, 4]
    import cv2

    good, turn, shift, inliers = cv2.solvePnPRansac(points, pixels, K, None, iterationsCount=2000, reprojectionError=PNP_PIXELS, confidence=0.9999)  # fmt: skip
    if not good or inliers is None or len(inliers) < PNP_POINTS or len(inliers) < 0.25 * len(points):
        return None
    held = inliers.ravel().astype(np.int64)
    turn, shift = cv2.solvePnPRefineLM(points[held], pixels[held], K, None, turn, shift)
    return np.concatenate([cv2.Rodrigues(turn)[0], shift.reshape(3, 1)], 1)
