"""Everything that a run can be asked: each switch alone, the length, the options that are off by default, what a finished run leaves."""

from __future__ import annotations

import math
from dataclasses import asdict, astuple, fields, replace
from typing import Any

import pytest
import torch

from surefoot.errors import InvalidInput
from surefoot.geometry.lm_gaussian import (
    Budget,
    MultiModalLoss,
    OracleMonoPrior,
    OracleStereoPrior,
    PatchDenoiserRepair,
    Rates,
    Switches,
    TemporalFilterEnhance,
    all_pairs,
    distill,
    reconstruct,
    render_path,
    repaired_views,
    score_views,
    train_scene,
    train_splats,
)
from surefoot.geometry.lm_gaussian.stages import StageStore
from surefoot.geometry.lm_gaussian.start import start_scene
from surefoot.nn.geometry.ply import load_splats
from surefoot.nn.geometry.rasterizer import rasterize
from surefoot.nn.geometry.splats import NAMES, GaussianScene

pytest.importorskip("skimage")
SIZE, COUNT = 24, 4  # of the photos in `views`
BUDGET = Budget(align_steps=6, steps=10, refine_steps=8, splats=250, virtual_per_gap=2, path_frames=3, keep_early=2)
FLAGS = [f.name for f in fields(Switches) if f.type == "bool"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class Normals:
    name = "simulated normals"

    def __init__(self, views):
        self.prior = OracleMonoPrior(views)

    def predict(self, index, image):
        return self.prior.predict_normals(index, image)


def run(views, **options):
    repair = PatchDenoiserRepair(patch=24, fit_steps=2, batch=4, widths=(8, 8, 8), sample_steps=2)
    options = {"budget": BUDGET, "switches": Switches(rounds=2), "repair_prior": repair, "video_prior": TemporalFilterEnhance(), **options}  # fmt: skip
    if options["video_prior"] == "with repair":
        options["video_prior"] = TemporalFilterEnhance(repair)
    return reconstruct([v.rgb for v in views], stereo_prior=OracleStereoPrior(views), depth_prior=OracleMonoPrior(views), normal_prior=Normals(views), generator=rng(), **options)  # fmt: skip


def same(a, b):
    return len(a.scene) == len(b.scene) and all(torch.equal(getattr(a.scene, n), getattr(b.scene, n)) for n in NAMES)


# ---------------------------------------------------------------------------------------------------------- switches


@pytest.fixture(scope="module")
def whole(views):
    return run(views)


@pytest.mark.parametrize("flag", FLAGS)
def test_every_switch_alone_runs_and_changes_the_result(views, whole, flag):
    switches = replace(Switches(rounds=2), **{flag: not getattr(Switches(), flag)})
    result = run(views, switches=switches)
    assert all(torch.isfinite(getattr(result.scene, name)).all() for name in NAMES)
    assert result.report["switches"][flag] is getattr(switches, flag)
    assert result.frames.shape == (3, SIZE, SIZE, 3) and torch.isfinite(result.frames).all()
    if flag == "enhancement":  # it changes the video alone
        assert result.enhanced is None and same(result, whole)
    elif flag != "mask_unreliable":  # which finds nothing in so weak a repair; see below
        assert not same(result, whole)
    if flag == "repair":
        assert result.report["repair"] is None and all("round" not in record for record in result.history)


def test_all_switches_off_is_plain_splatting(views):
    off = replace(Switches(rounds=1), **dict.fromkeys(FLAGS, False))
    result = run(views, switches=off)
    assert set(result.history[0]) == {"photometric", "step", "splats", "visible", "coverage", "train_psnr"}
    assert result.enhanced is None and "removed" not in result.report


def test_rounds(views):
    seen = {n: {record.get("round") for record in run(views, switches=Switches(rounds=n)).history} for n in (1, 3)}
    assert seen == {1: {None, 0.0}, 3: {None, 0.0, 1.0, 2.0}}
    with pytest.raises(InvalidInput, match="rounds"):
        Switches(rounds=0)


# -------------------------------------------------------------------------------- options that are off by default


def aligned(views, **switches):
    off = {"cleaning": False, "cross_view": False, "background": False, **switches}
    prior = OracleStereoPrior(views)
    return start_scene([v.rgb for v in views], prior, names=list("abcd"), depth_prior=OracleMonoPrior(views), switches=replace(Switches(), **off), budget=replace(BUDGET, align_steps=30), generator=rng())  # fmt: skip


def test_depth_scope_chooses_who_is_moved_by_the_mono_depth(views):
    """What stereo is sure of hardly moves under the mono depth (only with the poses), but for scope "all"; the rest moves under both."""
    plain, unsure, everyone = aligned(views, depth_guidance=False), aligned(views), aligned(views, depth_scope="all")
    total, stereo = torch.zeros(COUNT, SIZE, SIZE), OracleStereoPrior(views)
    for i, j in all_pairs(COUNT):
        pair = stereo.predict(i, j, views[i].rgb, views[j].rgb)
        total[i] += pair.conf_i
        total[j] += pair.conf_j
    sure = total / (2 * (COUNT - 1)) >= 5
    depths = [a.aligned for a in (plain, unsure, everyone)]
    base, free, whole = (d for d in depths if d is not None)
    moved = [float((d[sure] / base[sure]).log().std()) for d in (free, whole)]
    assert moved[0] < 0.006 and moved[1] > 4 * moved[0]
    assert (free[~sure] / base[~sure]).log().std() > 0.03
    with pytest.raises(InvalidInput, match="depth_scope"):
        Switches(depth_scope="some")  # type: ignore[arg-type]


def test_the_adaptor_undoes_stretched_pairs(views):
    """Pairs that stretch depth against width: with known intrinsics the true depths come back only with the adaptor."""
    exact = OracleStereoPrior(views, depth_noise=0, outlier=0, far_bias=0, far_noise=0, edge_bleed=False)

    class Stretched:
        name = "stretched"

        def predict(self, i, j, image_i, image_j):
            pair = exact.predict(i, j, image_i, image_j)
            factor = torch.tensor([1.0, 1.0, 1.05 if (i + j) % 2 else 1 / 1.05])
            return pair._replace(points_i=pair.points_i * factor, points_j=pair.points_j * factor)

    errors = []
    for adaptor in (False, True):
        start = start_scene([v.rgb for v in views], Stretched(), names=list("abcd"), K=views[0].camera.K, switches=replace(Switches(), adaptor=adaptor, cleaning=False), budget=replace(BUDGET, align_steps=150), generator=rng())  # fmt: skip
        assert start.aligned is not None
        ratio = (start.aligned / torch.stack([v.depth for v in views])).log()
        errors.append(float(ratio.std()))
    assert errors[1] < 5e-4 < 2e-3 < errors[0]


class Repaint:
    """Repairs the left half a little and paints the right half anew."""

    name = "repaint"

    def fit(self, degraded, clean, *, generator):
        pass

    def repair(self, renders, *, strength, generator):
        half = renders.shape[2] // 2
        return torch.cat([renders[:, :, :half] + 0.02, 1 - renders[:, :, half:]], 2)


def test_unreliable_repairs_train_nothing(views):
    scene = GaussianScene.from_points(torch.rand(200, 3, generator=rng()) - 0.5, torch.zeros(200, 3))
    cameras = [v.camera for v in views]
    asked = {"strength": 0.2, "generator": rng()}
    masked = repaired_views(scene, cameras[:2], cameras, Repaint(), mask_unreliable=True, **asked)
    assert bool(repaired_views(scene, cameras[:2], cameras, Repaint(), **asked).masks.all())
    assert bool(masked.masks[:, :, :4].all()) and not masked.masks[:, :, -4:].any()
    results = [run(views, repair_prior=Repaint(), switches=Switches(rounds=1, mask_unreliable=flag), video_prior=None) for flag in (False, True)]  # fmt: skip
    assert not same(*results)  # reached through the whole method


# -------------------------------------------------------------------------------------------------- the length of a run


def test_schedules_scale():
    assert Budget.of() == Budget() and Budget.of(device="cuda") == Budget.full("360")
    assert Budget.of("forward", device="cuda:0") == Budget.full("forward")
    full = Budget.full("360").scaled(3000)  # a tenth
    assert (full.steps, full.refine_steps, full.filter_every, full.depth_normal_from) == (1200, 1800, 10, 600)
    short = Budget().scaled(300)
    assert (short.steps, short.refine_steps, short.filter_every) == (210, 90, None)
    assert (Budget().scaled(2).steps, Budget().scaled(2).refine_steps) == (1, 1)
    assert (Budget().scaled(300, refined=False).steps, Budget().scaled(300, refined=False).refine_steps) == (300, 0)
    with pytest.raises(InvalidInput, match="steps must be an integer of at least 2"):
        Budget().scaled(1)
    with pytest.raises(InvalidInput, match="mode"):
        Budget.of("sideways", device="cuda")  # type: ignore[arg-type]


def test_rates_go_with_the_length():
    assert Rates.of(500) == Rates.of(100) == Rates() and Budget.of(steps=400).rates == Rates()
    lengths: list[tuple[Any, int]] = [("360", 30_000), ("forward", 12_000)]
    for mode, steps in lengths:
        assert astuple(Budget.of(mode, steps=steps).rates) == pytest.approx(astuple(Rates.full(mode)), rel=1e-12)
    middle = Rates.of(round(math.sqrt(500 * 30_000)))
    assert middle.means == pytest.approx(math.sqrt(4e-3 * 1e-4), rel=1e-3)


def test_steps_of_a_run(views):
    result = run(views, steps=9, switches=Switches(rounds=3))
    last = {record.get("round"): record["step"] for record in result.history}
    assert last == {None: 5, 0.0: 2, 1.0: 1, 2.0: 1}  # 5 + 4 of 9, as 10 + 8 of 18
    assert result.report["budget"]["steps"] == 5
    few = run(views, steps=2, switches=Switches(rounds=3))  # fewer steps than rounds: one round at least
    assert {record.get("round") for record in few.history} == {None, 0.0}
    alone = run(views, steps=6, repair_prior=None, video_prior=None)
    assert alone.report["budget"]["steps"] == 6 == alone.history[-1]["step"]


def test_depth_is_coupled_with_normals_in_forward_mode_from_its_step_on(views):
    images = torch.stack([v.rgb for v in views])
    start = aligned(views)
    histories = {}
    modes: list[tuple[Any, int]] = [("forward", 5), ("forward", 6000), ("360", 0)]
    for mode, begins in modes:
        _, course = train_scene(start, images, mode=mode, switches=replace(Switches(), virtual_views=False), budget=replace(BUDGET, steps=8, depth_normal_from=begins), generator=rng())  # fmt: skip
        histories[mode, begins] = ["depth_normal" in record for record in course.history]
    assert histories == {("forward", 5): [False, True], ("forward", 6000): [False, False], ("360", 0): [False, False]}
    loss = MultiModalLoss(lam_dn=0.05, dn_from=5)
    assert [loss.needs_normals(step) for step in (4, 5)] == [False, True]


# ------------------------------------------------------------------------------------------------------------ distilling


def test_frames_fed_back_pull_the_splats_weakly(views):
    images, cameras = torch.stack([v.rgb for v in views]), [v.camera for v in views]
    path = cameras[:1]
    wanted = torch.ones(1, SIZE, SIZE, 3)

    def distance(weight):
        scene = GaussianScene.from_points(torch.rand(200, 3, generator=rng()) - 0.5, torch.rand(200, 3, generator=rng(1)))  # fmt: skip
        before = (render_path(scene, path)[0] - wanted).abs().mean()
        if weight:
            distill(scene, cameras, images, path, wanted, steps=25, weight=weight, generator=rng(2))
        else:
            train_splats(scene, cameras, images, steps=25, generator=rng(2))
        return float((render_path(scene, path)[0] - wanted).abs().mean() - before)

    none, weak, strong = distance(0), distance(0.2), distance(2.0)
    assert strong < weak < none  # towards the frames, the more the larger the weight
    scene = GaussianScene.from_points(torch.rand(9, 3), torch.rand(9, 3))
    with pytest.raises(InvalidInput, match="1 cameras for 2 enhanced frames"):
        distill(scene, cameras, images, path, wanted.expand(2, -1, -1, -1), steps=1, generator=rng())


class White:
    name = "white"

    def enhance(self, frames, depths, cameras, *, strength, generator):
        return torch.ones_like(frames)


def enhanced(result) -> torch.Tensor:
    assert result.enhanced is not None
    return result.enhanced


def test_distilling_in_the_whole_method_keeps_before_and_after_apart(views, tmp_path):
    plain = run(views, video_prior=White())
    assert plain.undistilled is None and plain.distilled is None and "distillation" not in plain.report
    budget = replace(BUDGET, distill_steps=6)
    result = run(views, video_prior=White(), budget=budget)
    assert same(replace(result, scene=result.undistilled), plain) and not same(result, plain)
    assert torch.equal(result.frames, plain.frames) and torch.equal(enhanced(result), enhanced(plain))
    torch.testing.assert_close(result.distilled, render_path(result.scene, result.path)[0])
    found = result.report["distillation"]
    photos = torch.stack([v.rgb for v in views])
    for when, scene in (("before", plain.scene), ("after", result.scene)):
        assert found[when]["train_psnr"] == score_views(scene, result.cameras, photos).psnr
    assert [record.get("distilling") for record in result.history] == [None] * len(plain.history) + [1.0, 1.0]
    for nobody in ({"video_prior": None}, {"switches": Switches(enhancement=False)}):
        with pytest.raises(InvalidInput, match="nobody enhances them"):
            run(views, budget=budget, **nobody)


def test_an_interrupted_distillation_goes_on_and_a_finished_run_asks_nobody(views, tmp_path):
    class Stop(Exception):
        pass

    def stop(stage, step, steps):
        if (stage, step) == ("distill", 4):
            raise Stop

    budget = replace(BUDGET, distill_steps=6)
    undisturbed = run(views, budget=budget)
    store = replace(StageStore.of(tmp_path, [v.rgb for v in views], budget), seconds=0)
    with pytest.raises(Stop):
        run(views, budget=budget, stages=store, progress=stop)
    seen = []
    resumed = run(views, budget=budget, stages=store, progress=lambda stage, step, steps: seen.append((stage, step)))
    assert seen == [("distill", 4), ("distill", 5), ("distill", 6)] or seen == [("distill", 5), ("distill", 6)]
    assert same(resumed, undisturbed) and torch.equal(enhanced(resumed), enhanced(undisturbed))
    assert resumed.history == undisturbed.history
    again = run(views, budget=budget, stages=store, progress=lambda *_: pytest.fail("a finished run trains nothing"))
    assert same(again, undisturbed)


def test_a_run_stopped_after_stage_2_still_has_its_repair_model_in_stage_3(views, tmp_path):
    class Broken:
        name = "broken"

        def enhance(self, *a, **k):
            raise KeyboardInterrupt

    store = StageStore.of(tmp_path, [v.rgb for v in views], BUDGET)
    with pytest.raises(KeyboardInterrupt):
        run(views, stages=store, video_prior=Broken())
    resumed = run(
        views, stages=store, video_prior="with repair"
    )  # it asks the repair model, which another process fitted
    assert torch.equal(enhanced(resumed), enhanced(run(views, video_prior="with repair")))


# ----------------------------------------------------------------------------------------------------- what comes out


def test_the_result_saves_and_walks(whole, tmp_path):
    whole.save_ply(tmp_path / "scene.ply")
    loaded = load_splats(tmp_path / "scene.ply")
    camera = whole.cameras[0]
    torch.testing.assert_close(rasterize(loaded, camera).rgb, rasterize(whole.scene, camera).rgb, atol=1e-6, rtol=0)
    whole.save_colmap(tmp_path / "sparse")
    assert {p.stem for p in (tmp_path / "sparse").iterdir()} >= {"cameras", "images", "points3D"}
    assert whole.render_path(5).shape == (5, SIZE, SIZE, 3)
    torch.testing.assert_close(whole.render_path(BUDGET.path_frames), whole.frames)
    assert torch.equal(whole.points, whole.cloud.points)
    assert whole.to_dict()["budget"] == asdict(BUDGET)
