"""gsplat's kernels behind `rasterize`: the picture and the gradients of the torch backend, and what it cannot do said in one sentence."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from surefoot.errors import InvalidInput
from surefoot.nn.geometry.cameras import Camera, focal_of, intrinsics, look_at
from surefoot.nn.geometry.densification import DensificationStrategy
from surefoot.nn.geometry.rasterizer import rasterize
from surefoot.nn.geometry.rotations import se3_exp
from surefoot.nn.geometry.splats import GaussianScene, Splats

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("gsplat") is None, reason="needs gsplat and a CUDA device"
)
WIDTH, HEIGHT = 96, 72


def splats_of(n: int = 2000, seed: int = 0, *, most: float = 0.9) -> Splats:
    """Splats that a pixel's 3 standard deviations hold: faint enough that gsplat's longer reach adds nothing above 1/255 (opacity below 0.35)
    or, with `most` 0.9, as they come."""
    g = torch.Generator().manual_seed(seed)
    means = torch.rand(n, 3, generator=g) * 2 - 1
    scales = 0.02 + 0.06 * torch.rand(n, 3, generator=g)
    opacities = 0.05 + (most - 0.05) * torch.rand(n, generator=g)
    sh = torch.randn(n, 9, 3, generator=g) * 0.3
    parts = (means, scales, torch.randn(n, 4, generator=g), opacities, sh)
    return Splats(*(t.cuda() for t in parts))


def camera_of() -> Camera:
    pose = look_at(torch.tensor([0.3, -2.6, 0.5]), torch.zeros(3))
    return Camera(intrinsics(focal_of(60, WIDTH), WIDTH, HEIGHT), pose, WIDTH, HEIGHT).to("cuda")


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_the_picture_is_that_of_the_torch_backend(degree):
    splats, camera, background = splats_of(most=0.34), camera_of(), torch.tensor([0.2, 0.5, 0.9], device="cuda")
    ours = rasterize(splats, camera, background, sh_degree=degree, normals=True, backend="torch")
    theirs = rasterize(splats, camera, background, sh_degree=degree, normals=True, backend="gsplat")
    for name, mean, most in (("rgb", 2e-4, 2e-2), ("alpha", 2e-4, 2e-2), ("depth", 1e-3, 6e-2)):
        gap = (getattr(ours, name) - getattr(theirs, name)).abs()
        assert gap.mean() < mean, name
        assert gap.max() < most, name  # a pixel in which one alpha crosses 1/255
    covered = ours.alpha > 0.5
    assert ours.normal is not None and theirs.normal is not None
    assert (ours.normal * theirs.normal).sum(-1)[covered].median() > 0.999
    torch.testing.assert_close(ours.expected_depth[covered], theirs.expected_depth[covered], rtol=1e-2, atol=0)
    assert torch.equal(theirs.median_depth[covered], theirs.expected_depth[covered])


def gradients(backend: str, splats: Splats, camera: Camera) -> dict[str, torch.Tensor]:
    leaves = {name: t.clone().requires_grad_() for name, t in splats._asdict().items()}
    twist = torch.zeros(6, device="cuda", requires_grad=True)
    background = torch.tensor([0.2, 0.5, 0.9], device="cuda", requires_grad=True)
    posed = camera.posed(se3_exp(twist) @ camera.w2c)
    out = rasterize(Splats(**leaves), posed, background, normals=True, backend=backend)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(1)
    rgb, alpha, depth = (torch.randn(HEIGHT, WIDTH, *k, generator=g).cuda() for k in ((3,), (), ()))
    assert out.normal is not None
    loss = (out.rgb * rgb).sum() + (out.alpha * alpha).sum() + (out.depth * depth).sum() + out.normal[..., 2].sum()
    loss.backward()
    found = {**{name: t.grad for name, t in leaves.items()}, "pose": twist.grad, "background": background.grad}
    assert out.means2d.grad is not None
    return {**found, "means2d": out.means2d.grad.reshape(-1, 2)}  # type: ignore[dict-item]


def test_the_gradients_are_those_of_the_torch_backend():
    splats, camera = splats_of(most=0.34), camera_of()
    ours, theirs = gradients("torch", splats, camera), gradients("gsplat", splats, camera)
    for name, mine in ours.items():
        other = theirs[name]
        likeness = torch.nn.functional.cosine_similarity(mine.flatten(), other.flatten(), dim=0)
        assert likeness > 0.995, (name, likeness)
        assert float(other.norm() / mine.norm()) == pytest.approx(1, abs=0.05), name


def test_opaque_splats_look_alike_too():
    splats, camera = splats_of(), camera_of()
    ours, theirs = (rasterize(splats, camera, backend=backend).rgb for backend in ("torch", "gsplat"))
    assert (ours - theirs).abs().mean() < 5e-3  # gsplat's splats reach further


def test_auto_takes_gsplat_only_where_it_can():
    splats, camera = splats_of(200), camera_of()
    assert torch.equal(rasterize(splats, camera).rgb, rasterize(splats, camera, backend="gsplat").rgb)
    wide = Splats(*(t.double() for t in splats))
    assert rasterize(wide, camera.to(torch.float64)).rgb.dtype == torch.float64
    K = camera.K.clone().requires_grad_()
    rasterize(splats, Camera(K, camera.w2c, WIDTH, HEIGHT)).rgb.sum().backward()
    assert K.grad is not None and bool((K.grad != 0).any())


def test_what_it_cannot_do_is_said():
    splats, camera = splats_of(20), camera_of()
    with pytest.raises(InvalidInput, match="float32"):
        rasterize(Splats(*(t.double() for t in splats)), camera.to(torch.float64), backend="gsplat")
    with pytest.raises(InvalidInput, match=r"camera\.K"):
        rasterize(splats, Camera(camera.K.clone().requires_grad_(), camera.w2c, WIDTH, HEIGHT), backend="gsplat")


def test_nothing_in_view_is_the_background():
    splats = splats_of(10)
    behind = splats._replace(means=splats.means - torch.tensor([0.0, 50.0, 0.0], device="cuda"))
    background = torch.tensor([0.1, 0.2, 0.3], device="cuda")
    out = rasterize(behind, camera_of(), background)
    torch.testing.assert_close(out.rgb, background.expand_as(out.rgb))
    assert not out.visible.any()


def test_densification_reads_its_gradients():
    g = torch.Generator().manual_seed(0)
    scene = GaussianScene.from_points(torch.rand(400, 3, generator=g) - 0.5, torch.rand(400, 3, generator=g)).cuda()
    camera, strategy = camera_of(), DensificationStrategy()
    pulls = []
    for backend in ("torch", "gsplat"):
        out = rasterize(scene, camera, backend=backend)  # type: ignore[arg-type]
        (out.rgb - 0.5).square().sum().backward()
        strategy = DensificationStrategy()
        strategy.observe(out, WIDTH, HEIGHT)
        assert strategy.sum_ is not None
        pulls.append(strategy.sum_)
    assert torch.nn.functional.cosine_similarity(pulls[0], pulls[1], dim=0) > 0.99
