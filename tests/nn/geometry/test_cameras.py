"""Cameras, rotations, alignment and harmonics."""

from __future__ import annotations

import math

import pytest
import torch

from surefoot.errors import InvalidInput
from surefoot.nn.geometry.alignment import kabsch, pose_errors, umeyama
from surefoot.nn.geometry.cameras import (
    Camera,
    back_project,
    focal_of,
    interpolate,
    intrinsics,
    look_at,
    project,
    scene_extent,
    transform,
)
from surefoot.nn.geometry.harmonics import sh_basis, sh_colours, sh_from_rgb
from surefoot.nn.geometry.rotations import (
    invert_rigid,
    matrix_to_quaternion,
    quaternion_to_matrix,
    rigid,
    rotation_angle,
    se3_exp,
    slerp,
    so3_exp,
)

F64 = torch.float64


def random_rotations(n, seed=0):
    return quaternion_to_matrix(torch.randn(n, 4, dtype=F64, generator=torch.Generator().manual_seed(seed)))


def ring(angles, radius=1.0, height=0.0, size=32):
    cameras = []
    for i, angle in enumerate(angles):
        centre = torch.tensor([radius * math.cos(angle), radius * math.sin(angle), height], dtype=F64)
        cameras.append(Camera(intrinsics(focal_of(55, size), size, size, F64), look_at(centre, torch.zeros(3, dtype=F64)), size, size, f"{i:02d}"))  # fmt: skip
    return cameras


def test_quaternions_and_matrices_are_inverse():
    quats = torch.nn.functional.normalize(
        torch.randn(200, 4, dtype=F64, generator=torch.Generator().manual_seed(1)), dim=1
    )
    quats = torch.where(quats[:, :1] < 0, -quats, quats)
    quats = torch.cat([quats, torch.eye(4, dtype=F64)])  # half turns included
    rotation = quaternion_to_matrix(quats)
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3, dtype=F64).expand_as(rotation), atol=1e-12, rtol=0)
    torch.testing.assert_close(quaternion_to_matrix(matrix_to_quaternion(rotation)), rotation, atol=1e-12, rtol=0)
    torch.testing.assert_close(matrix_to_quaternion(rotation[:200]), quats[:200], atol=1e-12, rtol=0)


def test_exponential_maps():
    omega = torch.tensor([[0.0, 0.0, math.pi / 2], [1e-9, 0, 0], [0.3, -0.2, 0.9]], dtype=F64)
    generator = torch.zeros(3, 3, 3, dtype=F64)
    for i, (x, y, z) in enumerate(omega.tolist()):
        generator[i] = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=F64)
    torch.testing.assert_close(so3_exp(omega), torch.linalg.matrix_exp(generator), atol=1e-12, rtol=0)
    xi = torch.tensor([[0.4, -0.3, 0.2, 1.0, 2.0, -1.0]], dtype=F64)
    twist = torch.zeros(1, 4, 4, dtype=F64)
    twist[0, :3, :3] = torch.tensor([[0, -0.2, -0.3], [0.2, 0, -0.4], [0.3, 0.4, 0]], dtype=F64)
    twist[0, :3, 3] = xi[0, 3:]
    torch.testing.assert_close(se3_exp(xi), torch.linalg.matrix_exp(twist), atol=1e-12, rtol=0)
    zero = torch.zeros(6, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(se3_exp, (zero,))


def test_small_angles_are_seen():
    """acos of the trace cannot tell 0.001 degrees in float32; the chord can, in float64."""
    angle = math.radians(1e-3)
    turned = so3_exp(torch.tensor([0.0, 0.0, angle], dtype=F64))
    assert rotation_angle(turned, torch.eye(3, dtype=F64)).item() == pytest.approx(1e-3, rel=1e-6)
    assert rotation_angle(so3_exp(torch.tensor([0, math.pi, 0], dtype=F64)), torch.eye(3)).item() == pytest.approx(180)


def test_slerp_goes_half_way_on_the_shorter_arc():
    a = torch.tensor([1.0, 0, 0, 0], dtype=F64)
    b = -torch.tensor([math.cos(0.6), math.sin(0.6), 0, 0], dtype=F64)  # the same rotation by the other sign
    torch.testing.assert_close(
        slerp(a, b, 0.5), torch.tensor([math.cos(0.3), math.sin(0.3), 0, 0], dtype=F64), atol=1e-12, rtol=0
    )


def test_projection_and_its_inverse():
    camera = ring([0.3], radius=2.5, height=0.6)[0]
    depth = 1 + torch.rand(32, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
    points = back_project(depth, camera.K, camera.w2c).reshape(-1, 3)
    uv, z = project(points, camera)
    torch.testing.assert_close(z, depth.flatten(), atol=1e-12, rtol=0)
    assert uv[0].tolist() == pytest.approx([0.5, 0.5])  # pixel centres stand at + 0.5
    assert uv[-1].tolist() == pytest.approx([31.5, 31.5])
    middle, _ = project(torch.zeros(1, 3, dtype=F64), camera)
    assert middle[0].tolist() == pytest.approx([16, 16])


def test_look_at_has_up_upwards():
    camera = ring([0.0], radius=2.0)[0]
    up, _ = project(torch.tensor([[0.0, 0.0, 0.5]], dtype=F64), camera)
    assert up[0, 1] < 16  # y points down in the image
    torch.testing.assert_close(camera.centre, torch.tensor([2.0, 0, 0], dtype=F64))
    with pytest.raises(InvalidInput, match="up"):
        look_at(torch.tensor([0.0, 0, 1]), torch.zeros(3))


def test_transform_of_batches():
    motions = se3_exp(torch.randn(3, 6, dtype=F64, generator=torch.Generator().manual_seed(2)))
    points = torch.randn(3, 4, 5, 3, dtype=F64, generator=torch.Generator().manual_seed(3))
    moved = transform(motions, points)
    expected = motions[1, :3, :3] @ points[1, 2, 3] + motions[1, :3, 3]
    torch.testing.assert_close(moved[1, 2, 3], expected)
    torch.testing.assert_close(transform(invert_rigid(motions), moved), points)


def test_virtual_views_interpolate_centres_not_translations():
    a, b = ring([0.0, math.pi / 2], radius=2.0)
    half = interpolate(a, b, 0.5)
    torch.testing.assert_close(half.centre, (a.centre + b.centre) / 2, atol=1e-6, rtol=0)
    assert rotation_angle(half.w2c[:3, :3], a.w2c[:3, :3]).item() == pytest.approx(45, abs=1e-6)
    rotation = half.w2c[:3, :3]
    naive = -(rotation.mT @ torch.lerp(a.w2c[:3, 3], b.w2c[:3, 3], 0.5))
    assert (naive - (a.centre + b.centre) / 2).norm() > 0.1  # mixing translations puts the camera elsewhere


def test_opposite_cameras_warn_and_turn_right():
    a, b = ring([0.0, math.pi], radius=2.0)
    with pytest.warns(UserWarning, match="opposite ways"):
        path = [interpolate(a, b, t) for t in (0.0, 0.25, 0.5, 1.0)]
    torch.testing.assert_close(path[0].w2c, a.w2c, atol=1e-6, rtol=0)
    torch.testing.assert_close(path[3].w2c, b.w2c, atol=1e-6, rtol=0)
    for camera, degrees in zip(path, (0, 45, 90, 180), strict=True):
        assert rotation_angle(camera.w2c[:3, :3], a.w2c[:3, :3]).item() == pytest.approx(degrees, abs=1e-4)
    right = a.w2c[:3, :3].mT @ torch.tensor([1.0, 0.0, 0.0], dtype=a.w2c.dtype)
    looks = path[2].w2c[:3, :3].mT @ torch.tensor([0.0, 0.0, 1.0], dtype=a.w2c.dtype)
    assert (right @ looks).item() > 0.5


def test_resized_keeps_the_view():
    camera = ring([0.4], radius=2.0)[0]
    point = torch.tensor([[0.2, 0.1, 0.3]], dtype=F64)
    torch.testing.assert_close(project(point, camera.resized(64, 64))[0], 2 * project(point, camera)[0])


def test_extent():
    assert scene_extent(torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 2, 0], [0, -2, 0]])) == pytest.approx(2.2)


def test_bad_cameras():
    camera = ring([0.0])[0]
    mirrored = camera.w2c.clone()
    mirrored[0] *= -1
    with pytest.raises(InvalidInput, match="determinant"):
        camera.posed(mirrored).checked()
    with pytest.raises(InvalidInput, match="K must be"):
        Camera(torch.eye(4), camera.w2c, 8, 8)


def test_alignment_recovers_a_similarity():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(4, 20, 3, dtype=F64, generator=g)
    rotation, scale = random_rotations(4, 5), torch.tensor([0.5, 1.0, 2.0, 30.0], dtype=F64)
    t = torch.randn(4, 3, dtype=F64, generator=g)
    b = scale[:, None, None] * (a @ rotation.mT) + t[:, None]
    fit = umeyama(a, b)
    torch.testing.assert_close(fit.scale, scale)
    torch.testing.assert_close(fit.rotation, rotation)
    torch.testing.assert_close(fit.translation, t)
    torch.testing.assert_close(fit.inverse().apply(b), a)
    torch.testing.assert_close(kabsch(a, a @ rotation.mT).rotation, rotation)
    # Points of weight zero do not count; a mirrored set still gets a rotation.
    spoiled, weights = b.clone(), torch.ones(4, 20, dtype=F64)
    spoiled[:, 0], weights[:, 0] = 100.0, 0.0
    torch.testing.assert_close(umeyama(a, spoiled, weights).rotation, rotation)
    assert torch.linalg.det(kabsch(a, a * torch.tensor([1.0, 1, -1], dtype=F64)).rotation).min() > 0.999


def test_degenerate_alignment_is_refused():
    line = torch.linspace(0, 1, 5, dtype=F64)[:, None] * torch.tensor([1.0, 2, 3], dtype=F64)
    for points in (line, torch.ones(5, 3, dtype=F64), line[:2]):
        with pytest.raises(InvalidInput, match="undefined"):
            umeyama(points, points)


def test_pose_errors_are_free_of_the_gauge():
    true = ring([0.0, 0.8, 1.9, 3.0, 4.2], radius=2.5, height=0.4)
    g = torch.Generator().manual_seed(0)
    motion = umeyama(torch.randn(9, 3, dtype=F64, generator=g), torch.randn(9, 3, dtype=F64, generator=g))
    errors = pose_errors([motion.camera(c) for c in true], true)
    assert errors.rotation_degrees.max() < 1e-5
    assert errors.ate < 1e-9
    turned = [
        c.posed(rigid(so3_exp(torch.tensor([0.0, 0.0, 0.01], dtype=F64)), torch.zeros(3, dtype=F64)) @ c.w2c)
        for c in true
    ]
    errors = pose_errors(turned, true)
    torch.testing.assert_close(
        errors.rotation_degrees, torch.full((5,), math.degrees(0.01), dtype=F64), atol=1e-6, rtol=0
    )


def test_harmonics_are_orthonormal():
    """Over the sphere, by a quadrature that is exact for their degree."""
    nodes, weights = torch.linalg.eigh(torch.diag(torch.arange(1, 8, dtype=F64) / torch.sqrt(4 * torch.arange(1, 8, dtype=F64) ** 2 - 1), 1), UPLO="U")  # fmt: skip
    weights = 2 * weights[0] ** 2
    phi = torch.arange(16, dtype=F64) * (2 * math.pi / 16)
    sine = (1 - nodes**2).sqrt()
    points = torch.stack(
        [sine[:, None] * phi.cos(), sine[:, None] * phi.sin(), nodes[:, None].expand(-1, 16)], -1
    ).reshape(-1, 3)
    measure = (weights[:, None] * (2 * math.pi / 16)).expand(-1, 16).reshape(-1)
    basis = sh_basis(points, 3)
    torch.testing.assert_close(basis.mT @ (measure[:, None] * basis), torch.eye(16, dtype=F64), atol=1e-9, rtol=0)


def test_harmonics_by_hand():
    rgb = torch.tensor([0.2, 0.5, 0.9], dtype=F64)
    torch.testing.assert_close(sh_from_rgb(rgb), torch.tensor([-1.06347, 0, 1.41796], dtype=F64), atol=1e-5, rtol=0)
    sh = sh_from_rgb(rgb)[None, None]
    direction = torch.tensor([[0.0, 0, 1]], dtype=F64)
    torch.testing.assert_close(sh_colours(sh, direction)[0], rgb)
    dark = torch.full((1, 1, 3), -5.0, dtype=F64, requires_grad=True)
    sh_colours(dark, direction).sum().backward()
    assert dark.grad is not None
    assert dark.grad.abs().max() == 0  # clamped: no gradient
    first = sh_basis(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=F64), 1)[:, 1:]
    torch.testing.assert_close(
        first, 0.4886025119029199 * torch.tensor([[0, 0, -1.0], [-1, 0, 0], [0, 1, 0]], dtype=F64)
    )
