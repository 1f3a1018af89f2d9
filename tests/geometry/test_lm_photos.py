"""The trial on real photos: splits that do not overlap, poses in the house's axes, refusals as results."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from surefoot.core.task import Split, Task
from surefoot.datasets.scenes import courtyard360
from surefoot.errors import InvalidInput
from surefoot.geometry.lm_gaussian.colmap import ColmapViews
from surefoot.nn.geometry.ply import PointCloud
from surefoot.trials.geometry import lm_photos
from surefoot.trials.geometry.lm_photos import PhotoScene, from_opengl, photo_arms, photo_claims

pytest.importorskip("skimage")
METRICS = {"registered", "rung", "warned", "rotation_error", "ate", "psnr", "psnr_refined", "ssim", "splats", "whole_seconds"}  # fmt: skip


@pytest.fixture(scope="module")
def scene():
    """Twelve rendered photos in the place of real ones."""
    courtyard = courtyard360(32, train=12)
    views = [courtyard.view(camera, supersample=2) for camera in courtyard.train]
    return PhotoScene("rendered", tuple(v.rgb for v in views), courtyard.train, tuple(f"{k}" for k in range(12)), (16, 16)), views  # fmt: skip


def task(tmp_path, valid=2, test=5):
    def blank(n):
        return Split(torch.zeros(n, 3, 16, 16))

    return Task("photos", blank(3), blank(valid), blank(test), num_classes=1, seed=3, facts={"data_dir": str(tmp_path)})


def test_training_choosing_and_testing_photos_are_apart():
    photos = PhotoScene("fox", (torch.zeros(4, 4, 3),) * 50, (), (), (4, 4))
    for n in lm_photos.COUNTS:
        train, valid, test = photos.split(n)
        assert len(set(train)) == n
        assert (train[0], train[-1]) == (0, 49)
        assert not set(train) & set(test)
        assert not set(valid) & set(train + test)
        assert valid
        assert test[0] == min(k for k in range(50) if k not in train)
    assert photos.split(3)[0] == (0, 24, 49)
    ring = PhotoScene("dino", (torch.zeros(4, 4, 3),) * 16, (), (), (4, 4))
    assert ring.split(8) == (tuple(range(0, 16, 2)), (), tuple(range(1, 16, 2)))
    with pytest.raises(InvalidInput, match="n must be from 2 to 15"):
        ring.split(16)


def test_opengl_poses_turn_into_ours():
    c2w = torch.eye(4)
    c2w[2, 3] = 3.0  # three behind the origin, looking along -z
    w2c = from_opengl(c2w)
    torch.testing.assert_close(w2c @ torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 3.0, 1.0]))
    torch.testing.assert_close(w2c @ torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, -1.0, 3.0, 1.0]))


def test_a_refusal_is_a_result(monkeypatch, tmp_path, scene):
    monkeypatch.setitem(lm_photos.SCENES, "fox", lambda folder: scene[0])
    monkeypatch.setattr(lm_photos, "registered", lambda *_: (None, 1.5))
    arm = photo_arms()["full_3"]
    metrics = arm.run(task(tmp_path), torch.Generator().manual_seed(0), means=4e-3)
    assert metrics == {"registered": 0.0, "rung": 0.0, "warned": 1.0, "whole_seconds": 1.5}
    two = ColmapViews((), (0, 2), PointCloud(torch.zeros(0, 3), torch.zeros(0, 3)), rung=3, doubts=("two",))
    monkeypatch.setattr(lm_photos, "registered", lambda *_: (two, 1.5))
    metrics = arm.run(task(tmp_path), torch.Generator().manual_seed(0), means=4e-3)
    assert metrics == {"registered": 2.0, "rung": 3.0, "warned": 1.0, "whole_seconds": 1.5}


@pytest.mark.parametrize("name", ["full_3", "plain_3"])
def test_an_arm_with_true_poses_scores_its_views(monkeypatch, tmp_path, scene, name):
    photos, views = scene
    train = photos.split(3)[0]
    cameras = tuple(photos.true(train))
    depths = torch.stack([v.depth for v in (views[k] for k in train)])[:, ::2, ::2]
    points = torch.rand(80, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    found = ColmapViews(cameras, (0, 1, 2), PointCloud(points, points + 0.5), depths, torch.full_like(depths, 9.0), rung=2)  # fmt: skip
    monkeypatch.setitem(lm_photos.SCENES, "fox", lambda folder: photos)
    monkeypatch.setattr(lm_photos, "registered", lambda *_: (found, 0.0))
    for key, value in {"STEPS": 16, "REFINE_STEPS": 4, "PLAIN_STEPS": 20, "SPLATS": 200, "FIT_STEPS": 2}.items():
        monkeypatch.setattr(lm_photos, key, value)
    monkeypatch.setattr(lm_photos, "REPAIR", replace(lm_photos.REPAIR, fit_steps=2, widths=(8, 8, 8), batch=2))
    metrics = photo_arms()[name].run(task(tmp_path), torch.Generator().manual_seed(0), means=4e-3)
    assert set(metrics) >= METRICS
    assert all(math.isfinite(v) for v in metrics.values())
    assert metrics["rotation_error"] < 0.01  # the poses are the true ones
    assert (metrics["registered"], metrics["rung"], metrics["warned"]) == (3.0, 2.0, 0.0)
    tuning = photo_arms()[name].run(task(tmp_path, 2, 2), torch.Generator().manual_seed(0), means=4e-3)
    assert tuning["psnr"] != metrics["psnr"]  # other photos: those set apart for choosing


def test_arms_and_claims_hang_together():
    arms = photo_arms()
    assert set(arms) == {f"{a}_{n}" for a in ("full", "plain") for n in (3, 6, 9, 16)} | {"full_dino", "plain_dino"}
    assert all(arms[name].grid["means"] == arms["full_3"].grid["means"] for name in arms if "dino" not in name)
    for claim in photo_claims():
        assert claim.effect or {claim.arm, claim.over} <= set(arms)
    last = photo_claims()[-1]
    assert last.effect is not None
    assert last.effect({"full_dino": {"warned": 0.0}}) < last.at_least <= last.effect({"full_dino": {"warned": 1.0}})
    with pytest.raises(InvalidInput, match="photos are missing"):
        lm_photos.fox(Path("nowhere"))
