"""Files that other programs read and write: round trips, layouts to the byte, and what is refused."""

from __future__ import annotations

import json
import math
import struct

import numpy as np
import pytest
import torch

from surefoot.errors import InvalidInput
from surefoot.nn.geometry.camera_files import (
    load_colmap,
    load_llff,
    load_nerfstudio,
    save_colmap,
    save_llff,
    save_nerfstudio,
)
from surefoot.nn.geometry.cameras import Camera, intrinsics, look_at
from surefoot.nn.geometry.ply import PointCloud, load_points, load_splats, read_vertices, save_points, save_splats
from surefoot.nn.geometry.rasterizer import rasterize
from surefoot.nn.geometry.splats import NAMES, GaussianScene

F64 = torch.float64


def scene_of(n=40, degree=3):
    g = torch.Generator().manual_seed(0)
    scene = GaussianScene.from_points(torch.rand(n, 3, generator=g) - 0.5, torch.rand(n, 3, generator=g), degree=degree)
    with torch.no_grad():
        scene.sh.add_(0.1 * torch.randn(scene.sh.shape, generator=g))
        scene.quats.add_(0.2 * torch.randn(n, 4, generator=g))
        scene.log_scales.add_(0.1 * torch.randn(n, 3, generator=g))
    scene.active_degree = degree
    return scene


def cameras_of(n=4):
    cameras = []
    for i in range(n):
        centre = torch.tensor([2 * math.cos(i + 0.2), 2 * math.sin(i + 0.2), 0.3 * i], dtype=F64)
        K = intrinsics(30.0 + i, 32, 24, F64)
        K[1, 1] += 0.5
        cameras.append(Camera(K, look_at(centre, torch.zeros(3, dtype=F64)), 32, 24, f"photo_{i}.png"))
    return cameras


def same_cameras(a, b, *, focal_only=False):
    assert [c.name for c in a] == [c.name for c in b]
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.w2c, y.w2c, atol=1e-12, rtol=0)
        assert (x.width, x.height) == (y.width, y.height)
        torch.testing.assert_close(x.K[0], y.K[0], atol=1e-12, rtol=0)
        if not focal_only:
            torch.testing.assert_close(x.K, y.K, atol=1e-12, rtol=0)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_splats_round_trip_and_render_the_same(tmp_path, degree):
    scene = scene_of(degree=degree)
    save_splats(scene, tmp_path / "scene.ply")
    again = load_splats(tmp_path / "scene.ply")
    for name in NAMES:
        assert torch.equal(getattr(again, name), getattr(scene, name)), name
    camera = cameras_of()[0].to(torch.float32)
    assert (rasterize(again, camera).rgb - rasterize(scene, camera).rgb).abs().max() <= 1e-6


def test_the_layout_that_viewers_expect(tmp_path):
    scene = scene_of(5)
    save_splats(scene, tmp_path / "scene.ply")
    data = (tmp_path / "scene.ply").read_bytes()
    header, body = data.split(b"end_header\n")
    names = [line.split()[2].decode() for line in header.split(b"\n") if line.startswith(b"property float")]
    expected = ["x", "y", "z", "nx", "ny", "nz", *(f"f_dc_{i}" for i in range(3)), *(f"f_rest_{i}" for i in range(45)), "opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]  # fmt: skip
    assert names == expected
    assert len(body) == 5 * 248
    row = struct.unpack("<62f", body[:248])
    assert row[9] == scene.sh[0, 1, 0]  # f_rest is channel-major: fifteen red coefficients first
    assert row[9 + 15] == scene.sh[0, 1, 1]
    assert row[54] == scene.logit_opacities[0]


def test_the_smoothing_filter_is_baked_in(tmp_path):
    scene, camera = scene_of(), cameras_of()[1].to(torch.float32)
    scene.update_filter([camera], strength=2.0)
    save_splats(scene, tmp_path / "scene.ply")
    again = load_splats(tmp_path / "scene.ply")
    assert again.filter_3d.abs().max() == 0
    assert (rasterize(again, camera).rgb - rasterize(scene, camera).rgb).abs().max() <= 1e-5


@pytest.mark.parametrize("layout", ["ascii", "binary_big_endian"])
def test_point_clouds(tmp_path, layout):
    cloud = PointCloud(torch.randn(7, 3), torch.rand(7, 3))
    save_points(cloud, tmp_path / "points.ply")
    again = load_points(tmp_path / "points.ply")
    assert torch.equal(again.points, cloud.points)
    assert (again.rgb - cloud.rgb).abs().max() <= 0.5 / 255 + 1e-6
    rows = read_vertices(tmp_path / "points.ply")
    header = f"ply\nformat {layout} 1.0\ncomment other\nelement vertex 7\nproperty double x\nproperty float y\nproperty float z\nelement face 0\nproperty list uchar int vertex_indices\nend_header\n"
    kind = np.dtype([("x", ">f8"), ("y", ">f4"), ("z", ">f4")])
    table = np.empty(7, kind)
    for axis in "xyz":
        table[axis] = rows[axis]
    body = (
        table.tobytes()
        if layout != "ascii"
        else "\n".join(
            f"{r['x']!r} {r['y']} {r['z']}".replace("np.float64(", "").replace(")", "") for r in table
        ).encode()
    )
    (tmp_path / "other.ply").write_bytes(header.encode() + body)
    torch.testing.assert_close(load_points(tmp_path / "other.ply").points, cloud.points)


def test_broken_plys_are_one_sentence(tmp_path):
    save_splats(scene_of(5), tmp_path / "good.ply")
    good = (tmp_path / "good.ply").read_bytes()
    cases = {
        "cut short": good[:-100],
        "not a .ply": b"solid " + good[:50],
        "f_rest properties": good.replace(b"property float f_rest_44\n", b"property float other\n"),
        "lacks opacity": good.replace(b"property float opacity\n", b"property float opaque\n"),
        "malformed": good.replace(b"binary_little_endian", b"binary_middle_endian"),
        "NaN": good.split(b"end_header\n")[0] + b"end_header\n" + np.full(5 * 62, np.nan, "<f4").tobytes(),
    }
    for words, content in cases.items():
        (tmp_path / "bad.ply").write_bytes(content)
        with pytest.raises(InvalidInput, match=words):
            load_splats(tmp_path / "bad.ply")
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_splats(tmp_path / "absent.ply")


@pytest.mark.parametrize("binary", [True, False])
def test_colmap(tmp_path, binary):
    cameras, cloud = cameras_of(), PointCloud(torch.randn(6, 3), torch.rand(6, 3))
    save_colmap(tmp_path, cameras, cloud, binary=binary)
    again, points = load_colmap(tmp_path)
    same_cameras(again, cameras)
    torch.testing.assert_close(points.points, cloud.points)
    assert (points.rgb - cloud.rgb).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("binary", [True, False])
def test_colmap_itself_reads_and_writes_the_same(tmp_path, binary):
    pycolmap = pytest.importorskip("pycolmap")
    cameras, cloud = cameras_of(), PointCloud(torch.randn(6, 3), torch.rand(6, 3))
    save_colmap(tmp_path, cameras, cloud, binary=binary)
    model = pycolmap.Reconstruction(str(tmp_path))
    by_name = {image.name: image for image in model.images.values()}
    for camera in cameras:
        pose = by_name[camera.name].cam_from_world()
        np.testing.assert_allclose(pose.matrix(), camera.w2c[:3].numpy(), atol=1e-9)
        np.testing.assert_allclose(by_name[camera.name].camera.calibration_matrix(), camera.K.numpy())
    (tmp_path / "theirs").mkdir()
    (model.write_binary if binary else model.write_text)(str(tmp_path / "theirs"))
    again, points = load_colmap(tmp_path / "theirs")
    same_cameras(again, cameras)
    assert len(points.points) == 6


def test_distortion_is_refused(tmp_path):
    save_colmap(tmp_path, cameras_of(1), binary=False)
    text = (tmp_path / "cameras.txt").read_text()
    (tmp_path / "cameras.txt").write_text(text.replace("PINHOLE 32 24", "OPENCV 32 24").rstrip() + " 0.1 0 0 0\n")
    with pytest.raises(InvalidInput, match="undistort"):
        load_colmap(tmp_path)
    (tmp_path / "cameras.txt").write_text(text.replace("PINHOLE 32 24", "OPENCV 32 24").rstrip() + " 0 0 0 0\n")
    same_cameras(load_colmap(tmp_path)[0], cameras_of(1))
    (tmp_path / "cameras.txt").write_text("1 PINHOLE 32\n")
    with pytest.raises(InvalidInput, match="not a readable COLMAP"):
        load_colmap(tmp_path)
    with pytest.raises(InvalidInput, match="neither"):
        load_colmap(tmp_path / "absent")


def test_nerfstudio(tmp_path):
    cameras = cameras_of()
    path = tmp_path / "transforms.json"
    save_nerfstudio(path, cameras)
    same_cameras(load_nerfstudio(path), cameras)
    content = json.loads(path.read_text())
    c2w = torch.tensor(content["frames"][0]["transform_matrix"], dtype=F64)
    assert (c2w[:3, 2] @ c2w[:3, 3]).item() > 0  # OpenGL cameras look along -z, here at the origin
    moved = torch.tensor([[0.0, 1, 0, 2], [-1, 0, 0, 0], [0, 0, 1, -3]], dtype=F64)  # what nerfstudio did to the poses
    full = torch.cat([moved, torch.tensor([[0.0, 0, 0, 1]], dtype=F64)])
    for frame in content["frames"]:
        frame["transform_matrix"] = (full @ torch.tensor(frame["transform_matrix"], dtype=F64)).tolist()
    path.write_text(json.dumps(content | {"applied_transform": moved.tolist()}))
    same_cameras(load_nerfstudio(path), cameras)
    path.write_text(json.dumps(content | {"k1": 0.1}))
    with pytest.raises(InvalidInput, match="distortion"):
        load_nerfstudio(path)
    path.write_text("{}")
    with pytest.raises(InvalidInput, match="frames"):
        load_nerfstudio(path)


def test_llff(tmp_path):
    cameras = [Camera(intrinsics(40.0, 32, 24, F64), c.w2c, 32, 24, f"{i:05d}") for i, c in enumerate(cameras_of())]
    bounds = torch.tensor([[0.5, 9.0]] * 4, dtype=F64)
    save_llff(tmp_path / "poses_bounds.npy", cameras, bounds)
    assert np.load(tmp_path / "poses_bounds.npy").shape == (4, 17)
    again, near_far = load_llff(tmp_path / "poses_bounds.npy")
    same_cameras(again, cameras)
    torch.testing.assert_close(near_far, bounds)
    np.save(tmp_path / "poses_bounds.npy", np.zeros((4, 12)))
    with pytest.raises(InvalidInput, match="17"):
        load_llff(tmp_path / "poses_bounds.npy")
