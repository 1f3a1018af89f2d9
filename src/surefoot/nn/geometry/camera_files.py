"""Cameras as other programs store them: COLMAP (text and binary), nerfstudio's transforms.json, LLFF's poses_bounds.npy.

All convert to and from the house's convention (OpenCV axes, w2c, pixel centres at + 0.5; COLMAP shares it). Distorted cameras
are refused, never silently treated as pinholes: undistort the photos first.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from surefoot.errors import InvalidInput, check
from surefoot.nn.geometry.cameras import Camera
from surefoot.nn.geometry.ply import PointCloud
from surefoot.nn.geometry.rotations import invert_rigid, matrix_to_quaternion, quaternion_to_matrix, rigid

MODELS = {0: ("SIMPLE_PINHOLE", 3), 1: ("PINHOLE", 4), 2: ("SIMPLE_RADIAL", 4), 3: ("RADIAL", 5), 4: ("OPENCV", 8)}
FLIP = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))  # OpenGL axes <-> OpenCV axes


def save_colmap(
    folder: str | Path, cameras: Sequence[Camera], cloud: PointCloud | None = None, *, binary: bool = True
) -> None:
    """A COLMAP sparse model: one PINHOLE camera a photo, named by `Camera.name`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    points = np.zeros((0, 3)) if cloud is None else cloud.points.double().cpu().numpy()
    colours = (
        np.zeros((0, 3), np.uint8)
        if cloud is None
        else (cloud.rgb.cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    )
    intrinsics = [[float(v) for v in (c.K[0, 0], c.K[1, 1], c.K[0, 2], c.K[1, 2])] for c in cameras]
    poses = [(matrix_to_quaternion(c.w2c[:3, :3].double()).tolist(), c.w2c[:3, 3].double().tolist()) for c in cameras]
    names = [c.name or f"{i:05d}.png" for i, c in enumerate(cameras)]
    if not binary:
        _write_text(folder, cameras, intrinsics, poses, names, points, colours)
        return
    with (folder / "cameras.bin").open("wb") as file:
        file.write(struct.pack("<Q", len(cameras)))
        for i, (camera, values) in enumerate(zip(cameras, intrinsics, strict=True), 1):
            file.write(struct.pack("<iiQQ4d", i, 1, camera.width, camera.height, *values))
    with (folder / "images.bin").open("wb") as file:
        file.write(struct.pack("<Q", len(cameras)))
        for i, ((quat, t), name) in enumerate(zip(poses, names, strict=True), 1):
            file.write(struct.pack("<i7di", i, *quat, *t, i) + name.encode() + b"\0" + struct.pack("<Q", 0))
    with (folder / "points3D.bin").open("wb") as file:
        file.write(struct.pack("<Q", len(points)))
        for i, (point, colour) in enumerate(zip(points, colours, strict=True), 1):
            file.write(struct.pack("<Q3d3BdQ", i, *point, *colour, 0.0, 0))


def _write_text(folder: Path, cameras, intrinsics, poses, names, points, colours) -> None:
    lines = [f"{i} PINHOLE {c.width} {c.height} {' '.join(map(repr, v))}" for i, (c, v) in enumerate(zip(cameras, intrinsics, strict=True), 1)]  # fmt: skip
    (folder / "cameras.txt").write_text("\n".join(["# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]", *lines, ""]))
    lines = [
        f"{i} {' '.join(map(repr, [*q, *t]))} {i} {name}\n"
        for i, ((q, t), name) in enumerate(zip(poses, names, strict=True), 1)
    ]
    (folder / "images.txt").write_text(
        "\n".join(["# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME, then POINTS2D[]", *lines, ""])
    )
    lines = [f"{i} {' '.join(map(repr, p.tolist()))} {' '.join(map(str, c.tolist()))} 0" for i, (p, c) in enumerate(zip(points, colours, strict=True), 1)]  # fmt: skip
    (folder / "points3D.txt").write_text("\n".join(["# POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[]", *lines, ""]))


def load_colmap(folder: str | Path) -> tuple[list[Camera], PointCloud]:
    """Cameras (in the order of their names) and points of a COLMAP sparse model, .bin or .txt; float64 poses."""
    folder = Path(folder)
    try:
        if (folder / "cameras.bin").is_file():
            raw_cameras, images, points = _read_binary(folder)
        elif (folder / "cameras.txt").is_file():
            raw_cameras, images, points = _read_text(folder)
        else:
            raise InvalidInput(
                f"{folder} holds neither cameras.bin nor cameras.txt; name the folder of a sparse model."
            )
    except (struct.error, ValueError, IndexError, KeyError, OSError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{folder} is not a readable COLMAP model ({error}).") from error
    cameras = []
    for name, (quat, t, camera_id) in sorted(images.items()):
        check(camera_id in raw_cameras, f"{folder}: image {name} refers to camera {camera_id}, which is not there.")
        K, width, height = raw_cameras[camera_id]
        rotation = quaternion_to_matrix(torch.tensor(quat, dtype=torch.float64))
        cameras.append(Camera(K, rigid(rotation, torch.tensor(t, dtype=torch.float64)), width, height, name))
    xyz = torch.tensor([p[:3] for p in points], dtype=torch.float32).reshape(-1, 3)
    rgb = torch.tensor([p[3:] for p in points], dtype=torch.float32).reshape(-1, 3) / 255
    return cameras, PointCloud(xyz, rgb)


def _pinhole(model: str, values: Sequence[float], width: int, height: int) -> tuple[Tensor, int, int]:
    if model == "SIMPLE_PINHOLE":
        fx, fy, cx, cy = values[0], values[0], values[1], values[2]
    elif model == "PINHOLE":
        fx, fy, cx, cy = values[:4]
    elif model in ("SIMPLE_RADIAL", "RADIAL") and not any(values[3:]):
        fx, fy, cx, cy = values[0], values[0], values[1], values[2]
    elif model == "OPENCV" and not any(values[4:]):
        fx, fy, cx, cy = values[:4]
    else:
        raise InvalidInput(f"A camera of model {model} with lens distortion is not a pinhole; undistort the photos first (colmap image_undistorter).")  # fmt: skip
    return torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64), width, height


def _read_text(folder: Path):
    def rows(name: str) -> list[str]:
        return [line for line in (folder / name).read_text().splitlines() if not line.startswith("#")]

    cameras = {}
    for line in rows("cameras.txt"):
        if words := line.split():
            cameras[int(words[0])] = _pinhole(words[1], [float(w) for w in words[4:]], int(words[2]), int(words[3]))
    images = {}
    lines = rows("images.txt")
    for line in lines[0::2]:  # each image has two lines, the second its keypoints (often empty)
        if words := line.split(maxsplit=9):
            images[words[9].strip()] = ([float(w) for w in words[1:5]], [float(w) for w in words[5:8]], int(words[8]))
    path = folder / "points3D.txt"
    points = (
        [[float(w) for w in line.split()[1:7]] for line in rows("points3D.txt") if line.split()]
        if path.is_file()
        else []
    )
    return cameras, images, points


def _read_binary(folder: Path):
    def take(file: BinaryIO, layout: str) -> tuple:
        return struct.unpack("<" + layout, file.read(struct.calcsize("<" + layout)))

    cameras, images, points = {}, {}, []
    with (folder / "cameras.bin").open("rb") as file:
        for _ in range(take(file, "Q")[0]):
            number, model, width, height = take(file, "iiQQ")
            check(model in MODELS, f"{folder}: camera model number {model} is not supported; use a pinhole model.")
            name, count = MODELS[model]
            cameras[number] = _pinhole(name, take(file, f"{count}d"), width, height)
    with (folder / "images.bin").open("rb") as file:
        for _ in range(take(file, "Q")[0]):
            _, *pose, camera_id = take(file, "i7di")
            name = bytearray()
            while (byte := file.read(1)) not in (b"\0", b""):
                name += byte
            images[name.decode()] = (pose[:4], pose[4:], camera_id)
            file.seek(24 * take(file, "Q")[0], 1)
    if (folder / "points3D.bin").is_file():
        with (folder / "points3D.bin").open("rb") as file:
            for _ in range(take(file, "Q")[0]):
                _, *values = take(file, "Q3d3BdQ")
                points.append(values[:6])
                file.seek(8 * values[7], 1)
    return cameras, images, points


def save_nerfstudio(path: str | Path, cameras: Sequence[Camera], *, ply_file: str | None = None) -> None:
    """A transforms.json with per-frame intrinsics and camera-to-world poses in OpenGL axes."""
    frames = []
    for index, camera in enumerate(cameras):
        K, pose = camera.K.cpu().double(), invert_rigid(camera.w2c.cpu().double()) @ FLIP
        frames.append(
            {
                "file_path": camera.name or f"{index:05d}.png",
                "fl_x": float(K[0, 0]), "fl_y": float(K[1, 1]), "cx": float(K[0, 2]), "cy": float(K[1, 2]),
                "w": camera.width, "h": camera.height, "transform_matrix": pose.tolist(),
            }
        )  # fmt: skip
    content: dict[str, object] = {"camera_model": "OPENCV", "frames": frames}
    if ply_file is not None:
        content["ply_file_path"] = ply_file
    Path(path).write_text(json.dumps(content, indent=1))


def load_nerfstudio(path: str | Path) -> list[Camera]:
    """Cameras of a transforms.json; intrinsics stand globally or by frame, and an `applied_transform` is undone."""
    try:
        content = json.loads(Path(path).read_text())
        frames = content["frames"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{path} is not a transforms.json ({error}).") from error
    undo = torch.eye(4, dtype=torch.float64)
    if "applied_transform" in content:
        undo[:3] = torch.tensor(content["applied_transform"], dtype=torch.float64)[:3]
        undo = torch.linalg.inv(undo)
    cameras = []
    for frame in frames:
        values = {**content, **frame}
        lens = [k for k in ("k1", "k2", "k3", "k4", "p1", "p2") if values.get(k)]
        check(not lens, f"{path} has lens distortion ({', '.join(lens)}); undistort the photos first.")
        try:
            fx = float(values["fl_x"])
            fy, w, h = float(values.get("fl_y", fx)), int(values["w"]), int(values["h"])
            cx, cy = float(values.get("cx", w / 2)), float(values.get("cy", h / 2))
            c2w = undo @ torch.tensor(values["transform_matrix"], dtype=torch.float64).reshape(4, 4)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise InvalidInput(f"{path}: a frame lacks or misstates {error}.") from error
        K = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)
        cameras.append(Camera(K, invert_rigid(c2w @ FLIP), w, h, str(values.get("file_path", ""))))
    return cameras


def save_llff(path: str | Path, cameras: Sequence[Camera], near_far: Tensor) -> None:  # [N, 2]
    """poses_bounds.npy: 3 x 5 [R | t | (h, w, f)] with columns down, right, back, and the near and far bounds."""
    rows = []
    for camera, bounds in zip(cameras, near_far.cpu().double(), strict=True):
        c2w = invert_rigid(camera.w2c.cpu().double())
        right, down, forward, centre = c2w[:3, :4].unbind(1)
        size = torch.tensor([camera.height, camera.width, float(camera.K[0, 0])], dtype=torch.float64)
        rows.append(torch.cat([torch.stack([down, right, -forward, centre, size], 1).flatten(), bounds]))
    np.save(path, torch.stack(rows).numpy())


def load_llff(path: str | Path) -> tuple[list[Camera], Tensor]:  # near and far [N, 2]
    """Cameras of a poses_bounds.npy, with the principal point in the middle."""
    try:
        rows = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float64))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} is not a readable .npy ({error}).") from error
    check(rows.dim() == 2 and rows.shape[1] == 17, f"{path} must be [N, 17], got {list(rows.shape)}.")
    cameras = []
    for index, row in enumerate(rows[:, :15].unflatten(1, (3, 5))):
        down, right, back, centre, size = row.unbind(1)
        c2w = rigid(torch.stack([right, down, -back], 1), centre)
        height, width, focal = int(size[0]), int(size[1]), float(size[2])
        K = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], dtype=torch.float64)
        cameras.append(Camera(K, invert_rigid(c2w), width, height, f"{index:05d}"))
    return cameras, rows[:, 15:]
