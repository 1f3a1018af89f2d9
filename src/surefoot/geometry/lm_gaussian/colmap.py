"""Poses without a large model: structure from motion by pycolmap (SIFT, exhaustive matching, incremental mapping) and OpenCV, on the CPU.

A ladder of three ways (`ladder.py`) is climbed until all photos are in and a trust gate (`trust.py`) has nothing to say against their poses. Matching itself
is never widened: that gives more points, but poses that can be wrong by tens of degrees with an innocent reprojection error. The result says which rung
it stands on, what each placed, which photos found no place or hang together in groups of their own, and every doubt that is left.

Dense depths come from a plane sweep between the sparse points' depths. The extra `geometry` is needed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from surefoot.errors import InvalidInput, MissingExtra, check
from surefoot.geometry.lm_gaussian.ladder import RUNGS, Climb, climb
from surefoot.geometry.lm_gaussian.priors import MultiView
from surefoot.geometry.lm_gaussian.sweep import plane_sweep
from surefoot.geometry.lm_gaussian.trust import doubts
from surefoot.nn.geometry.cameras import Camera
from surefoot.nn.geometry.ply import PointCloud
from surefoot.nn.geometry.rotations import rigid

DISC = 15.0  # pixels of the full-size photo within which a sparse point supports a depth


@dataclass(frozen=True)
class ColmapViews(MultiView):
    """What structure from motion found, and how."""

    rung: int = 0  # 1, 2 or 3 of `ladder.RUNGS`
    tried: tuple[str, ...] = ()  # a sentence for each rung that was tried
    doubts: tuple[str, ...] = ()  # what speaks against the poses; they stand in `notes` too


@dataclass(frozen=True)
class ColmapPrior:
    """Structure from motion as a `MultiViewPrior`.

    Matching sees the photos at full size; cameras, depths and confidences come back at `work_size` (width, height), default the photos' own.
    `dense=False` gives the sparse points alone. All photos are taken by one camera without lens distortion (undistort them first).
    """

    work_size: tuple[int, int] | None = None
    dense: bool = True
    seed: int = 0
    name: str = field(default="structure from motion by pycolmap and OpenCV + plane sweep", init=False)

    def reconstruct(self, images: Sequence[Tensor], names: Sequence[str], K: Tensor | None = None) -> ColmapViews:
        """Raises `InvalidInput` where fewer than two photos register, with what was tried."""
        pycolmap = _pycolmap()
        check(len(images) >= 2, f"Structure from motion needs at least two photos, got {len(images)}.")
        check(len({tuple(im.shape) for im in images}) == 1, "The photos must have one size; crop or resize them first.")
        with tempfile.TemporaryDirectory() as scratch, _quiet(pycolmap):
            files = _write_photos(images, Path(scratch) / "photos")
            database = Path(scratch) / "matches.db"
            self._match(pycolmap, database, Path(scratch) / "photos", K)
            by_file = dict(zip(files, names, strict=True))

            def judge(model: Any) -> list[str]:
                return doubts(pycolmap, model, database, by_file, known=K is not None)

            found = climb(pycolmap, database, Path(scratch) / "photos", len(images), known=K is not None, seed=self.seed, judge=judge)  # fmt: skip
            if found.model is None:
                raise InvalidInput(f"Structure from motion placed none of the {len(images)} photos ({'; '.join(found.tried)}); take them closer together, with more texture in view.")  # fmt: skip
        return self._result(found, files, names, images)

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

    def _result(
        self, found: Climb, files: Sequence[str], names: Sequence[str], images: Sequence[Tensor]
    ) -> ColmapViews:
        model = found.model
        height, width = images[0].shape[:2]
        size = self.work_size or (width, height)
        by_file = {image.name: image for image in model.images.values() if image.has_pose}
        registered = tuple(k for k, file in enumerate(files) if file in by_file)
        cameras, ranges, tracks = [], [], []
        points = dict(model.points3D.items())
        for k in registered:
            image = by_file[files[k]]
            pose = torch.from_numpy(image.cam_from_world().matrix()).float()
            K = torch.from_numpy(image.camera.calibration_matrix()).float()
            camera = Camera(K, rigid(pose[:, :3], pose[:, 3]), width, height, names[k]).resized(*size)
            cameras.append(camera)
            seen = [(points[p.point3D_id].xyz, p.xy) for p in image.points2D if p.has_point3D()]
            xyz = torch.tensor(np.array([x for x, _ in seen]), dtype=torch.float32).reshape(-1, 3)
            pixels = torch.tensor(np.array([uv for _, uv in seen]), dtype=torch.float32).reshape(-1, 2)
            ranges.append(_depth_range(xyz @ pose[2, :3] + pose[2, 3]))
            tracks.append(pixels * torch.tensor([size[0] / width, size[1] / height]))
        xyz = torch.tensor(np.array([p.xyz for p in points.values()]), dtype=torch.float32).reshape(-1, 3)
        rgb = torch.tensor(np.array([p.color for p in points.values()]), dtype=torch.float32).reshape(-1, 3) / 255
        depths = conf = None
        if self.dense and len(cameras) >= 2:
            small = torch.stack([_resized(images[k], size) for k in registered])
            depths, conf = plane_sweep(small, cameras, ranges, tracks=tracks, disc=DISC * size[0] / width)
        notes = tuple(_notes(found, dict(zip(files, names, strict=True)), registered))
        return ColmapViews(tuple(cameras), registered, PointCloud(xyz, rgb), depths, conf, notes, found.rung, found.tried, found.doubts)  # fmt: skip


def _notes(found: Climb, names: Mapping[str, str], registered: Sequence[int]) -> Iterator[str]:
    """Photos without a place and the groups they form, the rung, the doubts."""
    missing = [name for k, name in enumerate(names.values()) if k not in registered]
    if missing:
        yield f"{len(missing)} photos found no place ({', '.join(missing)}); tried: {'; '.join(found.tried)}."
    if len(found.groups) > 1:
        listed = "; ".join(", ".join(names[file] for file in group) for group in found.groups)
        yield f"The photos fall into {len(found.groups)} groups that do not hang together ({listed}); the first is used."
    if found.rung > 1 and not missing:
        yield f"The poses needed the {RUNGS[found.rung - 1]} ({'; '.join(found.tried)})."
    yield from found.doubts


def _depth_range(z: Tensor) -> tuple[float, float]:  # [P]
    """From the 0.5th to the 99.5th percentile of the sparse depths, a tenth wider."""
    z = z[z > 0]
    if len(z) < 2:
        return 0.45, 11.0
    low, high = torch.quantile(z, z.new_tensor([0.005, 0.995])).tolist()
    return low * 0.9, high * 1.1


def _pycolmap() -> Any:
    """pycolmap, with OpenCV loaded beside it: loaded later, OpenCV would turn pycolmap's messages on again."""
    for module, package in (("cv2", "opencv-python-headless"), ("pycolmap", "pycolmap")):
        try:
            import_module(module)
        except ImportError as error:
            raise MissingExtra(package, "geometry") from error
    return import_module("pycolmap")


@contextmanager
def _quiet(pycolmap: Any) -> Iterator[None]:
    """No messages of the C++ side: what matters of them is in the result."""
    before = pycolmap.logging.minloglevel
    pycolmap.logging.minloglevel = 3
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
