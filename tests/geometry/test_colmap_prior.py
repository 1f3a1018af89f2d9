"""Structure from motion and plane sweep: epipolar errors by hand, matching scores, and a scene whose poses are known."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from surefoot.datasets.scenes import courtyard360
from surefoot.errors import InvalidInput, MissingExtra
from surefoot.geometry.lm_gaussian.colmap import ColmapPrior, _notes
from surefoot.geometry.lm_gaussian.ladder import RUNGS, Climb, chained, climb
from surefoot.geometry.lm_gaussian.sweep import UNSUPPORTED, plane_sweep, track_support, zncc
from surefoot.geometry.lm_gaussian.trust import (
    LEAST_SHARE,
    agreement,
    doubts,
    freed_focals,
    fundamental_of,
    sampson_errors,
)
from surefoot.nn.geometry.alignment import pose_errors
from surefoot.nn.geometry.cameras import project
from surefoot.nn.geometry.rotations import rotation_angle, so3_exp
from surefoot.trials.geometry.lm_photos import dino_ring, fox

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


def test_tracks_nearby_raise_the_confidence():
    tracks = torch.tensor([[5.5, 5.5], [6.2, 5.1], [5.0, 6.9], [18.0, 3.5], [40.0, 3.0]])
    support = track_support(tracks, (12, 24), 3.0)
    pixels = torch.stack(torch.meshgrid(torch.arange(12), torch.arange(24), indexing="ij"), -1)
    near = (pixels.flip(-1)[..., None, :] - tracks.floor()).norm(dim=-1) <= 3
    assert torch.equal(support, near.sum(-1).clamp_max(2).float())
    assert set(support.unique().tolist()) == {0.0, 1.0, 2.0}
    scene = replace(courtyard360(48, train=40), blur=1.0)
    views = [scene.view(c, supersample=2) for c in scene.train[:3]]
    images, cameras, ranges = torch.stack([v.rgb for v in views]), [v.camera for v in views], [(1.0, 12.0)] * 3
    depths, plain = plane_sweep(images, cameras, ranges, agree=0.03)
    around = [torch.tensor([[24.5, 30.5], [25.5, 30.5]])] * 3
    same, more = plane_sweep(images, cameras, ranges, agree=0.03, tracks=around, disc=10.0)
    factor = 1 + track_support(around[0], (48, 48), 10.0).expand_as(plain)
    sure = plain > UNSUPPORTED
    assert torch.equal(depths, same)
    assert (sure & (factor == 3)).any()
    torch.testing.assert_close(more, torch.where(sure, 1 + (plain - 1) * factor, plain))
    with pytest.raises(InvalidInput, match="tracks of 1 views"):
        plane_sweep(images, cameras, ranges, tracks=around[:1])


# --- the ladder and its gate on made matches, whose poses are known exactly -----------------------------------------------


def dataset(folder, frames, *, inliers=1.0, noise=0.3):
    """A database of a made scene with exact pairs, outliers among the matches, and noise on the pixels; and the truth."""
    pycolmap = pytest.importorskip("pycolmap")
    pytest.importorskip("cv2")
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs, options.num_cameras_per_rig, options.num_frames_per_rig, options.num_points3D = 1, 1, frames, 120
    options.camera_model_id, options.camera_params = pycolmap.CameraModelId.PINHOLE, [900.0, 900.0, 512.0, 384.0]
    options.inlier_match_ratio = inliers
    pycolmap.set_random_seed(frames)
    path = folder / "matches.db"
    with pycolmap.Database.open(str(path)) as db:
        truth = pycolmap.synthesize_dataset(options, db)
        blur = pycolmap.SyntheticNoiseOptions()
        blur.point2D_stddev = noise
        pycolmap.synthesize_noise(blur, truth, db)
    (folder / "photos").mkdir()
    return pycolmap, path, truth


def relative_errors(model, truth):  # degrees, of all placed against the first
    ids = sorted(i for i, image in model.images.items() if image.has_pose)

    def turn(of, i):
        return torch.from_numpy(of.images[i].cam_from_world().matrix()[:, :3].copy())

    found = [turn(model, i) @ turn(model, ids[0]).mT for i in ids[1:]]
    true = [turn(truth, i) @ turn(truth, ids[0]).mT for i in ids[1:]]
    return [float(rotation_angle(a, b)) for a, b in zip(found, true, strict=True)]


@pytest.mark.parametrize("frames", [2, 3, 5])
def test_the_chain_finds_known_poses_among_outliers(tmp_path, frames):
    pycolmap, path, truth = dataset(tmp_path, frames, inliers=0.7)
    model = chained(pycolmap, path, tmp_path / "photos", known=True, seed=0)
    assert model.num_reg_images() == frames
    assert max(relative_errors(model, truth)) < 0.5
    assert model.num_points3D() > 60
    assert model.compute_mean_reprojection_error() < 1.0
    again = chained(pycolmap, path, tmp_path / "photos", known=True, seed=0)
    assert relative_errors(model, truth) == relative_errors(again, truth)


def test_the_gate_is_quiet_on_right_poses_and_names_the_photo_that_was_turned(tmp_path):
    pycolmap, path, truth = dataset(tmp_path, 5)
    names = {image.name: f"photo {i}" for i, image in truth.images.items()}
    assert doubts(pycolmap, truth, path, names, known=False) == []
    assert min(agreement(pycolmap, truth, path).values()) > 0.95
    turned = truth.images[3]
    pose = turned.cam_from_world().matrix().copy()
    pose[:, :3] = so3_exp(torch.tensor([0.0, math.radians(5), 0.0], dtype=F64)).numpy() @ pose[:, :3]
    turned.frame.set_cam_from_world(turned.camera_id, pycolmap.Rigid3d(pose))
    shares = agreement(pycolmap, truth, path)
    assert shares.pop(turned.name) < LEAST_SHARE - 0.1
    assert min(shares.values()) > 0.6  # one wrong photo does not discredit the others
    said = doubts(pycolmap, truth, path, names, known=False)
    assert any("photo 3 with the other photos" in note for note in said)
    assert not any(f"photo {i} with" in note for note in said for i in (1, 2, 4, 5))


def test_the_gate_does_not_believe_pixels_that_are_not_square(tmp_path):
    pycolmap, path, truth = dataset(tmp_path, 3)
    names = {image.name: image.name for image in truth.images.values()}
    camera = truth.cameras[1]
    camera.params = [900.0, 900.0 * 1.05, 512.0, 384.0]
    assert any("differ by 5%" in note for note in doubts(pycolmap, truth, path, names, known=False))
    assert not any("differ" in note for note in doubts(pycolmap, truth, path, names, known=True))
    camera.params = [3000.0, 3000.0, 512.0, 384.0]
    assert any("field of view found is 19 degrees" in note for note in doubts(pycolmap, truth, path, names, known=False))  # fmt: skip


def test_the_gate_doubts_a_given_focal_length_that_the_photos_contradict(tmp_path):
    pycolmap, path, truth = dataset(tmp_path, 5)
    names = {image.name: image.name for image in truth.images.values()}
    assert doubts(pycolmap, truth, path, names, known=True) == []
    assert freed_focals(pycolmap, truth) == pytest.approx([900, 900], rel=0.02)
    camera = truth.cameras[1]
    for factor, told in ((1.05, False), (0.8, True), (1.2, True)):
        camera.params = [900.0 * factor, 900.0 * factor, 512.0, 384.0]
        said = [note for note in doubts(pycolmap, truth, path, names, known=True) if "focal length" in note]
        assert bool(said) is told
        assert camera.params[0] == 900.0 * factor  # the model is left alone
    assert f"better than the {1080} that was given" in said[0]


def test_the_ladder_is_climbed_on_doubts_and_says_what_it_tried(tmp_path):
    pycolmap, path, _ = dataset(tmp_path, 4)
    options = {"known": True, "seed": 0}
    trusting = climb(pycolmap, path, tmp_path / "photos", 4, judge=lambda model: [], **options)
    assert (trusting.rung, len(trusting.tried), trusting.doubts) == (1, 1, ())
    assert trusting.tried[0] == f"{RUNGS[0]}: 4 of 4 photos"
    seen = []

    def judge(model):
        seen.append(model)
        return [] if len(seen) == 3 else ["wrong"]

    wary = climb(pycolmap, path, tmp_path / "photos", 4, judge=judge, **options)
    assert (wary.rung, wary.doubts) == (3, ())
    assert [t.split(": ")[1] for t in wary.tried] == ["4 of 4 photos, doubtful", "4 of 4 photos, doubtful", "4 of 4 photos"]  # fmt: skip
    never = climb(pycolmap, path, tmp_path / "photos", 4, judge=lambda model: ["wrong"], **options)
    assert (never.rung, never.doubts) == (1, ("wrong",))


def test_missing_photos_groups_and_doubts_are_told():
    files = {f"{k}.png": f"p{k}" for k in range(5)}
    found = Climb(None, 2, ("a: 2 of 5 photos", "b: 3 of 5 photos in 2 groups"), (("0.png", "1.png", "2.png"), ("3.png", "4.png")), ("odd",))  # fmt: skip
    notes = list(_notes(found, files, (0, 1, 2)))
    assert notes[0] == "2 photos found no place (p3, p4); tried: a: 2 of 5 photos; b: 3 of 5 photos in 2 groups."
    assert "2 groups that do not hang together (p0, p1, p2; p3, p4)" in notes[1]
    assert notes[2] == "odd"
    assert "needed the loose thresholds" in " ".join(_notes(found, files, range(5)))


@pytest.mark.parametrize("module", ["pycolmap", "cv2"])
def test_a_missing_library_is_named_with_its_extra(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=r"surefoot\[geometry\]"):
        ColmapPrior().reconstruct([torch.rand(8, 8, 3)] * 2, ["a", "b"])


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_ten_photos_of_a_textured_scene_are_registered_within_a_degree():
    """The dossier's trial (a2): 192 pixels, no oracle."""
    pytest.importorskip("pycolmap")
    scene = replace(courtyard360(192, train=30), blur=1.0)
    views = [scene.view(c, supersample=2) for c in scene.train[:10]]
    names = [f"p{k}" for k in range(10)]
    found = ColmapPrior(work_size=(48, 48), dense=False).reconstruct([v.rgb for v in views], names, scene.train[0].K)
    assert found.registered == tuple(range(10))
    assert (found.rung, found.doubts, found.notes) == (1, (), ())
    assert all((c.width, c.height) == (48, 48) for c in found.cameras)
    errors = pose_errors(found.cameras, [scene.train[k].resized(48, 48) for k in range(10)])
    assert errors.rotation_degrees.max() < 1
    assert errors.ate < 0.02 * 2.5


@pytest.mark.slow
def test_wrong_poses_do_not_pass_in_silence():
    """The same photos without intrinsics: every pair agrees with poses that are wrong by a hundred degrees, and only the pixels' shape tells."""
    pytest.importorskip("pycolmap")
    scene = replace(courtyard360(192, train=30), blur=1.0)
    views = [scene.view(c, supersample=2) for c in scene.train[:10]]
    found = ColmapPrior(dense=False).reconstruct([v.rgb for v in views], [f"p{k}" for k in range(10)])
    errors = pose_errors(found.cameras, [scene.train[k] for k in found.registered])
    assert bool(errors.rotation_degrees.max() < 5) or found.doubts


def multiview():
    pytest.importorskip("pycolmap")
    if "SUREFOOT_DATA" not in os.environ or not (Path(os.environ["SUREFOOT_DATA"]) / "multiview").is_dir():
        pytest.skip("SUREFOOT_DATA names no folder with multiview photos")
    return Path(os.environ["SUREFOOT_DATA"])


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 6, 9, 16])
def test_the_fox_is_registered_without_a_false_alarm(n):
    scene = fox(multiview())
    train = scene.split(n)[0]
    found = ColmapPrior(dense=False).reconstruct([scene.images[k] for k in train], [scene.names[k] for k in train])
    assert len(found.registered) == n
    assert found.doubts == ()
    assert pose_errors(found.cameras, [scene.cameras[k] for k in train]).rotation_degrees.max() < 2
    assert (
        found.rung == {3: 3, 6: 2, 9: 1, 16: 1}[n]
    )  # at 3 photos the loose thresholds place all, by tens of degrees wrong


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 6, 9])
@pytest.mark.parametrize("factor", [1.0, 0.8, 1.2])
def test_a_focal_length_given_for_the_fox_helps_or_is_doubted(n, factor):
    """The true one is believed and holds the poses; one that is 20 percent off costs degrees or everything, and is told."""
    scene = fox(multiview())
    train = scene.split(n)[0]
    K = scene.cameras[0].K.clone()
    K[:2, :2] *= factor
    found = ColmapPrior(dense=False).reconstruct([scene.images[k] for k in train], [scene.names[k] for k in train], K)
    assert found.cameras[0].K[0, 0] == pytest.approx(float(K[0, 0]))  # what is known stays
    if factor != 1.0:
        assert any("focal length" in note for note in found.doubts)
        return
    assert found.doubts == () and len(found.registered) == n
    assert pose_errors(found.cameras, [scene.cameras[k] for k in train]).rotation_degrees.max() < 2.5


@pytest.mark.slow
def test_the_dino_ring_never_gives_a_scene_from_wrong_poses_in_silence():
    scene = dino_ring(multiview())
    with pytest.raises(InvalidInput, match="placed none of the 3 photos"):
        ColmapPrior(dense=False).reconstruct(scene.images[:9:4], scene.names[:9:4])
    for train in (scene.split(8)[0], tuple(range(16))):
        try:
            found = ColmapPrior(dense=False).reconstruct([scene.images[k] for k in train], [scene.names[k] for k in train])  # fmt: skip
        except InvalidInput:
            continue
        absent = [scene.names[k] for r, k in enumerate(train) if r not in found.registered]
        assert absent or found.doubts
        assert all(name in " ".join(found.notes) for name in absent)


@pytest.mark.slow
def test_photos_without_texture_are_refused():
    pytest.importorskip("pycolmap")
    grey = [torch.full((64, 64, 3), 0.4 + 0.02 * k) for k in range(3)]
    with pytest.raises(InvalidInput, match="placed none of the 3 photos"):
        ColmapPrior(dense=False).reconstruct(grey, ["a", "b", "c"])
    with pytest.raises(InvalidInput, match="one size"):
        ColmapPrior().reconstruct([torch.rand(8, 8, 3), torch.rand(8, 9, 3)], ["a", "b"])
