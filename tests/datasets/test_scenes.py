"""Analytic scenes: depth, normals and pictures agree with one another across views."""

from __future__ import annotations

import pytest
import torch

from surefoot.datasets.scenes import COURTYARD, analytic_scene, courtyard360
from surefoot.errors import InvalidInput
from surefoot.nn.geometry.cameras import back_project, project
from surefoot.nn.geometry.rotations import check_rotation

pytest.importorskip("skimage")


@pytest.fixture(scope="module")
def scene():
    return courtyard360(48)


def test_points_lie_on_their_shapes(scene):
    view = scene.view(scene.train[1], supersample=1)
    world = back_project(view.depth.double(), view.camera.K.double(), view.camera.w2c.double())
    seen = view.object_id.unique().tolist()
    assert {0, 5, 6} < set(seen)  # ground, wall and sky
    assert len(set(seen) & {1, 2, 3, 4}) >= 2
    assert (world[view.object_id == 0][:, 2] + 0.6).abs().max() < 1e-4
    assert (world[view.object_id == 5][:, :2].norm(dim=1) - 7).abs().max() < 1e-4
    assert (world[view.object_id == 6].norm(dim=1) - 30).abs().max() < 1e-3
    for index in (3, 4):
        sphere = COURTYARD[index]
        points = world[view.object_id == index]
        assert points.numel() == 0 or ((points - torch.tensor(sphere.centre, dtype=torch.float64)).norm(dim=1) - sphere.radius).abs().max() < 1e-4  # type: ignore[attr-defined]  # fmt: skip


def test_two_views_agree_about_surfaces_and_colours(scene):
    """What one camera sees, another that also sees it shows in nearly the same colour at the right depth."""
    a, b = (scene.view(c) for c in (scene.train[0], scene.test[1]))
    world = back_project(a.depth, a.camera.K, a.camera.w2c).reshape(-1, 3)
    uv, z = project(world, b.camera)
    column, row = uv.floor().long().unbind(1)
    inside = (z > 0) & (column >= 0) & (column < 48) & (row >= 0) & (row < 48)
    shown = b.depth[row[inside], column[inside]]
    same = (z[inside] - shown).abs() < 0.02 * shown
    assert same.float().mean() > 0.6
    difference = (a.rgb.reshape(-1, 3)[inside][same] - b.rgb[row[inside], column[inside]][same]).abs()
    assert difference.median() < 0.03


def test_normals_are_unit_face_the_camera_and_match_the_depth(scene):
    view = scene.view(scene.test[3], supersample=1)
    torch.testing.assert_close(view.normal.norm(dim=-1), torch.ones(48, 48), atol=1e-5, rtol=0)
    local = back_project(view.depth, view.camera.K)
    assert (view.normal * local).sum(-1).max() <= 1e-4
    across, down = local[1:-1, 2:] - local[1:-1, :-2], local[2:, 1:-1] - local[:-2, 1:-1]
    from_depth = torch.nn.functional.normalize(torch.linalg.cross(down, across), dim=-1)
    ground = view.object_id == 0
    flat = ground[1:-1, 1:-1] & ground[1:-1, 2:] & ground[1:-1, :-2] & ground[2:, 1:-1] & ground[:-2, 1:-1]
    agreement = (from_depth * view.normal[1:-1, 1:-1]).sum(-1)[flat].abs()
    assert agreement.min() > 0.999


def test_cameras_are_held_out_and_proper(scene):
    train, test = (torch.stack([c.centre for c in cameras]) for cameras in (scene.train, scene.test))
    assert torch.cdist(test, train).min() > 0.05
    check_rotation("poses", torch.stack([c.w2c[:3, :3] for c in (*scene.train, *scene.test)]))


def test_supersampling_smooths_and_sizes_agree(scene):
    small = scene.view(scene.train[0]).rgb
    large = courtyard360(96).view(courtyard360(96).train[0]).rgb
    pooled = torch.nn.functional.avg_pool2d(large.permute(2, 0, 1)[None], 2)[0].permute(1, 2, 0)
    assert (small - pooled).abs().mean() < 0.01
    assert small.min() >= 0
    assert small.max() <= 1


def test_presets():
    assert len(analytic_scene("facing3").train) == 3
    with pytest.raises(InvalidInput, match="courtyard360"):
        analytic_scene("palace")
