"""Training cameras that move with the splats."""

from __future__ import annotations

import pytest
import torch

from surefoot.datasets.scenes import courtyard360
from surefoot.errors import InvalidInput
from surefoot.geometry.lm_gaussian import (
    Budget,
    OracleStereoPrior,
    Rates,
    Switches,
    reconstruct,
    train_splats,
)
from surefoot.geometry.lm_gaussian.poses import PoseIncrements
from surefoot.geometry.lm_gaussian.simulated import oracle_cloud
from surefoot.geometry.lm_gaussian.stages import StageStore
from surefoot.nn.geometry.alignment import pose_errors
from surefoot.nn.geometry.rotations import se3_exp
from surefoot.nn.geometry.splats import GaussianScene

pytest.importorskip("skimage")
SIZE, COUNT = 32, 5


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def views():
    scene = courtyard360(SIZE, train=COUNT)
    return [scene.view(camera, supersample=2) for camera in scene.train]


@pytest.fixture(scope="module")
def photos(views):
    return torch.stack([view.rgb for view in views])


@pytest.fixture(scope="module")
def known(views, photos):
    """Splats that fit the photos under the true poses."""
    cloud = oracle_cloud(views, at_most=1500, generator=rng())
    scene = GaussianScene.from_points(cloud.points, cloud.rgb, degree=0)
    train_splats(scene, [v.camera for v in views], photos, steps=120, generator=rng())
    return scene


def shaken(cameras, size=0.02):
    g = rng(1)
    return [cameras[0], *(c.posed(se3_exp(size * torch.randn(6, generator=g)) @ c.w2c) for c in cameras[1:])]


def test_shaken_cameras_come_back(views, photos, known):
    true = [view.camera for view in views]
    wrong = shaken(true)
    course = train_splats(
        known, wrong, photos, steps=100, generator=rng(), rates=Rates(means=1e-5, log_scales=0, quats=0, opacity=0, sh=0),
        optimize_poses=True, pose_rate=3e-3,
    )  # fmt: skip
    before, after = pose_errors(wrong, true), pose_errors(course.cameras, true)
    assert after.rotation_degrees.mean() < 0.6 * before.rotation_degrees.mean()
    assert torch.equal(course.cameras[0].w2c, wrong[0].w2c)
    held = [(c[1].centre - c[0].centre).norm() for c in (wrong, course.cameras)]
    assert held[1] == pytest.approx(float(held[0]), rel=1e-5)


def test_increments_start_at_the_aligned_poses_and_have_gradients(views):
    cameras = [view.camera.to(torch.float64) for view in views]
    poses = PoseIncrements(cameras)
    for k, camera in enumerate(cameras):
        assert torch.allclose(poses.camera(k).w2c, camera.w2c, atol=1e-6)
    torch.nn.init.normal_(poses.twists, std=0.05, generator=rng(2))

    def second(twists):
        return torch.func.functional_call(_Ask(poses), {"poses.twists": twists}, ())

    assert torch.autograd.gradcheck(second, poses.twists.detach().clone().requires_grad_())
    moved = poses.final()[1]
    assert torch.allclose(moved.w2c[:3, :3] @ moved.w2c[:3, :3].mT, torch.eye(3, dtype=torch.float64), atol=1e-6)
    assert float(poses.penalty().detach()) == pytest.approx(0.1 * float(poses.twists.detach().square().sum()))


class _Ask(torch.nn.Module):
    def __init__(self, poses):
        super().__init__()
        self.poses = poses

    def forward(self):
        return torch.stack([self.poses.camera(1).w2c, self.poses.camera(2).w2c])


def test_one_camera_has_no_gauge(views):
    with pytest.raises(InvalidInput, match="two or more cameras"):
        PoseIncrements([views[0].camera])


def test_a_reconstruction_returns_the_moved_cameras_and_resumes_with_them(views, photos, tmp_path):
    asked = {
        "stereo_prior": OracleStereoPrior(views), "switches": Switches(repair=False), "optimize_poses": True,
        "budget": Budget(align_steps=40, steps=12, splats=400, virtual_per_gap=2, path_frames=2),
    }  # fmt: skip
    store = StageStore.of(tmp_path, list(photos), "poses")
    first = reconstruct(list(photos), generator=rng(), stages=store, **asked)
    again = reconstruct(list(photos), generator=rng(), stages=store, **asked)
    still = reconstruct(list(photos), generator=rng(), **{**asked, "optimize_poses": False})
    assert torch.equal(first.cameras[0].w2c, still.cameras[0].w2c)
    assert not torch.equal(first.cameras[2].w2c, still.cameras[2].w2c)
    assert all(torch.equal(a.w2c, b.w2c) for a, b in zip(first.cameras, again.cameras, strict=True))
