"""Every stage called alone, as a stranger would; and one sentence where what is given does not belong together."""

from __future__ import annotations

import pytest
import torch

from surefoot.errors import InvalidInput
from surefoot.geometry.lm_gaussian import (
    Budget,
    OracleMonoPrior,
    OracleStereoPrior,
    PatchDenoiserRepair,
    Switches,
    TemporalFilterEnhance,
    align_pointmaps,
    ask_pairs,
    clean_cloud,
    clean_confidence,
    cloud_of,
    collect_repair_pairs,
    enhance_video,
    local_pearson_loss,
    normal_loss,
    pearson_depth_loss,
    photometric_loss,
    reconstruct,
    refine,
    score_pose_free,
    smooth_path,
    start_scene,
    train_scene,
    virtual_cameras,
)
from surefoot.geometry.lm_gaussian.start import Start
from surefoot.nn.geometry.cameras import Camera

pytest.importorskip("skimage")
BUDGET = Budget(align_steps=20, steps=8, splats=200, virtual_per_gap=1, keep_early=2)
OFF = Switches(cross_view=False, background=False)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def photos(views):
    return torch.stack([v.rgb for v in views])


def test_stage_by_stage(views, photos):
    """Pairs, alignment, cleaning, splats, repair, film: what one stage gives is what the next one takes."""
    pairs = ask_pairs(OracleStereoPrior(views), list(photos))
    fit = align_pointmaps(pairs, names=[f"{k}.jpg" for k in range(4)], steps=20, generator=rng())
    cleaned = clean_cloud(fit.depths, fit.conf, photos, fit.w2c, fit.K, threshold=3.0, cross_view=False)
    cloud = cloud_of(cleaned.depths, cleaned.keep, photos, fit.w2c, fit.K, at_most=200, generator=rng())
    cameras = tuple(Camera(K, w2c, 24, 24, f"{k}.jpg") for k, (K, w2c) in enumerate(zip(fit.K, fit.w2c, strict=True)))
    start = Start(cameras, (0, 1, 2, 3), cloud, None, None, {})
    scene, course = train_scene(start, photos, switches=OFF, budget=BUDGET, generator=rng())
    repair = PatchDenoiserRepair(patch=16, fit_steps=2, batch=4, widths=(8, 8, 8), sample_steps=2)
    repair.fit(*collect_repair_pairs(course, photos), generator=rng())
    before = scene.means.detach().clone()
    again = refine(scene, cameras, photos, repair, virtual_cameras(cameras, 2), rounds=1, steps=4, generator=rng())
    assert again.history and not torch.equal(scene.means, before)
    frames, after = enhance_video(scene, smooth_path(cameras, 3), TemporalFilterEnhance(repair), generator=rng())
    assert frames.shape == after.shape == (3, 24, 24, 3)


def test_stage_zero_alone(views, photos):
    start = start_scene(list(photos), OracleStereoPrior(views), names=list("abcd"), depth_prior=OracleMonoPrior(views), switches=OFF, budget=BUDGET, generator=rng())  # fmt: skip
    assert [c.name for c in start.cameras] == list("abcd") and start.registered == (0, 1, 2, 3)
    assert start.report["points"] == len(start.cloud.points) <= BUDGET.splats


def test_losses_refuse_what_does_not_belong_together():
    a, b = torch.rand(8, 9), torch.rand(8, 8)
    for call in (
        lambda: pearson_depth_loss(a, b),
        lambda: local_pearson_loss(a, b, 4, generator=rng()),
        lambda: photometric_loss(torch.rand(12, 12, 3), torch.rand(12, 13, 3)),
        lambda: normal_loss(torch.rand(4, 4, 3), torch.rand(4, 5, 3)),
    ):
        with pytest.raises(InvalidInput, match=r"must have one shape, got \["):
            call()


def test_maps_and_cameras_that_do_not_belong_together_are_refused(views, photos):
    depths = torch.stack([v.depth for v in views])
    w2c, K = torch.stack([v.camera.w2c for v in views]), torch.stack([v.camera.K for v in views])
    conf = torch.full_like(depths, 10.0)
    with pytest.raises(InvalidInput, match=r"depths and conf must both be \[n, H, W\]"):
        clean_confidence(depths, conf[:, :-1], w2c, K)
    with pytest.raises(InvalidInput, match=r"K must be \[4, 4, 4\] and \[4, 3, 3\] for 4 views"):
        clean_confidence(depths, conf, w2c[:3], K)
    with pytest.raises(InvalidInput, match="images must be"):
        clean_cloud(depths, conf, photos[:, :-1], w2c, K)
    with pytest.raises(InvalidInput, match="mono_depth must have the shape"):
        clean_cloud(depths, conf, photos, w2c, K, mono_depth=depths[:, :-1])
    with pytest.raises(InvalidInput, match="for 4 views"):
        cloud_of(depths, conf > 0, photos, w2c, K[0])
    pairs = ask_pairs(OracleStereoPrior(views), list(photos))
    with pytest.raises(InvalidInput, match=r"K must be \[4, 3, 3\], one for each photo, got \[3, 3\]"):
        align_pointmaps(pairs, K=K[0])
    with pytest.raises(InvalidInput, match=r"mono_depth must be \[4, 24, 24\], the size of the maps"):
        align_pointmaps(pairs, mono_depth=depths[:, :-1])
    with pytest.raises(InvalidInput, match=r"K must be \[3, 3\]"):
        reconstruct(list(photos), stereo_prior=OracleStereoPrior(views), K=K)


def test_the_pose_free_protocol_wants_equally_many(views, photos):
    cameras = [v.camera for v in views]
    start = start_scene(list(photos), OracleStereoPrior(views), names=list("abcd"), switches=OFF, budget=BUDGET, generator=rng())  # fmt: skip
    scene, _ = train_scene(start, photos, switches=OFF, budget=BUDGET, generator=rng())
    with pytest.raises(InvalidInput, match="There are 4 estimated cameras for 3 true ones"):
        score_pose_free(scene, cameras, cameras[:3], cameras[:1], photos[:1])
    with pytest.raises(InvalidInput, match="There are 1 held-out cameras for 2 images"):
        score_pose_free(scene, cameras, cameras, cameras[:1], photos[:2])
