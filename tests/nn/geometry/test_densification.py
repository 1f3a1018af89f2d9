"""Rows of splats that come and go with their optimiser's moments, and the initial scales."""

from __future__ import annotations

import pytest
import torch

from surefoot.errors import InvalidInput
from surefoot.nn.geometry.cameras import Camera, intrinsics, look_at
from surefoot.nn.geometry.densification import DensificationStrategy, change_rows, splat_optimizer
from surefoot.nn.geometry.rasterizer import rasterize
from surefoot.nn.geometry.splats import NAMES, GaussianScene, neighbour_distance


def scene_of(n=30, seed=0):
    g = torch.Generator().manual_seed(seed)
    return GaussianScene.from_points(torch.rand(n, 3, generator=g) - 0.5, torch.rand(n, 3, generator=g), degree=1)


def camera():
    return Camera(intrinsics(30.0, 32, 32), look_at(torch.tensor([0.0, -2.0, 0.3]), torch.zeros(3)), 32, 32)


def trained(scene, steps=3):
    optimizer = splat_optimizer(scene, 1.0, means=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        rasterize(scene, camera()).rgb.square().mean().backward()
        optimizer.step()
    return optimizer


def test_neighbour_distance_by_hand():
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3], [50, 0, 0]])
    assert neighbour_distance(points)[0].item() == pytest.approx(((1 + 4 + 9) / 3) ** 0.5)


def test_rows_and_moments_stay_together():
    """Every row is tagged; after pruning and adding, each kept row has its own moments and each new one zeros."""
    scene = scene_of()
    optimizer = trained(scene)
    moments = {name: optimizer.state[getattr(scene, name)]["exp_avg"].clone() for name in NAMES}
    before = {name: getattr(scene, name).detach().clone() for name in NAMES}
    keep = torch.rand(30, generator=torch.Generator().manual_seed(1)) > 0.4
    added = {name: before[name][:2] + 1 for name in NAMES}
    change_rows(scene, optimizer, keep, added)
    count = int(keep.sum())
    for name in NAMES:
        parameter = getattr(scene, name)
        assert torch.equal(parameter[:count], before[name][keep])
        assert torch.equal(parameter[count:], before[name][:2] + 1)
        state = optimizer.state[parameter]["exp_avg"]
        assert torch.equal(state[:count], moments[name][keep])
        assert state[count:].abs().max() == 0
    assert len(optimizer.state) == len(NAMES)
    rasterize(scene, camera()).rgb.mean().backward()
    before_step = scene.means.detach().clone()
    optimizer.step()
    assert not torch.equal(before_step, scene.means)


def test_clones_and_splits():
    scene = scene_of()
    with torch.no_grad():
        scene.log_scales[:5] = torch.log(torch.tensor(0.5))  # large
        scene.log_scales[5:] = torch.log(torch.tensor(0.001))
    optimizer = trained(scene, 1)
    strategy = DensificationStrategy(start=0, every=1, threshold=0.5, split_size=0.01, reset_every=None)
    strategy.sum_ = torch.zeros(30)
    strategy.sum_[[0, 1, 10]] = 1.0
    strategy.count_, strategy.radius_ = torch.ones(30), torch.ones(30)
    old = scene.means.detach().clone()
    scales = scene.log_scales.detach().clone()
    strategy.step(scene, optimizer, 0, 1.0, torch.Generator().manual_seed(0))
    assert len(scene) == 30 - 2 + 1 + 4
    assert torch.equal(scene.means[:28], torch.cat([old[2:10], old[10:]]))
    assert torch.equal(scene.means[28], old[10])  # a clone is a copy
    torch.testing.assert_close(scene.log_scales[29:], scales[[0, 0, 1, 1]] - torch.log(torch.tensor(1.6)))
    assert (scene.means[29:31] - old[0]).norm(dim=1).max() < 5 * 0.5  # drawn from the splat itself


def test_the_pull_is_in_normalised_units_and_seen_views_only():
    scene = scene_of()
    strategy = DensificationStrategy()
    out = rasterize(scene, camera())
    out.rgb[10:20, 10:20].sum().backward()
    strategy.observe(out, 32, 32)
    assert strategy.sum_ is not None
    assert out.means2d.grad is not None
    torch.testing.assert_close(strategy.sum_, (out.means2d.grad * 16).norm(dim=1) * out.visible)
    assert strategy.count_ is not None and torch.equal(strategy.count_, out.visible.float())
    with pytest.raises(InvalidInput, match="backward"):
        strategy.observe(rasterize(scene, camera()), 32, 32)


def test_pruning_and_opacity_reset():
    scene = scene_of()
    optimizer = trained(scene, 1)
    with torch.no_grad():
        scene.logit_opacities[:4] = -8.0
    strategy = DensificationStrategy(start=0, every=1, threshold=1e9, reset_every=10)
    strategy.sum_ = strategy.count_ = strategy.radius_ = torch.zeros(30)
    strategy.step(scene, optimizer, 5, 1.0, torch.Generator())
    assert len(scene) == 26
    strategy.step(scene, optimizer, 10, 1.0, torch.Generator())
    assert scene.logit_opacities.sigmoid().max() <= 0.01 + 1e-6
    assert optimizer.state[scene.logit_opacities]["exp_avg"].abs().max() == 0


def test_at_most_so_many():
    scene = scene_of()
    optimizer = trained(scene, 1)
    strategy = DensificationStrategy(start=0, every=1, threshold=0.5, split_size=10.0, most_splats=33, reset_every=None)
    strategy.sum_, strategy.count_, strategy.radius_ = torch.arange(30) + 1.0, torch.ones(30), torch.zeros(30)
    strategy.step(scene, optimizer, 0, 1.0, torch.Generator())
    assert len(scene) == 33


def test_smoothing_filter():
    """s_f = sqrt(.2) z / f of the nearest camera; opacity falls as the volume grows."""
    scene, view = scene_of(), camera()
    scene.update_filter([view])
    z = (scene.means.detach() @ view.w2c[:3, :3].mT + view.w2c[:3, 3])[:, 2]
    torch.testing.assert_close(scene.filter_3d, 0.2**0.5 * z / 30.0)
    plain, filtered = scene.log_scales.exp(), scene.splats()
    wide = (plain**2 + scene.filter_3d[:, None] ** 2).sqrt()
    torch.testing.assert_close(filtered.scales, wide)
    torch.testing.assert_close(filtered.opacities, scene.logit_opacities.sigmoid() * plain.prod(1) / wide.prod(1))


def test_bad_points():
    points = torch.rand(5, 3)
    for points_, rgb, words in (
        (points[:1], points[:1], "two points"),
        (points, points[:3], "N, 3"),
        (points * torch.nan, points, "finite"),
    ):
        with pytest.raises(InvalidInput, match=words):
            GaussianScene.from_points(points_, rgb)
    with pytest.raises(InvalidInput, match="opacity"):
        GaussianScene.from_points(points, points, opacity=1.0)
