"""LM-Gaussian: cleaning, losses, virtual views, repair, stages; on a scene where all is known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from surefoot.datasets.scenes import courtyard360
from surefoot.errors import InvalidInput
from surefoot.geometry.lm_gaussian import (
    Budget,
    OracleMonoPrior,
    OracleStereoPrior,
    PatchDenoiserRepair,
    Switches,
    TemporalFilterEnhance,
    clean_cloud,
    clean_confidence,
    cloud_of,
    distance_weight,
    local_pearson_loss,
    normal_loss,
    pearson_depth_loss,
    reconstruct,
    refine,
    render_points,
    score_pose_free,
    smooth_path,
    train_splats,
    virtual_cameras,
)
from surefoot.geometry.lm_gaussian.clean import fit_scale_shift
from surefoot.geometry.lm_gaussian.repair import repair_times
from surefoot.geometry.lm_gaussian.stages import StageStore
from surefoot.geometry.lm_gaussian.train import Rates
from surefoot.nn.geometry.cameras import Camera, focal_of, intrinsics, look_at
from surefoot.nn.geometry.splats import NAMES, GaussianScene

pytest.importorskip("skimage")
SIZE, COUNT = 24, 5


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scene():
    return courtyard360(SIZE, train=COUNT, test=6)


@pytest.fixture(scope="module")
def views(scene):
    return [scene.view(camera, supersample=2) for camera in scene.train]


def ring(count, radius=1.0):
    cameras = []
    for k in range(count):
        centre = torch.tensor(
            [radius * math.cos(2 * math.pi * k / count), radius * math.sin(2 * math.pi * k / count), 0.0]
        )
        cameras.append(Camera(intrinsics(focal_of(55, 16), 16, 16), look_at(centre, torch.zeros(3)), 16, 16, f"{k}"))
    return cameras


# ---------------------------------------------------------------- cleaning


def wall(depth, size=8):
    camera = Camera(intrinsics(8.0, size, size), torch.eye(4), size, size)
    return torch.full((size, size), depth), camera


def test_cleaning_by_hand():
    """Two cameras at one place: a pixel at half the depth of a surer surface goes; behind it, or surer, it stays."""
    far, camera = wall(4.0)
    w2c, K = camera.w2c.expand(2, 4, 4), camera.K.expand(2, 3, 3)
    for depth, sure, stays in ((2.0, 1.0, False), (8.0, 1.0, True), (2.0, 20.0, True)):
        floating = far.clone()
        floating[4, 4] = depth
        conf = torch.full((2, 8, 8), 10.0)
        conf[0, 4, 4] = sure
        cleaned = clean_confidence(torch.stack([floating, far]), conf, w2c, K)
        assert bool(cleaned[0, 4, 4] > 0) is stays
        assert conf[0, 4, 4] == sure  # the input is left alone: use what is returned
        assert int((cleaned == 0).sum()) == (not stays)
    apart = torch.stack(
        [camera.w2c, look_at(torch.tensor([0.0, 0, 50.0]), torch.tensor([0.0, 0, 100.0]), (0.0, 1.0, 0.0))]
    )
    floating = far.clone()
    floating[4, 4] = 2.0
    conf = torch.full((2, 8, 8), 10.0)
    conf[0] = 1.0
    assert (clean_confidence(torch.stack([floating, far]), conf, apart, K) > 0).all()  # outside of the other frustum


def test_the_exported_cloud_shrinks_and_mono_depth_must_not_run_backwards(scene, views):
    depths, images = torch.stack([v.depth for v in views]), torch.stack([v.rgb for v in views])
    w2c, K = torch.stack([c.w2c for c in scene.train]), torch.stack([c.K for c in scene.train])
    conf = torch.full_like(depths, 10.0)
    conf[0, :8] = 1.0
    cleaned = clean_cloud(depths, conf, images, w2c, K, threshold=5.0, cross_view=False)
    assert not cleaned.keep[0, :8].any()
    assert (
        len(cloud_of(cleaned.depths, cleaned.keep, images, w2c, K).points) == int(cleaned.keep.sum()) < depths.numel()
    )
    with pytest.raises(InvalidInput, match="invert it"):
        clean_cloud(depths, torch.full_like(depths, 10.0), images, w2c, K, mono_depth=-depths)
    with pytest.raises(InvalidInput, match="fewer than two points"):
        cloud_of(depths, torch.zeros_like(depths, dtype=torch.bool), images, w2c, K)


def test_scale_and_shift_in_spite_of_outliers():
    mono = torch.rand(400, generator=rng(0))
    depth = 3 * mono + 2
    depth[:60] += 10
    assert fit_scale_shift(mono, depth, torch.ones(400)) == pytest.approx((3, 2), abs=0.05)


# ---------------------------------------------------------------- losses


def test_pearson_depth_loss():
    g = rng(0)
    depth = torch.rand(12, 12, dtype=torch.float64, generator=g)
    mono = torch.rand(12, 12, dtype=torch.float64, generator=g)
    loss = pearson_depth_loss(depth, mono)
    for a, b in ((3.0, 2.0), (1e-3, -5.0), (50.0, 0.0)):
        assert pearson_depth_loss(depth, a * mono + b).item() == pytest.approx(loss.item(), abs=1e-6)
    assert pearson_depth_loss(depth, depth).item() == pytest.approx(0, abs=1e-12)
    assert pearson_depth_loss(depth, -depth).item() == pytest.approx(2, abs=1e-12)
    depth.requires_grad_()
    (slope,) = torch.autograd.grad(pearson_depth_loss(depth, mono), depth)
    assert abs(slope.sum().item()) < 1e-12  # orthogonal to what it is invariant to
    assert abs((slope * depth).sum().item()) < 1e-12
    flat = torch.full((12, 12), 3.0, dtype=torch.float64, requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(local_pearson_loss(flat, mono, 4, generator=g), flat)[0]).all()  # sky


def test_normal_loss():
    a = torch.nn.functional.normalize(torch.randn(6, 6, 3, generator=rng(0)), dim=-1)
    b = torch.nn.functional.normalize(torch.randn(6, 6, 3, generator=rng(1)), dim=-1)
    assert normal_loss(a, a).item() == pytest.approx(0, abs=1e-6)
    assert normal_loss(-a, -b).item() == pytest.approx(normal_loss(a, b).item(), abs=1e-6)
    assert normal_loss(a, -a).item() - 2 * a.abs().sum(-1).mean().item() == pytest.approx(2, abs=1e-5)
    unknown = b.clone()
    unknown[:3] = 0
    assert normal_loss(a, unknown).item() == pytest.approx(normal_loss(a[3:], b[3:]).item(), abs=1e-6)


def test_distance_weight_on_a_ring():
    cameras = ring(8)
    centres = torch.stack([c.centre for c in cameras])
    assert distance_weight(centres[0], centres) == 0
    off = centres[0] * (1 + 0.1)
    assert distance_weight(off, centres) == pytest.approx(0.7216, abs=1e-4)
    assert distance_weight(centres[0] * (1 + 0.1386), centres) == pytest.approx(1.0, abs=1e-3)
    steps = virtual_cameras(cameras[:2], 10)
    weights = [distance_weight(c.centre, centres) for c in steps]
    assert weights[0] == 0
    assert weights[1] == pytest.approx(0.552, abs=1e-3)
    assert set(weights[2:9]) == {1.0}
    with pytest.raises(InvalidInput, match="at least two photos"):
        virtual_cameras(cameras[:1])


def test_point_rendering_masks_holes_and_hides_what_lies_behind():
    camera = Camera(intrinsics(8.0, 8, 8), torch.eye(4), 8, 8)
    points = torch.tensor([[0.0625, 0.0625, 1.0], [0.125, 0.125, 2.0]])  # one pixel, two depths
    rgb, covered = render_points(points, torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]), camera, radius=0.6)
    assert covered[4, 4]
    assert rgb[4, 4].tolist() == [1.0, 0.0, 0.0]
    assert int(covered.sum()) == 1
    through, _ = render_points(points, torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]), camera, radius=0.6, occlusion=None)
    assert through[4, 4].tolist() == pytest.approx([0.5, 0.5, 0.0])


# ---------------------------------------------------------------- training, repair, path


def small_scene(views, n=300):
    depths, images = torch.stack([v.depth for v in views]), torch.stack([v.rgb for v in views])
    w2c, K = torch.stack([v.camera.w2c for v in views]), torch.stack([v.camera.K for v in views])
    cloud = cloud_of(depths, depths < 25, images, w2c, K, at_most=n, generator=rng(0))
    return GaussianScene.from_points(cloud.points, cloud.rgb, degree=0), images


class Nonsense:
    name = "nonsense"

    def fit(self, degraded, clean, *, generator):
        pass

    def repair(self, renders, *, strength, generator):
        return torch.rand(renders.shape, generator=rng(9))


def test_repaired_views_of_weight_zero_train_nothing(scene, views):
    """With w(v) = 0 everywhere stage 2 is plain photometric training, to the bit."""
    plain, images = small_scene(views)
    other = small_scene(views)[0]
    at_the_photos = list(scene.train)
    refine(other, scene.train, images, Nonsense(), at_the_photos, rounds=1, steps=6, generator=rng(4))

    class Draws:  # the same draws of virtual views, of no effect
        def term(self, scene, background, generator):
            torch.randint(COUNT, (), generator=generator)
            return scene.means.sum() * 0

    train_splats(plain, scene.train, images, steps=6, generator=rng(4), virtual=Draws())  # type: ignore[arg-type]
    for name in NAMES:
        assert torch.equal(getattr(plain, name), getattr(other, name)), name


def test_training_lowers_the_error_and_is_deterministic(scene, views):
    ends = []
    for _ in range(2):
        splats, images = small_scene(views)
        course = train_splats(splats, scene.train, images, steps=40, generator=rng(1), rates=Rates())
        ends.append(splats.means.detach().clone())
        assert course.history[-1]["photometric"] < 0.6 * course.history[0]["photometric"]
    assert torch.equal(*ends)


def test_repair_schedule():
    assert len(repair_times(200, 10, 0.2)) == 10
    assert repair_times(200, 10, 0.2)[0] == 39
    assert repair_times(200, 10, 0.2)[-1] == 0
    assert len(set(repair_times(200, 50, 0.05))) == len(repair_times(200, 50, 0.05))


def test_patch_denoiser_learns_and_strength_zero_changes_nothing(views):
    images = torch.stack([v.rgb for v in views])
    blurred = torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
    prior = PatchDenoiserRepair(patch=16, fit_steps=300, batch=16, widths=(8, 8, 16), lr=3e-3)
    with pytest.raises(InvalidInput, match="not been fitted"):
        prior.repair(blurred, strength=0.2, generator=rng())
    untrained = replace(prior, fit_steps=0)
    untrained.fit(blurred, images, generator=rng(0))
    assert torch.allclose(untrained.repair(blurred, strength=0.3, generator=rng()), blurred, atol=1e-5)
    prior.fit(blurred, images, generator=rng(0))
    repaired = prior.repair(blurred, strength=0.3, generator=rng())
    assert (repaired - images).square().mean() < 0.8 * (blurred - images).square().mean()
    assert torch.equal(prior.repair(blurred, strength=0.0, generator=rng()), blurred)
    one, two = (prior.repair(blurred, strength=0.3, generator=rng(5)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == images.shape
    assert 0 <= one.min() <= one.max() <= 1


def test_path_passes_the_photos_smoothly():
    cameras = ring(6, radius=2.0)
    path = smooth_path(cameras, 60, closed=True)
    centres = torch.stack([c.centre for c in path])
    assert torch.cdist(torch.stack([c.centre for c in cameras]), centres).amin(1).max() < 0.12
    step = (centres.roll(-1, 0) - centres).norm(dim=1)
    assert step.max() < 2 * step.min()


def test_enhancement_keeps_a_still_scene(views):
    frames = torch.stack([views[0].rgb] * 3)
    depths = torch.stack([views[0].depth] * 3)
    noisy = (frames + 0.1 * torch.randn(frames.shape, generator=rng(0))).clamp(0, 1)
    after = TemporalFilterEnhance().enhance(noisy, depths, [views[0].camera] * 3, strength=0.2, generator=rng(0))
    assert (after[1] - frames[1]).abs().mean() < 0.75 * (noisy[1] - frames[1]).abs().mean()


# ---------------------------------------------------------------- the whole


BUDGET = Budget(align_steps=60, steps=20, refine_steps=8, splats=400, virtual_per_gap=2, path_frames=4, keep_early=2)


def run(views, **options):
    images = [v.rgb for v in views]
    mono = OracleMonoPrior(views)
    options = {"budget": BUDGET, "switches": Switches(rounds=2), **options}
    repair = PatchDenoiserRepair(patch=16, fit_steps=3, batch=4, widths=(8, 8, 8))
    return reconstruct(images, stereo_prior=OracleStereoPrior(views), depth_prior=mono, repair_prior=repair, video_prior=TemporalFilterEnhance(), generator=rng(0), **options)  # fmt: skip


def test_all_stages_and_their_report(scene, views, tmp_path):
    result = run(views)
    assert result.report["repair"].startswith("patch denoiser")
    assert result.report["enhancement"].startswith("temporal median")
    assert result.report["rasteriser"] == "PyTorch, on cpu"
    assert "simulated" in result.report["stereo"]
    assert result.enhanced is not None
    assert result.frames.shape == (4, SIZE, SIZE, 3)
    scores = score_pose_free(result.scene, result.cameras, scene.train, scene.test[:2], torch.stack([scene.view(c, supersample=2).rgb for c in scene.test[:2]]), steps=5)  # fmt: skip
    assert scores.refined.psnr >= scores.mapped.psnr
    assert scores.poses.rotation_degrees.max() < 5
    without = run(views, switches=replace(Switches(), repair=False, enhancement=False, cleaning=False))
    assert without.report["repair"] is None
    assert without.enhanced is None
    assert "removed" not in without.report


def test_a_stopped_run_goes_on_and_ends_where_an_undisturbed_one_ends(views, tmp_path):
    whole = run(views)

    class Stop(Exception):
        pass

    def stop(stage, step, steps):
        if stage == "refine":
            raise Stop

    store = StageStore.of(tmp_path, [v.rgb for v in views], BUDGET)
    with pytest.raises(Stop):
        run(views, stages=store, progress=stop)
    assert sorted(p.name.split("-")[0] for p in tmp_path.iterdir()) == ["repair", "start", "train"]
    seen = []
    resumed = run(views, stages=store, progress=lambda stage, step, steps: seen.append(stage))
    assert "align" not in seen
    assert "train" not in seen
    for name in NAMES:
        assert torch.equal(getattr(resumed.scene, name), getattr(whole.scene, name)), name
    other = StageStore.of(tmp_path, [v.rgb for v in views], replace(BUDGET, steps=21))
    assert other.get("start", rng()) is None


def test_photos_that_cannot_be_used(views):
    images = [v.rgb for v in views]
    prior = OracleStereoPrior(views)
    with pytest.raises(InvalidInput, match="at least two photos"):
        reconstruct(images[:1], stereo_prior=prior)
    with pytest.raises(InvalidInput, match=r"one size.*photo_01 \(20 x 24\)"):
        reconstruct([images[0], images[1][:, :20]], stereo_prior=prior)
    with pytest.raises(InvalidInput, match=r"\[0, 1\]"):
        reconstruct([images[0], images[1] * 255], stereo_prior=prior)
    with pytest.raises(InvalidInput, match="mode"):
        reconstruct(images, stereo_prior=prior, mode="sideways")  # type: ignore[arg-type]
