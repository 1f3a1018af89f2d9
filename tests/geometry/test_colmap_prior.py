"""Structure from motion and plane sweep: epipolar errors by hand, matching scores, and a scene whose poses are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from surefoot.datasets.scenes import courtyard360
from surefoot.errors import InvalidInput
from surefoot.geometry.lm_gaussian.colmap import ColmapPrior, fundamental_of, sampson_errors
from surefoot.geometry.lm_gaussian.sweep import UNSUPPORTED, plane_sweep, zncc
from surefoot.nn.geometry.alignment import pose_errors
from surefoot.nn.geometry.cameras import project

pytest.importorskip("skimage")
F64 = torch.float64


def test_matches_of_true_points_lie_on_their_epipolar_lines():
    scene = courtyard360(64)
    a, b = (c.to(F64) for c in scene.train[:2])
    points = torch.rand(50, 3, dtype=F64, generator=torch.Generator().manual_seed(0)) - 0.5
    fundamental = fundamental_of(a.w2c, b.w2c, a.K, b.K)
    first, second = project(points, a)[0], project(points, b)[0]
    assert sampson_errors(first, second, fundamental).max() < 1e-9
    normal = torch.cat([first, torch.ones(50, 1, dtype=F64)], 1) @ fundamental.mT
    off = second + 3 * torch.nn.functional.normalize(normal[:, :2], dim=1)  # three pixels across the line
    errors = sampson_errors(first, off, fundamental)
    assert (errors > 1.0).all()
    assert (errors <= 3.0 + 1e-9).all()


def test_zncc():
    a = torch.rand(1, 12, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        zncc(a, 0.3 * a + 0.5, 7), torch.ones(1, 12, 12), atol=1e-3, rtol=0
    )  # blind to gain and offset
    torch.testing.assert_close(zncc(a, -a, 7), -torch.ones(1, 12, 12), atol=1e-3, rtol=0)
    assert zncc(a, torch.full_like(a, 0.5), 7).abs().max() == 0


def test_plane_sweep_finds_the_true_depths():
    scene = replace(courtyard360(64, train=40), blur=1.0)
    views = [scene.view(c, supersample=2) for c in scene.train[:4]]
    true = torch.stack([v.depth for v in views])
    depths, conf = plane_sweep(
        torch.stack([v.rgb for v in views]), [v.camera for v in views], [(1.0, 12.0)] * 4, agree=0.03
    )
    sure = conf > UNSUPPORTED
    assert (depths[~sure] == 0).all()
    error = (depths / true - 1).abs()[sure & (true < 6)]
    assert len(error) > 3000
    assert error.median() < 0.03
    with pytest.raises(InvalidInput, match="at least two views"):
        plane_sweep(torch.rand(1, 8, 8, 3), [views[0].camera], [(1.0, 2.0)])


@pytest.mark.slow
def test_a_known_scene_is_registered():
    pytest.importorskip("pycolmap")
    scene = replace(courtyard360(256, train=30), blur=1.0)
    views = [scene.view(c, supersample=2) for c in scene.train[:10]]
    found = ColmapPrior(work_size=(64, 64), dense=False).reconstruct(
        [v.rgb for v in views], [f"p{k}" for k in range(10)]
    )
    assert found.registered == tuple(range(10))
    assert all((c.width, c.height) == (64, 64) for c in found.cameras)
    errors = pose_errors(found.cameras, [scene.train[k].resized(64, 64) for k in range(10)])
    assert errors.ate < 0.02 * 2.5
    assert errors.rotation_degrees.max() < 5
    assert float(found.cameras[0].K[0, 0]) == pytest.approx(float(scene.train[0].K[0, 0]) / 4, rel=0.03)


@pytest.mark.slow
def test_photos_without_texture_are_refused():
    pytest.importorskip("pycolmap")
    grey = [torch.full((64, 64, 3), 0.4 + 0.02 * k) for k in range(3)]
    with pytest.raises(InvalidInput, match="placed none of the 3 photos"):
        ColmapPrior(dense=False).reconstruct(grey, ["a", "b", "c"])
    with pytest.raises(InvalidInput, match="one size"):
        ColmapPrior().reconstruct([torch.rand(8, 8, 3), torch.rand(8, 9, 3)], ["a", "b"])
