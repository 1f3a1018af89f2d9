"""Training that is stopped, killed and taken up again ends where an undisturbed run ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from surefoot.geometry.lm_gaussian import (
    Budget,
    MultiModalLoss,
    OracleMonoPrior,
    OracleStereoPrior,
    PatchDenoiserRepair,
    Rates,
    Switches,
    reconstruct,
    refine,
    train_splats,
    virtual_cameras,
)
from surefoot.geometry.lm_gaussian.simulated import oracle_cloud
from surefoot.geometry.lm_gaussian.stages import StageStore
from surefoot.nn.geometry.densification import DensificationStrategy
from surefoot.nn.geometry.splats import NAMES, GaussianScene

pytest.importorskip("skimage")
SIZE, COUNT = 24, 4  # of the photos in `views`


class Stop(Exception):
    pass


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def photos(views):
    return torch.stack([v.rgb for v in views])


@pytest.fixture(scope="module")
def cloud(views):
    return oracle_cloud(views, at_most=250, generator=rng())


def stops(*at):
    """An `on_step` that is interrupted at these calls, once each."""
    left = list(at)

    def on_step(step, steps, record):
        if left and step == left[0]:
            left.pop(0)
            raise Stop

    return on_step


def until_done(run):
    """Start again after every interruption; how many there were."""
    for count in range(50):
        try:
            return run(), count
        except Stop:
            continue
    raise AssertionError("never done")


def assert_same(one, other):
    for name in (*NAMES, "filter_3d"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.active_degree == other.active_degree


def everything(views, photos, cloud, **options):
    """A run with every kind of state: moments, degrees, filter, pruning, densification, early renderings, poses."""
    scene = GaussianScene.from_points(cloud.points, cloud.rgb, degree=1)
    generator = rng(3)
    course = train_splats(
        scene, [v.camera for v in views], photos, steps=30, generator=generator, sh_every=12, filter_every=7, prune_every=10, keep_early=3,
        multi=MultiModalLoss(mono_depth=torch.stack([v.depth for v in views])), optimize_poses=True, pose_rate=1e-3,
        strategy=DensificationStrategy(start=5, stop=25, every=8, threshold=2e-5, reset_every=None, most_splats=400), **options,
    )  # fmt: skip
    return scene, course, generator


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_interrupted_training_ends_bit_equal(views, photos, cloud, tmp_path, seed):
    whole, course, end = everything(views, photos, cloud)
    assert len(whole) != len(cloud.points)  # the number of splats changed on the way
    at = sorted((torch.randperm(29, generator=rng(seed))[:3] + 1).tolist())
    on_step, store = stops(*at), StageStore(tmp_path, "key", seconds=0)
    (resumed, again, after), interruptions = until_done(
        lambda: everything(views, photos, cloud, checkpoint=store.checkpoint("train"), on_step=on_step)
    )
    assert interruptions == 3
    assert_same(whole, resumed)
    assert again.history == course.history
    assert len(again.early) == len(course.early) > 0
    assert all(k == j and torch.equal(a, b) for (k, a), (j, b) in zip(again.early, course.early, strict=True))
    assert all(torch.equal(a.w2c, b.w2c) for a, b in zip(again.cameras, course.cameras, strict=True))
    assert torch.equal(after.get_state(), end.get_state())


def test_a_resumed_run_does_not_begin_anew(views, photos, cloud, tmp_path):
    store, seen = StageStore(tmp_path, "key", seconds=0), []
    with pytest.raises(Stop):
        everything(views, photos, cloud, checkpoint=store.checkpoint("train"), on_step=stops(20))
    everything(views, photos, cloud, checkpoint=store.checkpoint("train"), on_step=lambda step, *_: seen.append(step))
    assert seen == list(range(21, 31))


def test_forgotten_moments_would_be_noticed(views, photos, cloud, tmp_path):
    """The comparison can fail: the same run taken up without Adam's moments ends elsewhere."""
    whole, *_ = everything(views, photos, cloud)
    store = StageStore(tmp_path, "key", seconds=0)
    with pytest.raises(Stop):
        everything(views, photos, cloud, checkpoint=store.checkpoint("train"), on_step=stops(15))
    generator = rng()
    saved = store.get("train_unfinished", generator)
    assert saved is not None
    saved["optimizer"]["state"] = {}
    store.put("train_unfinished", saved, generator)
    resumed, *_ = everything(views, photos, cloud, checkpoint=store.checkpoint("train"))
    assert not torch.equal(whole.means, resumed.means)


class Brighter:
    name = "brighter"

    def __init__(self):
        self.calls = 0

    def fit(self, degraded, clean, *, generator):
        pass

    def repair(self, renders, *, strength, generator):
        self.calls += 1
        return renders + strength * torch.rand(renders.shape, generator=generator)


def test_interrupted_rounds_end_bit_equal_and_keep_their_repaired_views(views, photos, cloud, tmp_path):
    cameras = [v.camera for v in views]

    def run(prior, **options):
        scene = GaussianScene.from_points(cloud.points, cloud.rgb, degree=0)
        course = refine(scene, cameras, photos, prior, virtual_cameras(cameras, 2), rounds=3, steps=14, rates=Rates(), generator=rng(5), **options)  # fmt: skip
        return scene, course

    whole, course = run(Brighter())
    prior, on_step, store = Brighter(), stops(2, 4, 3, 1), StageStore(tmp_path, "key", seconds=0)
    (resumed, again), interruptions = until_done(lambda: run(prior, checkpoint=store.checkpoint("refine"), on_step=on_step))  # fmt: skip
    assert interruptions == 4
    assert prior.calls == 3  # no round was repaired twice
    assert_same(whole, resumed)
    assert again.history == course.history


BUDGET = Budget(align_steps=40, steps=16, refine_steps=9, splats=250, virtual_per_gap=2, path_frames=2, keep_early=2)


def whole_method(views, **options):
    return reconstruct(
        [v.rgb for v in views], stereo_prior=OracleStereoPrior(views), depth_prior=OracleMonoPrior(views), budget=BUDGET,
        repair_prior=PatchDenoiserRepair(patch=16, fit_steps=3, batch=4, widths=(8, 8, 8)), switches=Switches(rounds=2), generator=rng(), **options,
    )  # fmt: skip


def test_the_whole_method_stopped_in_both_stages_fits_its_repair_model_once(views, tmp_path, monkeypatch):
    whole, fits = whole_method(views), []
    fit = PatchDenoiserRepair.fit
    monkeypatch.setattr(PatchDenoiserRepair, "fit", lambda self, *a, **k: (fits.append(1), fit(self, *a, **k))[1])
    left = [("train", 3), ("train", 11), ("refine", 2), ("refine", 3)]

    def progress(stage, step, steps):
        if left and (stage, step) == left[0]:
            left.pop(0)
            raise Stop

    store = StageStore.of(tmp_path, [v.rgb for v in views], BUDGET)
    store = StageStore(store.folder, store.key, seconds=0)
    resumed, interruptions = until_done(lambda: whole_method(views, stages=store, progress=progress))
    assert interruptions == 4
    assert len(fits) == 1
    assert_same(whole.scene, resumed.scene)
    assert resumed.history == whole.history
    assert sorted(p.name.split("-")[0] for p in tmp_path.iterdir()) == ["refine", "repair", "start", "train"]


SCRIPT = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {here!r})
import test_lm_training as t
from surefoot.datasets.scenes import courtyard360
scene = courtyard360(t.SIZE, train=t.COUNT)
views = [scene.view(camera, supersample=1) for camera in scene.train]
def progress(stage, step, steps):
    if stage in ("train", "refine"):
        print(stage, step, flush=True)
result = t.whole_method(views, stages=t.StageStore(Path({store!r}), "key", seconds=0), progress=progress)
torch.save({{n: getattr(result.scene, n).detach() for n in t.NAMES}}, {out!r})
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_and_ends_bit_equal(views, tmp_path):
    """SIGKILL gives no chance to tidy up: what is on disk must be whole."""
    out, whole = tmp_path / "scene.pt", whole_method(views)
    script = SCRIPT.format(here=str(Path(__file__).parent), store=str(tmp_path / "stages"), out=str(out))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    first = []
    for at in (("train", 6), ("refine", 3), None):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.split())
            if at is not None and (lines[-1][0], int(lines[-1][1])) == at:
                time.sleep(0.05)  # anywhere in a step or in a save
                process.send_signal(signal.SIGKILL)
        process.wait()
        assert (process.returncode == 0) is (at is None)
        first.append(lines[0])
    assert first[0] == ["train", "1"]
    assert first[1][0] == "train" and int(first[1][1]) > 5
    assert first[2][0] == "refine"
    saved = torch.load(out)
    for name in NAMES:
        assert torch.equal(saved[name], getattr(whole.scene, name)), name
