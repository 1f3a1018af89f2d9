"""The alignment of pairwise pointmaps: on exact maps of a known scene, damaged, rescaled and interrupted."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from surefoot.datasets.scenes import courtyard360
from surefoot.errors import InvalidInput
from surefoot.geometry.lm_gaussian import (
    Backends,
    Budget,
    OracleMonoPrior,
    OracleStereoPrior,
    Switches,
    align_pointmaps,
    all_pairs,
    reconstruct,
)
from surefoot.geometry.lm_gaussian.align_fit import box_of
from surefoot.geometry.lm_gaussian.align_start import Pairs, place, pnp_pose, spanning_tree
from surefoot.geometry.lm_gaussian.priors import MonoDepthPrior
from surefoot.geometry.lm_gaussian.run import reconstruct_photos
from surefoot.geometry.lm_gaussian.stages import Checkpoint, StageStore
from surefoot.nn.geometry.alignment import pose_errors
from surefoot.nn.geometry.cameras import Camera
from surefoot.nn.geometry.rotations import invert_rigid, rotation_angle, so3_exp
from surefoot.nn.geometry.splats import NAMES

pytest.importorskip("skimage")
SIZE, COUNT = 24, 5
EXACT = {"depth_noise": 0, "outlier": 0, "far_bias": 0, "far_noise": 0, "edge_bleed": False}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def exact_pairs(scene):
    views = [scene.view(camera, supersample=1) for camera in scene.train]
    prior = OracleStereoPrior(views, **EXACT)
    return [prior.predict(i, j, views[i].rgb, views[j].rgb) for i, j in all_pairs(len(views))]


@pytest.fixture(scope="module")
def scene():
    return courtyard360(SIZE, train=COUNT, test=6)


@pytest.fixture(scope="module")
def pairs(scene):
    return exact_pairs(scene)


@pytest.fixture(scope="module")
def eight():
    return courtyard360(48)


@pytest.fixture(scope="module")
def fifty_six(eight):
    return exact_pairs(eight)


def cameras_of(fit):
    height, width = fit.depths.shape[1:]
    return [Camera(K, w2c, width, height) for K, w2c in zip(fit.K, fit.w2c, strict=True)]


def damage(parameters):
    g = rng(3)
    parameters["quat"] += 0.05 * torch.randn(parameters["quat"].shape, generator=g)
    parameters["centre"] += 0.1 * torch.randn(parameters["centre"].shape, generator=g)
    parameters["log_depth"] += 0.1 * torch.randn(len(parameters["quat"]), 1, 1, generator=g)
    parameters["focal"] += 20 * 0.05 * torch.randn(parameters["focal"].shape, generator=g)


def check_truth(fit, scene):
    errors = pose_errors(cameras_of(fit), scene.train)
    assert errors.rotation_degrees.max() < 0.1
    assert errors.ate < 1e-3 * 2.75  # the extent of the ring of cameras
    assert (fit.K[:, 0, 0] / scene.train[0].K[0, 0] - 1).abs().max() < 5e-3
    mean = sum(math.log(s) for s in fit.pair_scales.values()) / len(fit.pair_scales)
    assert mean == pytest.approx(math.log(0.5), abs=1e-6)


@pytest.mark.parametrize(("start", "steps"), [(None, 60), (damage, 500)], ids=["from the tree", "damaged"])
def test_alignment_recovers_the_truth_of_small_pictures(scene, pairs, start, steps):
    check_truth(align_pointmaps(pairs, clean_every=None, steps=steps, damage=start), scene)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False], ids=["one focal", "a focal each"])
@pytest.mark.parametrize("start", [None, damage], ids=["from the tree", "damaged"])
def test_alignment_recovers_the_truth(eight, fifty_six, start, shared):
    check_truth(align_pointmaps(fifty_six, clean_every=None, steps=500, damage=start, shared_focal=shared), eight)


# ---------------------------------------------------------------- the gauge


def changed_after_the_start(pairs, change, steps):
    """Two fits from one and the same start: of the pairs, and with both maps of the fourth pair changed."""
    start = {}

    def note(parameters):
        start.update({name: p.clone() for name, p in parameters.items()})

    def same(parameters):
        for name, p in parameters.items():
            p.copy_(start[name])

    before = align_pointmaps(pairs, clean_every=None, steps=steps, damage=note)
    other = pairs[3]._replace(points_i=change(pairs[3].points_i), points_j=change(pairs[3].points_j))
    after = align_pointmaps([*pairs[:3], other, *pairs[4:]], clean_every=None, steps=steps, damage=same)
    scales = {e: math.log(after.pair_scales[e] / before.pair_scales[e]) for e in before.pair_scales}
    return before, after, scales, scales.pop((pairs[3].i, pairs[3].j))


def check_three_times_larger(pairs, steps):
    before, after, others, own = changed_after_the_start(pairs, lambda points: 3 * points, steps)
    share = math.log(3) / len(pairs)
    assert own == pytest.approx(share - math.log(3), abs=1e-3)
    assert all(other == pytest.approx(share, abs=1e-3) for other in others.values())
    moved = pose_errors(cameras_of(after), cameras_of(before))
    assert moved.rotation_degrees.max() < 0.02
    assert moved.ate < 1e-3
    assert math.log(float(moved.similarity.scale)) == pytest.approx(-share, abs=1e-3)  # everything else grew by that


def check_moved(pairs, steps):
    """A rigid motion of both maps of a pair is the pair's own: nothing else moves."""
    turn, shift = so3_exp(0.8 * torch.randn(3, generator=rng(1))), torch.randn(3, generator=rng(2))
    before, after, others, own = changed_after_the_start(pairs, lambda points: points @ turn.mT + shift, steps)
    assert max(abs(change) for change in [own, *others.values()]) < 1e-3
    moved = pose_errors(cameras_of(after), cameras_of(before))
    assert moved.rotation_degrees.max() < 0.02
    assert moved.ate < 1e-3
    assert (after.depths / before.depths - 1).abs().max() < 1e-3


def test_the_gauge_of_small_pictures(pairs):
    """One pair three times larger: its scale falls by ln 3 (1 - 1/E), all others rise by ln 3 / E."""
    check_three_times_larger(pairs, 500)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_three_times_larger, check_moved])
def test_the_gauge(fifty_six, check):
    check(fifty_six, 500)


def test_stretched_pairs_need_the_adaptor(pairs):
    """Maps whose depth is stretched by 4 percent, volume kept: the adaptor (stored as 20 log) takes most of it."""
    stretch = torch.tensor([1.04**-0.5, 1.04**-0.5, 1.04])
    K = torch.tensor([[courtyard360(SIZE).train[0].K[0, 0].item(), 0, SIZE / 2], [0, 0, SIZE / 2], [0, 0, 1.0]])
    K[1, 1] = K[0, 0]
    odd = [p._replace(points_i=p.points_i * stretch, points_j=p.points_j * stretch) for p in pairs]
    seen = {}

    def note(parameters):
        seen.update(parameters)

    without, with_it = (
        align_pointmaps(odd, K=K.expand(COUNT, 3, 3), clean_every=None, steps=150, adaptor=a, damage=note) for a in (False, True)
    )  # fmt: skip
    assert with_it.losses[-1] < 0.5 * without.losses[-1]
    found = seen["pair_stretch"].detach()
    assert found.mean().item() == pytest.approx(20 * 0.5 * math.log(1.04), rel=0.3)


# ---------------------------------------------------------------- known poses


def known_poses(scene, photos):
    return {k: scene.train[k].w2c for k in photos}


def moved_centres(fit, scene):  # without any similarity: the frame is the known one
    found = invert_rigid(fit.w2c)[:, :3, 3]
    return (found - torch.stack([c.centre for c in scene.train])).norm(dim=1)


@pytest.mark.parametrize("photos", [(0, 2), (1, 3, 4), range(COUNT)])
def test_two_known_poses_tell_the_scale(scene, pairs, photos):
    """The known cameras stay to the bit, the others find their true places in their frame, and pair scales are the true ones."""
    fit = align_pointmaps(pairs, w2c=known_poses(scene, photos), clean_every=None, steps=300)
    for k in photos:
        assert torch.allclose(fit.w2c[k], scene.train[k].w2c, atol=2e-6)
    assert moved_centres(fit, scene).max() < 5e-3
    prior = OracleStereoPrior([scene.view(c, supersample=1) for c in scene.train], **EXACT)
    for (i, j), scale in fit.pair_scales.items():
        true = 0.5 * 4 ** float(torch.rand((), generator=prior._generator("scale", i, j)))
        assert scale * true == pytest.approx(1, abs=5e-3)


def test_one_known_pose_holds_the_frame_and_not_the_scale(scene, pairs):
    fit = align_pointmaps(pairs, w2c={2: scene.train[2].w2c}, clean_every=None, steps=200)
    assert torch.allclose(fit.w2c[2], scene.train[2].w2c, atol=1e-5)
    mean = sum(math.log(s) for s in fit.pair_scales.values()) / len(fit.pair_scales)
    assert mean == pytest.approx(math.log(0.5), abs=1e-6)
    for found, camera in zip(fit.w2c, scene.train, strict=True):
        assert rotation_angle(found[:3, :3], camera.w2c[:3, :3]) < 0.1


def test_bad_known_poses(scene, pairs):
    with pytest.raises(InvalidInput, match="Poses are given for photos 7"):
        align_pointmaps(pairs, w2c={7: torch.eye(4)})
    with pytest.raises(InvalidInput, match=r"photo 1 must be \[4, 4\]"):
        align_pointmaps(pairs, w2c={1: torch.eye(3)})
    with pytest.raises(InvalidInput, match="The pose of photo 0 must hold rotations"):
        align_pointmaps(pairs, w2c={0: -torch.eye(4)})


# ---------------------------------------------------------------- the start


def test_photos_outside_the_tree_start_by_pnp(scene, pairs):
    pytest.importorskip("cv2")
    stacked, focals = Pairs(pairs), scene.train[0].K[0, 0].expand(COUNT)
    maps, poses = spanning_tree(stacked, COUNT)
    assert 1 <= len(poses) < COUNT
    placed = place(stacked, focals, {})
    assert placed.notes == ()
    errors = pose_errors([Camera(c.K, invert_rigid(p), SIZE, SIZE) for c, p in zip(scene.train, placed.c2w, strict=True)], scene.train)  # fmt: skip
    assert errors.rotation_degrees.max() < 0.1
    k = min(set(range(COUNT)) - set(poses))
    conf = stacked.photo_confidence(COUNT)[k].flatten()
    wild = torch.where(torch.rand(SIZE**2, 1, generator=rng(4)) < 0.15, 5 * torch.randn(SIZE**2, 3, generator=rng(5)), maps[k])  # fmt: skip
    first, second = (pnp_pose(wild, conf, float(focals[k]), (SIZE, SIZE))[0] for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    assert rotation_angle(first[:3, :3], placed.c2w[k, :3, :3]) < 0.5  # with one point in seven anywhere
    noise = torch.randn(SIZE**2, 3, generator=rng(6))
    assert pnp_pose(noise, conf, float(focals[k]), (SIZE, SIZE)) == (None, "no pose explains half of its points")


def test_photos_that_are_never_first_are_placed(scene, pairs):
    """Pairs in one order only: photo 4 has no frame of its own, and PnP places it all the same."""
    pytest.importorskip("cv2")
    fit = align_pointmaps([p for p in pairs if p.i < p.j], clean_every=None, steps=200)
    assert pose_errors(cameras_of(fit), scene.train).rotation_degrees.max() < 0.1


def test_without_opencv_the_notes_say_so(scene, pairs, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    fit = align_pointmaps(pairs, clean_every=None, steps=5)
    assert any("OpenCV is not installed" in note for note in fit.notes)
    assert pose_errors(cameras_of(fit), scene.train).rotation_degrees.max() < 2.0  # five steps from starts without PnP
    with pytest.raises(InvalidInput, match="Photo 4 is never the first of a pair"):
        align_pointmaps([p for p in pairs if p.i < p.j], steps=5)


def test_a_confident_wrong_pair_is_dropped(scene, pairs):
    g = rng(1)
    wrong = pairs[2]._replace(points_j=pairs[2].points_j + 2 * torch.rand(3, generator=g), conf_i=torch.full_like(pairs[2].conf_i, 20.0), conf_j=torch.full_like(pairs[2].conf_j, 20.0))  # fmt: skip
    fit = align_pointmaps([*pairs[:2], wrong, *pairs[3:]], clean_every=None, steps=200)
    assert fit.dropped[0] == (wrong.i, wrong.j)
    assert pose_errors(cameras_of(fit), scene.train).rotation_degrees.max() < 1.0


def test_boxes_are_a_third_of_small_pictures_and_32_pixels_of_large_ones():
    assert [box_of((s, s)) for s in (8, 24, 48, 64, 96, 128, 512)] == [4, 8, 16, 21, 32, 32, 32]
    assert box_of((384, 512)) == 32


def test_bad_pairs(pairs):
    with pytest.raises(InvalidInput, match="No chain of pairs leads to photos 4"):
        align_pointmaps([p for p in pairs if 4 not in (p.i, p.j)] + [pairs[0]._replace(i=4, j=4)])
    for change, words in (
        ({"conf_i": -pairs[0].conf_i}, "must be positive"),
        ({"points_j": pairs[0].points_j * torch.nan}, "NaN"),
        ({"points_i": -pairs[0].points_i}, "behind its own camera"),
        ({"points_i": pairs[0].points_i[:5]}, "must be"),
    ):
        with pytest.raises(InvalidInput, match=words):
            align_pointmaps([pairs[0]._replace(**change), *pairs[1:]])
    with pytest.raises(InvalidInput, match="constant"):
        align_pointmaps(pairs, mono_depth=torch.ones(COUNT, SIZE, SIZE))
    with pytest.raises(InvalidInput, match="photos b, d;"):
        align_pointmaps(pairs, names=list("abcde"), mono_depth=torch.stack([torch.ones(SIZE, SIZE) if k in (1, 3) else torch.rand(SIZE, SIZE) for k in range(COUNT)]))  # fmt: skip
    with pytest.raises(InvalidInput, match="There are 2 names for 5 photos"):
        align_pointmaps(pairs, names=["a", "b"])
    with pytest.raises(InvalidInput, match="There are no pairs"):
        align_pointmaps([])


def unsure(pair):
    return pair._replace(conf_i=torch.ones_like(pair.conf_i), conf_j=torch.ones_like(pair.conf_j))


def test_photos_that_only_worthless_pairs_lead_to_are_named(pairs):
    """A network answers every pair; one of no overlap has confidence 1, which is no weight, and would leave the pose to chance."""
    loose = [unsure(p) if 3 in (p.i, p.j) else p for p in pairs]
    with pytest.raises(InvalidInput, match=r"No chain of pairs leads to photos yard\.jpg; take photos that overlap"):
        align_pointmaps(loose, names=["a.jpg", "b.jpg", "c.jpg", "yard.jpg", "e.jpg"])
    with pytest.raises(InvalidInput, match="nothing ties the photos together"):
        align_pointmaps([unsure(p) for p in pairs])
    one = [p if (p.i, p.j) == (3, 0) else unsure(p) if 3 in (p.i, p.j) else p for p in pairs]
    assert align_pointmaps(one, clean_every=None, steps=1).w2c.shape == (COUNT, 4, 4)  # one pair of weight is enough


@pytest.mark.parametrize("exact", [True, False])
def test_photos_from_one_place_collapse(scene, exact):
    """Five times the same photo: a scene from cameras that stand in one place would be a lie. A network's noise does not hide it."""
    views = [scene.view(scene.train[0], supersample=1)] * COUNT
    prior = OracleStereoPrior(views, **(EXACT if exact else {}))
    same = [prior.predict(i, j, views[i].rgb, views[j].rgb) for i, j in all_pairs(COUNT)]
    with pytest.raises(InvalidInput, match="collapsed: all cameras stand in one place"):
        align_pointmaps(same, clean_every=None, steps=80)


def test_a_fit_that_diverges_is_an_error(pairs):
    with pytest.raises(InvalidInput, match="diverged at step"):
        align_pointmaps(pairs, clean_every=None, steps=20, lr=1e4)


@pytest.mark.parametrize(("factor", "told"), [(1.0, None), (1.05, None), (1.2, "17% shorter"), (0.8, "25% longer")])
def test_a_given_focal_length_that_the_maps_contradict_is_told(scene, pairs, factor, told):
    K = torch.stack([c.K for c in scene.train])
    K[:, :2, :2] *= factor
    fit = align_pointmaps(pairs, K=K, clean_every=None, steps=3)
    said = [note for note in fit.notes if "focal length" in note]
    assert torch.equal(fit.K, K) and bool(said) is (told is not None)
    assert told is None or told in said[0]


# ---------------------------------------------------------------- stopped, and with several threads


class Stop(Exception):
    pass


def stop_at(wanted):
    def progress(step, steps, loss):
        if step == wanted:
            raise Stop

    return progress


def test_a_stopped_alignment_goes_on_to_the_same_bits(pairs, tmp_path):
    """Stopped before and after a pair was dropped, with cleaning and depth guidance, whose boxes are drawn at random."""
    g = rng(1)
    wrong = pairs[2]._replace(points_j=pairs[2].points_j + 2 * torch.rand(3, generator=g), conf_i=torch.full_like(pairs[2].conf_i, 20.0), conf_j=torch.full_like(pairs[2].conf_j, 20.0))  # fmt: skip
    some = [*pairs[:2], wrong, *pairs[3:]]
    mono = torch.rand(COUNT, SIZE, SIZE, generator=g)

    def fit(**options):
        return align_pointmaps(
            some, mono_depth=mono, steps=112, clean_every=5, adaptor=True, generator=rng(7), **options
        )

    whole = fit()
    assert whole.dropped
    store = StageStore(tmp_path, "key", seconds=0.0)
    for stop in (1, 40, 110):
        with pytest.raises(Stop):
            fit(checkpoint=store.checkpoint("align"), progress=stop_at(stop))
    steps = []

    def stop_in_the_second(step, steps_, loss):
        steps.append(step)
        if len(steps) > 1 and step == 30 and steps[0] > 30:
            raise Stop

    with pytest.raises(Stop):
        fit(checkpoint=store.checkpoint("align"), progress=stop_in_the_second)
    assert steps[0] == 111  # it went on where the last save was, and then began anew without the pair
    resumed = fit(checkpoint=store.checkpoint("align"))
    assert resumed.dropped == whole.dropped
    assert resumed.losses == whole.losses
    for name in ("w2c", "K", "depths", "conf"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name)), name


def test_a_reconstruction_stopped_in_its_alignment_goes_on(scene, tmp_path):
    views = [scene.view(camera, supersample=1) for camera in scene.train]
    photos = [view.rgb for view in views]

    def run(**options):
        return reconstruct(
            photos, stereo_prior=OracleStereoPrior(views), depth_prior=OracleMonoPrior(views), generator=rng(),
            switches=Switches(repair=False), budget=Budget(align_steps=30, steps=3, splats=200, virtual_per_gap=1, path_frames=2), **options,
        )  # fmt: skip

    whole = run()
    steps = []

    def stop(stage, step, steps_):
        if stage == "align" and step == 20:
            raise Stop

    store = StageStore.of(tmp_path, photos, "stopped")
    store = StageStore(store.folder, store.key, seconds=0.0)
    with pytest.raises(Stop):
        run(stages=store, progress=stop)
    resumed = run(stages=store, progress=lambda stage, step, _: steps.append(step) if stage == "align" else None)
    assert steps[0] == 21
    assert not list(tmp_path.glob("*unfinished*"))
    for name in NAMES:
        assert torch.equal(getattr(resumed.scene, name), getattr(whole.scene, name)), name


def test_photos_at_full_size_keep_their_alignment(scene, tmp_path, monkeypatch):
    """`reconstruct_photos`: stopped within the alignment it goes on there; stopped later, the poses are not asked for again."""
    monkeypatch.setattr(Checkpoint, "due", lambda self: True)
    views = [scene.view(camera, supersample=1) for camera in scene.train]
    mono, budget = OracleMonoPrior(views), Budget(align_steps=30, steps=3, splats=200, virtual_per_gap=1, path_frames=2)

    def run(folder, depth: MonoDepthPrior = mono, progress=None):
        priors = Backends(stereo=OracleStereoPrior(views), depth=depth)
        return reconstruct_photos([v.rgb for v in views], list("abcde"), size=SIZE, backends=priors, switches=Switches(repair=False), budget=budget, folder=folder, progress=progress)[0]  # fmt: skip

    def stop(wanted):
        def progress(stage, step, steps):
            if (stage, step) == wanted:
                raise Stop

        return progress

    whole, seen = run(None), []
    for wanted in (("align", 20), ("train", 2)):
        with pytest.raises(Stop):
            run(tmp_path, progress=stop(wanted))
    assert not list(tmp_path.glob("stages/views_unfinished*"))
    again = run(tmp_path, progress=lambda stage, step, _: seen.append((stage, step)))
    assert seen == [("train", 3)]
    assert again.report == whole.report
    for name in NAMES:
        assert torch.equal(getattr(again.scene, name), getattr(whole.scene, name)), name

    class Disparity:
        name = "disparity"

        def predict(self, index, image):
            return -mono.predict(index, image)

    first, second = (run(tmp_path, Disparity()) for _ in range(2))
    assert any("turned over" in note for note in second.report["notes"])
    assert torch.equal(first.scene.means, second.scene.means)


PROGRAM = """
import torch
from surefoot.datasets.scenes import courtyard360
from surefoot.geometry.lm_gaussian import OracleMonoPrior, OracleStereoPrior, align_pointmaps, all_pairs
torch.set_num_threads(2)
scene = courtyard360(32, train=4)
views = [scene.view(camera, supersample=1) for camera in scene.train]
prior, mono = OracleStereoPrior(views), OracleMonoPrior(views)
pairs = [prior.predict(i, j, views[i].rgb, views[j].rgb) for i, j in all_pairs(4)]
guide = torch.stack([mono.predict(k, view.rgb) for k, view in enumerate(views)])
fits = [align_pointmaps(pairs, mono_depth=guide, steps=8, generator=torch.Generator().manual_seed(0)) for _ in range(3)]
print(all(torch.equal(fit.depths, fits[0].depths) and fit.losses == fits[0].losses for fit in fits))
"""


@pytest.mark.slow
def test_several_threads_give_the_same_bits_every_time():
    """The gradients of indexed reads add up with atomics in any order; the alignment must not have any."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
