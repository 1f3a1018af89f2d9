"""The tile rasteriser: worked numbers, the dense formula beside it, finite differences, and independence of the tiling."""

from __future__ import annotations

import math

import pytest
import torch

from surefoot.errors import InvalidInput
from surefoot.nn.geometry.cameras import Camera, focal_of, intrinsics, look_at
from surefoot.nn.geometry.dense import rasterize_dense
from surefoot.nn.geometry.rasterizer import depth_normals, project_splats, rasterize
from surefoot.nn.geometry.rotations import se3_exp
from surefoot.nn.geometry.splats import GaussianScene, Splats

F64 = torch.float64


def splats_of(n, seed=0, degree=1, dtype=F64, opacity=(0.05, 0.95), scale=(0.03, 0.3), spread=1.0):
    g = torch.Generator().manual_seed(seed)
    u = lambda *s: torch.rand(*s, generator=g, dtype=F64)  # noqa: E731
    means = (u(n, 3) * 2 - 1) * spread
    scales = scale[0] + (scale[1] - scale[0]) * u(n, 3)
    opacities = opacity[0] + (opacity[1] - opacity[0]) * u(n)
    sh = torch.randn(n, (degree + 1) ** 2, 3, generator=g, dtype=F64) * 0.4
    return Splats(*(t.to(dtype) for t in (means, scales, torch.randn(n, 4, generator=g, dtype=F64), opacities, sh)))


def camera_of(width=24, height=20, dtype=F64, distance=2.6):
    centre = torch.tensor([0.3, -distance, 0.5], dtype=dtype)
    return Camera(
        intrinsics(focal_of(60, width), width, height, dtype),
        look_at(centre, torch.zeros(3, dtype=dtype)),
        width,
        height,
    )


def test_one_splat_by_hand():
    half = math.radians(30) / 2
    splats = Splats(
        torch.tensor([[0.5, -0.25, 4.0]], dtype=F64),
        torch.tensor([[0.1, 0.2, 0.3]], dtype=F64),
        torch.tensor([[math.cos(half), 0.0, 0.0, math.sin(half)]], dtype=F64),
        torch.tensor([0.8], dtype=F64),
        torch.zeros(1, 1, 3, dtype=F64),
    )
    camera = Camera(intrinsics(100.0, 64, 64, F64), torch.eye(4, dtype=F64), 64, 64)
    flat = project_splats(splats, camera)
    assert flat.means2d[0].tolist() == [44.5, 25.75]
    torch.testing.assert_close(
        flat.conic[0], torch.tensor([0.1162741, 0.04776854, 0.06762716], dtype=F64), atol=1e-7, rtol=0
    )
    assert flat.radii[0] == 16
    covariance = torch.linalg.inv(flat.conic[0, [0, 1, 1, 2]].reshape(2, 2)) - 0.3 * torch.eye(2, dtype=F64)
    torch.testing.assert_close(covariance, torch.tensor([[11.81640625, -8.55844129], [-8.55844129, 20.53222656]], dtype=F64), atol=1e-7, rtol=0)  # fmt: skip
    shifted = Camera(camera.K + torch.tensor([[0, 0, 0.0], [0, 0, 0.75], [0, 0, 0]], dtype=F64), camera.w2c, 64, 64)
    alpha = rasterize(splats, shifted).alpha
    assert alpha[25, 46].item() == pytest.approx(0.67437547, abs=1e-8)  # d = (2, -1)


def test_two_layers_by_hand():
    """Two layers that cover the pixel with alpha .6 and .5."""
    wide = torch.full((2, 3), 1e3, dtype=F64)
    flat = torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, 4.0]], dtype=F64)
    sh = ((torch.tensor([1.0, 0.5], dtype=F64) - 0.5) / 0.28209479177387814)[:, None, None].expand(2, 1, 3)
    opacity = torch.tensor([0.6, 0.5], dtype=F64, requires_grad=True)
    splats = Splats(flat, wide, torch.tensor([[1.0, 0, 0, 0]] * 2, dtype=F64), opacity, sh)
    camera = Camera(intrinsics(4.0, 4, 4, F64), torch.eye(4, dtype=F64), 4, 4)
    out = rasterize(splats, camera, torch.full((3,), 0.2, dtype=F64))
    assert out.rgb[2, 2].tolist() == pytest.approx([0.74] * 3, abs=1e-6)
    assert out.alpha[2, 2].item() == pytest.approx(0.8, abs=1e-6)
    assert out.depth[2, 2].item() == pytest.approx(2.0, abs=1e-5)
    assert out.expected_depth[2, 2].item() == pytest.approx(2.5, abs=1e-5)
    assert out.median_depth[2, 2].item() == 2.0
    (slope,) = torch.autograd.grad(out.rgb[2, 2, 0], opacity)
    assert slope.tolist() == pytest.approx([0.65, 0.12], abs=1e-5)


@pytest.mark.parametrize("normals", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_dense_formula_with_its_gradients(seed, normals):
    camera, background = camera_of(), torch.tensor([0.2, 0.5, 0.9], dtype=F64, requires_grad=True)
    leaves = [t.clone().requires_grad_() for t in splats_of(120, seed, degree=2)]
    twist = torch.zeros(6, dtype=F64, requires_grad=True)
    K = camera.K.clone().requires_grad_()
    posed = Camera(K, se3_exp(twist) @ camera.w2c, camera.width, camera.height)
    weights = torch.randn(camera.height, camera.width, 8, dtype=F64, generator=torch.Generator().manual_seed(seed))
    fast = rasterize(Splats(*leaves), posed, background, normals=normals, tile=8)
    rgb, alpha, image = rasterize_dense(Splats(*leaves), posed, background, 2, normals=normals, tile=8)
    torch.testing.assert_close(fast.rgb, rgb, atol=1e-12, rtol=0)
    torch.testing.assert_close(fast.alpha, alpha, atol=1e-12, rtol=0)
    torch.testing.assert_close(fast.depth, image[..., 3], atol=1e-12, rtol=0)
    inputs = [*leaves, twist, K, background]

    def loss(rgb, alpha, depth):
        return (rgb * weights[..., :3]).sum() + (alpha * weights[..., 3]).sum() + (depth * weights[..., 4]).sum()

    ours = torch.autograd.grad(loss(fast.rgb, fast.alpha, fast.depth), inputs, retain_graph=True)
    dense = torch.autograd.grad(loss(rgb, alpha, image[..., 3]), inputs)
    for mine, theirs in zip(ours, dense, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("seed", range(2))
def test_gradients_match_finite_differences(seed):
    """All eight inputs at once; opacities are moderate so that no pixel stands at a cut."""
    camera = camera_of(12, 10)
    raw = splats_of(5, seed, degree=1, opacity=(0.3, 0.7), scale=(0.5, 0.9), spread=0.4)
    sh = raw.sh * 0.3 + torch.tensor([0.5, 0, 0, 0], dtype=F64)[:, None]
    leaves = [t.clone().requires_grad_() for t in raw._replace(sh=sh)]
    twist, K = torch.zeros(6, dtype=F64, requires_grad=True), camera.K.clone().requires_grad_()
    background = torch.tensor([0.1, 0.4, 0.8], dtype=F64, requires_grad=True)

    def render(means, scales, quats, opacities, sh, twist, K, background):
        posed = Camera(K, se3_exp(twist) @ camera.w2c, 12, 10)
        out = rasterize(Splats(means, scales, quats, opacities, sh), posed, background, tile=16)
        return out.rgb, out.alpha, out.depth

    assert torch.autograd.gradcheck(render, (*leaves, twist, K, background), eps=1e-6, atol=1e-5, rtol=1e-5)


def test_tiles_do_not_matter_at_low_opacity():
    splats, camera = splats_of(200, 3, opacity=(0.02, 0.1)), camera_of(40, 33)
    images = [rasterize(splats, camera, tile=tile).rgb for tile in (8, 16, 64)]
    for image in images[1:]:
        torch.testing.assert_close(image, images[0], atol=1e-12, rtol=0)


def test_float32_is_near_float64():
    splats, camera = splats_of(800, 4, scale=(0.02, 0.1)), camera_of(48, 48)
    exact = rasterize(splats, camera).rgb
    single = rasterize(Splats(*(t.float() for t in splats)), camera.to(torch.float32)).rgb.double()
    error = (exact - single).abs().flatten()
    assert error.mean() < 2e-6
    assert error.quantile(0.99) < 2e-5
    assert error.max() < 0.01  # single pixels where an alpha crosses 1/255


def test_depth_order_and_the_early_end():
    """A hundred opaque layers: only the nearest show, and what is behind gets no gradient."""
    n = 100
    means = torch.zeros(n, 3, dtype=F64)
    means[:, 2] = torch.linspace(2, 6, n, dtype=F64)
    colours = torch.linspace(0, 1, n, dtype=F64)
    splats = Splats(means, torch.full((n, 3), 50.0, dtype=F64), torch.tensor([[1.0, 0, 0, 0]] * n, dtype=F64), torch.full((n,), 0.95, dtype=F64), ((colours - 0.5) / 0.28209479177387814)[:, None, None].expand(n, 1, 3))  # fmt: skip
    perm = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    shuffled = Splats(*(t[perm].requires_grad_() for t in splats))
    camera = Camera(intrinsics(8.0, 8, 8, F64), torch.eye(4, dtype=F64), 8, 8)
    out = rasterize(shuffled, camera)
    t = 0.05 ** torch.arange(4, dtype=F64)  # the fourth would bring T to 6e-6 and is not added
    assert out.rgb[4, 4, 0].item() == pytest.approx(float((0.95 * t[:3] * colours[:3]).sum()), abs=1e-3)
    assert out.alpha[4, 4].item() == pytest.approx(1 - 0.05**3, abs=1e-4)
    out.rgb.sum().backward()
    assert shuffled.opacities.grad is not None
    assert int((shuffled.opacities.grad != 0).sum()) == 3


def test_nothing_in_view_is_the_background():
    splats = splats_of(10)
    behind = splats._replace(means=splats.means - torch.tensor([0.0, 50.0, 0.0], dtype=F64))
    out = rasterize(behind, camera_of(), torch.tensor([0.1, 0.2, 0.3], dtype=F64))
    assert torch.equal(out.rgb, torch.tensor([0.1, 0.2, 0.3], dtype=F64).expand_as(out.rgb))
    assert not out.visible.any()
    assert out.alpha.abs().max() == 0


def test_means2d_keep_their_gradient():
    scene = GaussianScene.from_points(torch.rand(50, 3) - 0.5, torch.rand(50, 3))
    out = rasterize(scene, camera_of(dtype=torch.float32))
    out.rgb.mean().backward()
    assert out.means2d.grad is not None
    assert out.means2d.grad[out.visible].abs().sum() > 0


def test_normals_face_the_camera_and_agree_with_the_depth():
    """A wall of flat splats, facing the camera at a slant."""
    line = torch.linspace(-2, 2, 60, dtype=F64)
    x, y = (t.flatten() for t in torch.meshgrid(line, line, indexing="xy"))
    means = torch.stack([x, y, 4 + 0.5 * x], 1)
    tilt = math.atan(0.5)
    quat = torch.tensor([math.cos(tilt / 2), 0.0, -math.sin(tilt / 2), 0.0], dtype=F64)
    n = len(means)
    splats = Splats(means, torch.tensor([0.08, 0.08, 0.001], dtype=F64).expand(n, 3), quat.expand(n, 4), torch.full((n,), 0.9, dtype=F64), torch.zeros(n, 1, 3, dtype=F64))  # fmt: skip
    camera = Camera(intrinsics(40.0, 32, 32, F64), torch.eye(4, dtype=F64), 32, 32)
    out = rasterize(splats, camera, normals=True)
    expected = torch.nn.functional.normalize(torch.tensor([0.5, 0.0, -1.0], dtype=F64), dim=0)
    assert out.normal is not None
    assert (out.normal[16, 16] @ expected).item() > 0.999
    from_depth, defined = depth_normals(out.expected_depth, out.alpha, camera)
    assert defined[16, 16]
    assert not defined[0].any()
    assert (from_depth[16, 16] @ expected).item() > 0.99


def test_bad_requests():
    splats, camera = splats_of(5), camera_of()
    with pytest.raises(InvalidInput, match="backend"):
        rasterize(splats, camera, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="CUDA device"):
        rasterize(splats, camera, backend="gsplat")
    with pytest.raises(InvalidInput, match="near"):
        rasterize(splats, camera, near=0.0)
