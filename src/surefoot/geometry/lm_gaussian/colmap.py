"""Poses without a large model: structure from motion by pycolmap (SIFT, exhaustive matching, incremental mapping), on the CPU.

A ladder of settings is climbed until all photos are in: the defaults, then looser thresholds for wide baselines. Matching itself is never widened:
that gives more points, but poses that can be wrong by tens of degrees with an innocent reprojection error. So the result passes a gate: for every pair with
enough verified matches, the share of them that agree with the final poses (Sampson error below 2 pixels). What does not pass is named.

Dense depths come from a plane sweep between the sparse points' depths. The extra `geometry` is needed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from surefoot.errors import InvalidInput, MissingExtra, check
from surefoot.geometry.lm_gaussian.priors import MultiView
from surefoot.geometry.lm_gaussian.sweep import plane_sweep
from surefoot.nn.geometry.cameras import Camera
from surefoot.nn.geometry.ply import PointCloud
from surefoot.nn.geometry.rotations import rigid, skew

LOOSE = {
    "init_min_num_inliers": 30,
    "init_min_tri_angle": 4.0,
    "abs_pose_min_num_inliers": 15,
    "abs_pose_min_inlier_ratio": 0.15,
}
RUNGS = (("default settings", {}, 15), ("loose thresholds", LOOSE, 10))
FEW_MATCHES, MOST_SAMPSON, LEAST_SHARE, MOST_REPROJECTION, FEW_POINTS = 15, 2.0, 0.8, 0.7, 15


@dataclass(frozen=True)
class ColmapPrior:
    """Structure from motion as a `MultiViewPrior`.

    Matching sees the photos at full size; cameras, depths and confidences come back at `work_size` (width, height), default the photos' own.
    `dense=False` gives the sparse points alone. All photos are taken by one camera without lens distortion (undistort them first).
    """

    work_size: tuple[int, int] | None = None
    dense: bool = True
    seed: int = 0
    name: str = field(default="pycolmap structure from motion + plane sweep", init=False)

    def reconstruct(self, images: Sequence[Tensor], names: Sequence[str], K: Tensor | None = None) -> MultiView:
        """Raises `InvalidInput` where fewer than two photos register, with what was tried."""
        pycolmap = _pycolmap()
        check(len(images) >= 2, f"Structure from motion needs at least two photos, got {len(images)}.")
        check(len({tuple(im.shape) for im in images}) == 1, "The photos must have one size; crop or resize them first.")
        with tempfile.TemporaryDirectory() as scratch, _quiet(pycolmap):
            files = _write_photos(images, Path(scratch) / "photos")
            database = Path(scratch) / "matches.db"
            self._match(pycolmap, database, Path(scratch) / "photos", K)
            model, rung, tried = self._map(pycolmap, database, Path(scratch), len(images), K)
            if model is None or model.num_reg_images() < 2:
                raise InvalidInput(f"Structure from motion placed none of the {len(images)} photos ({'; '.join(tried)}); take them closer together, with more texture in view.")  # fmt: skip
            notes = _gate(pycolmap, model, database, dict(zip(files, names, strict=True)))
        return self._result(model, files, names, images, rung, tried, notes)

    def _match(self, pycolmap: Any, database: Path, folder: Path, K: Tensor | None) -> None:
        reader = pycolmap.ImageReaderOptions()
        reader.camera_model = "PINHOLE"
        if K is not None:
            reader.camera_params = ",".join(str(float(v)) for v in (K[0, 0], K[1, 1], K[0, 2], K[1, 2]))
        pycolmap.set_random_seed(self.seed)
        extraction = pycolmap.FeatureExtractionOptions()
        extraction.num_threads = 1
        pycolmap.extract_features(database, folder, camera_mode=pycolmap.CameraMode.SINGLE, reader_options=reader, extraction_options=extraction, device=pycolmap.Device.cpu)  # fmt: skip
        matching = pycolmap.FeatureMatchingOptions()
        matching.num_threads = 1
        pycolmap.match_exhaustive(database, matching_options=matching, device=pycolmap.Device.cpu)

    def _map(
        self, pycolmap: Any, database: Path, scratch: Path, count: int, K: Tensor | None
    ) -> tuple[Any, str, list[str]]:
        """The largest model of the first rung that places every photo, else of the rung that places most."""
        best, best_rung, tried = None, "", []
        for number, (rung, thresholds, least_matches) in enumerate(RUNGS):
            options = pycolmap.IncrementalPipelineOptions()
            options.min_model_size, options.min_num_matches = 2, least_matches
            options.num_threads, options.random_seed = 1, self.seed
            options.ba_refine_focal_length = options.mapper.abs_pose_refine_focal_length = K is None
            for key, value in thresholds.items():
                setattr(options.mapper, key, value)
            out = scratch / f"rung{number}"
            out.mkdir()
            models = pycolmap.incremental_mapping(database, scratch / "photos", out, options)
            largest = max(models.values(), key=lambda m: (m.num_reg_images(), m.num_points3D()), default=None)
            placed = 0 if largest is None else largest.num_reg_images()
            groups = f" in {len(models)} groups" if len(models) > 1 else ""
            tried.append(f"{rung}: {placed} of {count} photos{groups}")
            if largest is not None and (best is None or placed > best.num_reg_images()):
                best, best_rung = largest, rung
            if placed == count:
                break
        return best, best_rung, tried

    def _result(
        self,
        model: Any,
        files: Sequence[str],
        names: Sequence[str],
        images: Sequence[Tensor],
        rung: str,
        tried: list[str],
        notes: list[str],
    ) -> MultiView:
        height, width = images[0].shape[:2]
        size = self.work_size or (width, height)
        by_file = {image.name: image for image in model.images.values() if image.has_pose}
        registered = tuple(k for k, file in enumerate(files) if file in by_file)
        cameras, ranges = [], []
        points = dict(model.points3D.items())
        for k in registered:
            image = by_file[files[k]]
            pose = torch.from_numpy(image.cam_from_world().matrix()).float()
            K = torch.from_numpy(image.camera.calibration_matrix()).float()
            camera = Camera(K, rigid(pose[:, :3], pose[:, 3]), width, height, names[k]).resized(*size)
            cameras.append(camera)
            seen = [points[p.point3D_id].xyz for p in image.points2D if p.has_point3D()]
            z = (torch.tensor(np.array(seen), dtype=torch.float32).reshape(-1, 3) @ pose[2, :3] + pose[2, 3]).clamp_min(
                1e-3
            )
            low, high = (
                torch.quantile(z, torch.tensor([0.005, 0.995])) if len(z) > 1 else torch.tensor([0.5, 10.0])
            ).tolist()
            ranges.append((low * 0.9, high * 1.1))
        xyz = torch.tensor(np.array([p.xyz for p in points.values()]), dtype=torch.float32).reshape(-1, 3)
        rgb = torch.tensor(np.array([p.color for p in points.values()]), dtype=torch.float32).reshape(-1, 3) / 255
        missing = [names[k] for k in range(len(names)) if k not in registered]
        if missing:
            notes = [f"{len(missing)} photos found no place ({', '.join(missing)}); tried: {'; '.join(tried)}.", *notes]
        elif rung != RUNGS[0][0]:
            notes = [f"The poses needed {rung}.", *notes]
        depths = conf = None
        if self.dense and len(cameras) >= 2:
            small = torch.stack([_resized(images[k], size) for k in registered])
            depths, conf = plane_sweep(small, cameras, ranges)
        return MultiView(tuple(cameras), registered, PointCloud(xyz, rgb), depths, conf, tuple(notes))


def _pycolmap() -> Any:
    try:
        import pycolmap  # type: ignore[import-not-found]
    except ImportError as error:
        raise MissingExtra("pycolmap", "geometry") from error
    return pycolmap


@contextmanager
def _quiet(pycolmap: Any) -> Iterator[None]:
    """Warnings and errors of the C++ side only."""
    before = pycolmap.logging.minloglevel
    pycolmap.logging.minloglevel = 2
    try:
        yield
    finally:
        pycolmap.logging.minloglevel = before


def _write_photos(images: Sequence[Tensor], folder: Path) -> list[str]:
    from PIL import Image

    folder.mkdir()
    files = [f"{k:04d}.png" for k in range(len(images))]
    for image, file in zip(images, files, strict=True):
        Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()).save(folder / file)
    return files


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    if image.shape[:2] == (size[1], size[0]):
        return image
    x = F.interpolate(image.permute(2, 0, 1)[None], size=(size[1], size[0]), mode="bilinear", antialias=True)
    return x[0].permute(1, 2, 0)


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


def _gate(pycolmap: Any, model: Any, database: Path, names: dict[str, str]) -> list[str]:
    """What a reader must know before trusting these poses."""
    notes, placed = [], {i: im for i, im in model.images.items() if im.has_pose}
    error = model.compute_mean_reprojection_error()
    if error > MOST_REPROJECTION:
        notes.append(f"The mean reprojection error is {error:.2f} pixels; the poses may be off.")
    thin = [names[im.name] for im in placed.values() if sum(p.has_point3D() for p in im.points2D) < FEW_POINTS]
    if thin:
        notes.append(f"Fewer than {FEW_POINTS} points hold {', '.join(thin)}.")
    for first, second, share in _agreement(pycolmap, placed, database):
        if share < LEAST_SHARE:
            notes.append(
                f"Only {share:.0%} of the matches between {names[first]} and {names[second]} agree with their poses."
            )
    return notes


def _agreement(pycolmap: Any, placed: dict[int, Any], database: Path) -> Iterator[tuple[str, str, float]]:
    def pose(image: Any) -> tuple[Tensor, Tensor]:
        m = torch.from_numpy(image.cam_from_world().matrix()).double()
        return rigid(m[:, :3], m[:, 3]), torch.from_numpy(image.camera.calibration_matrix()).double()

    with pycolmap.Database.open(str(database)) as db:
        ids = sorted(placed)
        for k, i in enumerate(ids):
            for j in ids[k + 1 :]:
                matches = db.read_two_view_geometry(i, j).inlier_matches
                if len(matches) < FEW_MATCHES:
                    continue
                a, b = (torch.from_numpy(np.asarray(db.read_keypoints(x))[:, :2].astype(np.float64)) for x in (i, j))
                (first, K_first), (second, K_second) = pose(placed[i]), pose(placed[j])
                F_ij = fundamental_of(first, second, K_first, K_second)
                errors = sampson_errors(a[matches[:, 0].astype(np.int64)], b[matches[:, 1].astype(np.int64)], F_ij)
                yield placed[i].name, placed[j].name, float((errors < MOST_SAMPSON).double().mean())
