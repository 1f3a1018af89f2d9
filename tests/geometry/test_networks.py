"""Networks of a person's own behind the priors: the answers of DUSt3R- and VGGT-like networks, Marigold and video pipelines on tiny random models that
go through the disk, the table of backends, and the command line."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import sys
from typing import Any

import pytest
import torch
from torch import nn

from surefoot.datasets.scenes import courtyard360
from surefoot.errors import InvalidInput, MissingExtra, Refused
from surefoot.geometry.lm_gaussian import (
    Budget,
    DiffusersVideoPrior,
    Dust3rPrior,
    MarigoldDepthPrior,
    MarigoldNormalsPrior,
    OracleStereoPrior,
    Switches,
    VggtPrior,
    load_backends,
)
from surefoot.geometry.lm_gaussian.backends import Backends, aligned, oriented, parse
from surefoot.geometry.lm_gaussian.diffusers_repair import DiffusersControlNetRepair
from surefoot.geometry.lm_gaussian.networks import decode_pose, nearest
from surefoot.geometry.lm_gaussian.pairs import ask_pairs
from surefoot.geometry.lm_gaussian.run import reconstruct_photos
from surefoot.nn.geometry.alignment import pose_errors
from surefoot.nn.geometry.cameras import back_project, transform
from surefoot.nn.geometry.rotations import invert_rigid, matrix_to_quaternion

SIZE = 32


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def views():
    scene = courtyard360(SIZE, train=6, test=2)
    return [scene.view(c) for c in scene.train]


def pair_maps(views, i, j):
    """The truth in the frame of camera i."""
    own = back_project(views[i].depth, views[i].camera.K, torch.eye(4))
    world = back_project(views[j].depth, views[j].camera.K, views[j].camera.w2c)
    return own, transform(views[i].camera.w2c, world)


class Dust3rLike(nn.Module):
    """Answers in DUSt3R's words; knows the photos by their `idx`."""

    def __init__(self, views):
        super().__init__()
        self.views, self.seen, self.form = views, [], "tuple"

    def forward(self, view1, view2):
        self.seen.append((view1, view2))
        i, j = view1["idx"], view2["idx"]
        X_ii, X_ji = (t[None] for t in pair_maps(self.views, i, j))
        conf = torch.full((1, SIZE, SIZE), 9.0)
        one, two = {"pts3d": X_ii, "conf": conf}, {"pts3d_in_other_view": X_ji, "conf": conf + 1}
        return {
            "tuple": (one, two),
            "inference": {"pred1": one, "pred2": two},
            "tensors": (X_ii, X_ji, conf, conf + 1),
        }[self.form]


class Flat(nn.Module):
    """A scriptable pair network of two tensors: a wall at depth 2."""

    def forward(
        self, a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        x = torch.cat([a[0, :2], torch.full_like(a[0, :1], 2.0)]).permute(1, 2, 0)
        conf = torch.full_like(x[..., 0], 3.0)
        return x, x + b.mean(), conf, conf


# ------------------------------------------------------------------------------------------------------------ DUSt3R


@pytest.mark.parametrize("form", ["tuple", "inference", "tensors"])
def test_dust3r_answers_in_its_own_words(views, form):
    network = Dust3rLike(views)
    network.form = form
    prior = Dust3rPrior(network, side=SIZE)
    pair = prior.predict(1, 3, views[1].rgb, views[3].rgb)
    own, other = pair_maps(views, 1, 3)
    torch.testing.assert_close(pair.points_i, own)
    torch.testing.assert_close(pair.points_j, other)
    assert float(pair.conf_i.min()) == 9 and float(pair.conf_j.min()) == 10
    view1, view2 = network.seen[0]
    torch.testing.assert_close(view1["img"][0], 2 * views[1].rgb.permute(2, 0, 1) - 1, atol=1e-6, rtol=0)
    assert view2["true_shape"].tolist() == [[SIZE, SIZE]] and view2["instance"] == "3"


def test_photos_are_brought_to_sides_that_the_network_takes():
    shapes = []

    def network(a, b):
        shapes.append(tuple(a["img"].shape))
        x = torch.ones(1, *a["img"].shape[2:], 3)
        return {"pts3d": x, "conf": x[..., 0]}, {"pts3d_in_other_view": x, "conf": x[..., 0]}

    pair = Dust3rPrior(network).predict(0, 1, torch.rand(270, 480, 3), torch.rand(270, 480, 3))
    assert shapes == [(1, 3, 288, 512)] and pair.points_i.shape == (270, 480, 3)


def test_maps_change_size_without_mixing_surfaces():
    depth = torch.where(torch.arange(8) < 4, 1.0, 9.0).expand(1, 8, 8)
    assert set(nearest(depth, 21, 5).unique().tolist()) == {1.0, 9.0}
    grid = torch.arange(64.0).view(1, 8, 8)
    assert torch.equal(nearest(grid, 8, 8), grid) and torch.equal(nearest(grid, 4, 4), grid[:, 1::2, 1::2])


def broken(**changes):
    def network(a, b):
        x = torch.ones(1, 32, 32, 3)
        one, two = {"pts3d": x, "conf": x[..., 0]}, {"pts3d_in_other_view": x.clone(), "conf": x[..., 0].clone()}
        one.update({k: f(one[k]) for k, f in changes.items() if k in one})
        return one, two

    return Dust3rPrior(network, side=32)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"conf": lambda t: 0 * t}, "must be positive"),
        ({"pts3d": lambda t: t / 0 - t / 0}, "NaN or infinite"),
        ({"pts3d": lambda t: -t}, "behind its own camera"),
        ({"pts3d": lambda t: t[..., :2]}, r"must be \[h, w, 3\]"),
    ],
)
def test_nonsense_of_a_stereo_network_is_named(changes, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        broken(**changes).predict(0, 1, torch.rand(32, 32, 3), torch.rand(32, 32, 3))


def test_other_failures_of_a_network_are_one_sentence():
    def raises(a, b):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    image = torch.rand(32, 32, 3)
    with pytest.raises(InvalidInput, match=r"fails on these photos .RuntimeError: mat1"):
        Dust3rPrior(raises).predict(0, 1, image, image)
    with pytest.raises(InvalidInput, match="must answer two dicts"):
        Dust3rPrior(lambda a, b: torch.ones(3)).predict(0, 1, image, image)
    with pytest.raises(InvalidInput, match="callable or a path"):
        Dust3rPrior(7)  # type: ignore[arg-type]


def test_networks_come_from_files_and_pickles_are_refused(tmp_path):
    image = torch.rand(32, 32, 3, generator=rng())
    torch.jit.script(Flat()).save(str(tmp_path / "scripted.pt"))
    program = torch.export.export(Flat(), (torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)))
    torch.export.save(program, tmp_path / "exported.pt2")
    (tmp_path / "mine.py").write_text(
        "import torch\n\ndef make():\n    def network(a, b):\n        x = torch.ones(32, 32, 3)\n        return x, x, x[..., 0] + 1, x[..., 0] + 1\n    return network\n"
    )
    for name in ("scripted.pt", "exported.pt2", "mine.py:make"):
        prior = Dust3rPrior(tmp_path / name, side=32)
        assert name in prior.name
        pair = prior.predict(0, 1, image, image)
        assert pair.points_i.shape == (32, 32, 3) and float(pair.points_i[..., 2].min()) in (1.0, 2.0)
    torch.save(Flat(), tmp_path / "pickled.pt")
    torch.save(Flat().state_dict(), tmp_path / "weights.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({"a": 1}))
    for name in ("pickled.pt", "weights.pt", "raw.pt"):
        with pytest.raises(InvalidInput, match="pickle or bare weights"):
            Dust3rPrior(tmp_path / name)
    assert Dust3rPrior(tmp_path / "pickled.pt", trust=True, side=32).predict(0, 1, image, image).conf_i.shape == (
        32,
        32,
    )
    with pytest.raises(InvalidInput, match="holds OrderedDict, not a network"):
        Dust3rPrior(tmp_path / "weights.pt", trust=True)
    with pytest.raises(InvalidInput, match="does not exist"):
        Dust3rPrior("naver/DUSt3R_ViTLarge")
    (tmp_path / "broken.pt2").write_bytes(b"nothing")
    with pytest.raises(InvalidInput, match="cannot be read as an exported network"):
        Dust3rPrior(tmp_path / "broken.pt2")


def test_pairs_of_a_network_align_to_the_true_cameras(views):
    pairs = ask_pairs(Dust3rPrior(Dust3rLike(views), side=SIZE), [v.rgb for v in views], size=(SIZE, SIZE))
    found = aligned(pairs, [f"p{k}" for k in range(6)], steps=60, cleaning=False)
    errors = pose_errors(found.cameras, [v.camera for v in views])
    assert errors.rotation_degrees.max() < 0.5 and found.registered == tuple(range(6))


# -------------------------------------------------------------------------------------------------------------- VGGT


def pose_code(camera):
    """VGGT's nine numbers, written down from its description: t, quaternion (x, y, z, w), vertical and horizontal field of view."""
    w, x, y, z = matrix_to_quaternion(camera.w2c[:3, :3])
    fov = [
        2 * math.atan(side / 2 / float(f))
        for side, f in ((camera.height, camera.K[1, 1]), (camera.width, camera.K[0, 0]))
    ]
    return torch.cat([camera.w2c[:3, 3], torch.stack([x, y, z, w]), torch.tensor(fov)])


def test_pose_code(views):
    wide = views[2].camera.resized(48, 32)
    w2c, K = decode_pose(pose_code(wide)[None], 32, 48)
    torch.testing.assert_close(w2c[0], wide.w2c[:3], atol=1e-6, rtol=0)
    torch.testing.assert_close(K[0], wide.K, atol=1e-4, rtol=0)


def vggt_like(views, form, batch=True):
    """Truth at 28 pixels in one of VGGT's forms."""
    small = [v.camera.resized(28, 28) for v in views]
    depth = nearest(torch.stack([v.depth for v in views]), 28, 28)
    conf = torch.full((len(views), 28, 28), 5.0)
    w2c, K = torch.stack([c.w2c for c in small]), torch.stack([c.K for c in small])
    world = torch.stack([back_project(d, c.K, c.w2c) for d, c in zip(depth, small, strict=True)])
    answers = {
        "code": {"pose_enc": torch.stack([pose_code(c) for c in small]), "depth": depth[..., None], "depth_conf": conf},
        "points": {"extrinsic": w2c[:, :3], "intrinsic": K, "world_points": world, "world_points_conf": conf},
        "tuple": (world, conf, w2c, K),
    }
    answer = answers[form]
    if batch and isinstance(answer, dict):
        answer = {k: t[None] for k, t in answer.items()}
    return answer


@pytest.mark.parametrize("form", ["code", "points", "tuple"])
def test_vggt_answers(views, form):
    seen = []

    def network(x):
        seen.append(x)
        return vggt_like(views, form)

    found = VggtPrior(network, side=28).reconstruct([v.rgb for v in views], [f"p{k}" for k in range(6)])
    assert seen[0].shape == (6, 3, 28, 28) and float(seen[0].min()) >= 0 and float(seen[0].max()) <= 1
    for camera, view in zip(found.cameras, views, strict=True):
        torch.testing.assert_close(camera.w2c, view.camera.w2c, atol=1e-5, rtol=0)
        torch.testing.assert_close(camera.K, view.camera.K, atol=1e-3, rtol=0)
        assert (camera.width, camera.height) == (SIZE, SIZE)
    true = nearest(nearest(torch.stack([v.depth for v in views]), 28, 28), SIZE, SIZE)
    torch.testing.assert_close(found.depths, true, atol=1e-4, rtol=1e-4)
    assert found.conf is not None and float(found.conf.min()) == 5 and len(found.cloud.points) > 100
    known = VggtPrior(network, side=28).reconstruct([v.rgb for v in views], ["p"] * 6, 3 * torch.eye(3))
    assert float(known.cameras[0].K[0, 0]) == 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: {k: v for k, v in a.items() if k != "pose_enc"}, "no cameras"),
        (lambda a: {k: v for k, v in a.items() if k != "depth"}, "no geometry"),
        (lambda a: {**a, "depth": -a["depth"]}, "behind its own camera"),
        (lambda a: {**a, "depth_conf": 0 * a["depth_conf"]}, "must be positive"),
        (lambda a: {**a, "depth": a["depth"] / 0}, "NaN or infinite"),
        (lambda a: {**a, "depth": a["depth"][:5]}, "for 6 photos"),
        (lambda a: {**a, "depth_conf": a["depth_conf"][..., :20]}, "pixels for photos of"),
        (lambda a: {**a, "extrinsic": torch.diag(torch.tensor([1, 1, -1, 1.0])).expand(6, 4, 4), "intrinsic": torch.eye(3).expand(6, 3, 3)}, "must hold rotations"),
        (lambda a: [a], "answers list"),
    ],
)  # fmt: skip
def test_nonsense_of_a_multi_view_network_is_named(views, change, sentence):
    prior = VggtPrior(lambda x: change(vggt_like(views, "code", batch=False)), side=28)
    with pytest.raises(InvalidInput, match=sentence):
        prior.reconstruct([v.rgb for v in views], [f"p{k}" for k in range(6)])


# ---------------------------------------------------------------------------------------------------------- Marigold


def marigold(make_parts, kind, **settings):
    diffusers = pytest.importorskip("diffusers")
    made = make_parts(channels=8)
    made.pop("controlnet")
    given = {"depth": diffusers.MarigoldDepthPipeline, "normals": diffusers.MarigoldNormalsPipeline}[kind]
    return given(**made, **{"default_denoising_steps": 2, "default_processing_resolution": 32, **settings})


@pytest.fixture(scope="module")
def marigold_folders(make_parts, tmp_path_factory):
    root = tmp_path_factory.mktemp("marigold")
    marigold(make_parts, "depth", prediction_type="depth").save_pretrained(root / "depth")
    marigold(make_parts, "normals", prediction_type="normals").save_pretrained(root / "normals")
    return root


def test_marigold_from_disk(marigold_folders, capfd):
    image = torch.rand(24, 30, 3, generator=rng())
    state = torch.get_rng_state()
    depth, normals = MarigoldDepthPrior(marigold_folders / "depth"), MarigoldNormalsPrior(marigold_folders / "normals")
    found = depth.predict(0, image)
    assert found.shape == (24, 30) and found.min() >= 0 and found.max() <= 1
    assert torch.equal(found, depth.predict(0, image)) and not torch.equal(found, depth.predict(1, image))
    assert "depth" in depth.name and depth.name.startswith("MarigoldDepth")
    raw = normals.pipeline_(
        image.permute(2, 0, 1)[None],
        num_inference_steps=2,
        processing_resolution=32,
        output_type="pt",
        generator=rng(0),
    ).prediction[0]
    if float((raw[2] < 0).float().mean()) > 0.5:
        with pytest.raises(InvalidInput, match="away from the camera"):
            normals.predict(0, image)
    else:
        turned = normals.predict(0, image)
        torch.testing.assert_close(turned.norm(dim=-1), torch.ones(24, 30), atol=1e-4, rtol=0)
    assert torch.equal(state, torch.get_rng_state())
    assert "Diffusion steps" not in capfd.readouterr().err


class Canned:
    """A pipeline that answers what a test says."""

    default_denoising_steps, default_processing_resolution = None, None

    def __init__(self, prediction, kind="depth"):
        self.prediction, self.config = prediction, type("Config", (), {"prediction_type": kind})

    def __call__(self, image, **settings):
        assert settings["num_inference_steps"] == 10 and settings["processing_resolution"] == 768
        return type("Answer", (), {"prediction": self.prediction})


def canned(name, prediction, kind="depth"):
    return type(name, (Canned,), {})(prediction, kind)


def test_depth_grows_with_distance_whatever_the_model_predicts():
    near_to_far = torch.linspace(0, 1, 16).expand(1, 1, 8, 16)
    image = torch.rand(8, 16, 3)
    plain = MarigoldDepthPrior(canned("MarigoldDepthPipeline", near_to_far)).predict(0, image)
    turned = MarigoldDepthPrior(canned("MarigoldDepthPipeline", 1 - near_to_far, "disparity")).predict(0, image)
    assert torch.equal(plain, near_to_far[0, 0]) and (turned[:, 1:] > turned[:, :-1]).all()
    assert float(turned.max()) == pytest.approx(20) and float(turned.min()) == pytest.approx(1 / 1.05)
    with pytest.raises(InvalidInput, match="constant on photo 0"):
        MarigoldDepthPrior(canned("MarigoldDepthPipeline", torch.ones(1, 1, 8, 16))).predict(0, image)
    with pytest.raises(InvalidInput, match="NaN"):
        MarigoldDepthPrior(canned("MarigoldDepthPipeline", near_to_far / 0)).predict(0, image)
    with pytest.raises(Refused, match="only depth and disparity"):
        MarigoldDepthPrior(canned("MarigoldDepthPipeline", near_to_far, "intrinsics"))


def test_normals_are_turned_into_our_axes(views):
    """A floor seen from above points up: Marigold says (0, 1, small), and with y down ours is (0, -1, -small); facing walls are (0, 0, -1)."""
    floor, wall, right, none = [0.0, 0.8, 0.6], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]
    given = torch.tensor([floor, wall, right, none]).T[None, :, None, :]
    found = MarigoldNormalsPrior(canned("MarigoldNormalsPipeline", given, "normals")).predict(0, torch.rand(1, 4, 3))[0]
    torch.testing.assert_close(found, torch.tensor([[0, -0.8, -0.6], [0, 0, -1.0], [1.0, 0, 0], [0, 0, 0]]))
    truth = views[0].normal  # in the camera's frame and towards it, as the losses want them
    theirs = (truth * torch.tensor([1.0, -1.0, -1.0])).permute(2, 0, 1)[None]
    assert float((theirs[0, 2] >= 0).float().mean()) > 0.5
    back = MarigoldNormalsPrior(canned("MarigoldNormalsPipeline", theirs, "normals")).predict(0, views[0].rgb)
    torch.testing.assert_close(back, truth, atol=1e-5, rtol=0)
    with pytest.raises(InvalidInput, match="away from the camera"):
        MarigoldNormalsPrior(canned("MarigoldNormalsPipeline", -theirs, "normals")).predict(0, views[0].rgb)


def test_the_wrong_pipeline_and_missing_parts_are_named(marigold_folders, tmp_path):
    with pytest.raises(Refused, match="is a MarigoldNormalsPipeline; a MarigoldDepthPipeline is needed"):
        MarigoldDepthPrior(marigold_folders / "normals")
    with pytest.raises(InvalidInput, match="is not a folder"):
        MarigoldDepthPrior("prs-eth/marigold-depth-v1-1")
    with pytest.raises(InvalidInput, match=r"no model_index.json"):
        MarigoldDepthPrior(tmp_path)
    shutil.copytree(marigold_folders / "depth", tmp_path / "depth")
    shutil.rmtree(tmp_path / "depth" / "unet")
    with pytest.raises(InvalidInput, match="lacks unet"):
        MarigoldDepthPrior(tmp_path / "depth")
    index = json.loads((marigold_folders / "depth" / "model_index.json").read_text())
    (tmp_path / "depth" / "model_index.json").write_text(json.dumps({**index, "_class_name": "NoSuchPipeline"}))
    with pytest.raises(InvalidInput, match="NoSuchPipeline"):
        MarigoldDepthPrior(tmp_path / "depth")


def test_missing_library(marigold_folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match=r"surefoot\[diffusion\]"):
        MarigoldDepthPrior(marigold_folders / "depth")


# ------------------------------------------------------------------------------------------------------------- video


@pytest.fixture(scope="module")
def image_folder(make_parts, tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    made = make_parts()
    made.pop("controlnet")
    folder = tmp_path_factory.mktemp("video") / "sd"
    diffusers.StableDiffusionPipeline(
        **made, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(make_parts, tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    made = make_parts()
    made.pop("controlnet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        motion = diffusers.MotionAdapter(
            block_out_channels=(8, 16),
            motion_layers_per_block=1,
            motion_norm_num_groups=4,
            motion_num_attention_heads=2,
            motion_max_seq_length=8,
        )
        pipe = diffusers.AnimateDiffVideoToVideoPipeline(**made, motion_adapter=motion)
    folder = tmp_path_factory.mktemp("video") / "animate"
    pipe.save_pretrained(folder)
    return folder


def test_frames_go_one_by_one_with_one_noise(image_folder):
    prior = DiffusersVideoPrior(image_folder, side=16, steps=10, batch=2)
    assert prior.name == "StableDiffusionImg2ImgPipeline (sd), frame by frame"
    frame = torch.rand(1, 18, 22, 3, generator=rng())
    frames = torch.cat([frame, 1 - frame, frame])
    state = torch.get_rng_state()
    calls, forward = [], prior.pipeline_.unet.forward
    prior.pipeline_.unet.forward = lambda *a, **k: calls.append(1) or forward(*a, **k)
    after = prior.enhance(frames, frames[..., 0], [], strength=0.2, generator=rng(1))
    assert len(calls) == 2 * 2  # strength .2 of 10 steps, two batches
    assert after.shape == frames.shape and torch.isfinite(after).all()
    torch.testing.assert_close(after[0], after[2], atol=1e-5, rtol=0)  # a still scene stays still
    assert (after[0] - after[1]).abs().max() > 1e-3
    again, other = (prior.enhance(frames, frames[..., 0], [], strength=0.2, generator=rng(s)) for s in (1, 2))
    assert torch.equal(after, again) and not torch.equal(after, other)
    assert torch.equal(prior.enhance(frames, frames[..., 0], [], strength=0.0, generator=rng()), frames)
    assert torch.equal(state, torch.get_rng_state())


def test_a_video_pipeline_is_given_the_clip(clip_folder):
    prior = DiffusersVideoPrior(clip_folder, side=16, steps=10)
    assert prior.name == "AnimateDiffVideoToVideoPipeline (animate), clip by clip"
    frames = torch.rand(4, 16, 20, 3, generator=rng())
    after = prior.enhance(frames, frames[..., 0], [], strength=0.2, generator=rng(1))
    assert after.shape == frames.shape and torch.isfinite(after).all()
    assert torch.equal(after, prior.enhance(frames, frames[..., 0], [], strength=0.2, generator=rng(1)))


def test_pipelines_that_make_no_video_are_refused(marigold_folders, image_folder):
    with pytest.raises(Refused, match="neither from video to video nor from image to image"):
        DiffusersVideoPrior(marigold_folders / "depth")
    frames = torch.rand(2, 16, 16, 3)
    with pytest.raises(InvalidInput, match="strength"):
        DiffusersVideoPrior(image_folder, side=16).enhance(frames, frames[..., 0], [], strength=2.0, generator=rng())


# ---------------------------------------------------------------------------------------------------------- backends


def test_names_of_backends():
    assert parse("stereo", "dust3r:/models/a.pt") == ("dust3r", "/models/a.pt")
    assert parse("stereo", r"vggt:C:\models\b.pt") == ("vggt", r"C:\models\b.pt")
    for question, answer, sentence in (
        ("stereo", "mast3r:x", "must be one of colmap, dust3r:PATH, vggt:PATH"),
        ("repair", "diffusers", "needs the place of the model"),
        ("enhance", "temporal:x", "takes no path"),
        ("depth", "", "must be one of none, marigold:PATH"),
    ):
        with pytest.raises(InvalidInput, match=sentence):
            parse(question, answer)
    with pytest.raises(InvalidInput, match="device 'tpu9'"):
        load_backends(device="tpu9")


def test_backends_are_what_was_asked(marigold_folders, controlnet_folder, image_folder):
    chosen: Any = load_backends(
        depth=f"marigold:{marigold_folders / 'depth'}", normals=f"marigold:{marigold_folders / 'normals'}", repair=f"diffusers:{controlnet_folder}",
        enhance=f"diffusers:{image_folder}", prompt="a courtyard",
    )  # fmt: skip
    names = [p.name for p in (chosen.depth, chosen.normals, chosen.repair, chosen.enhance)]
    assert names[:2] == ["MarigoldDepth (depth)", "MarigoldNormals (normals)"]
    assert "tiny-tile" in names[2] and "frame by frame" in names[3]
    assert chosen.repair.prompt == "a courtyard" and chosen.stereo is None
    plain: Any = load_backends()
    assert "patch denoiser" in plain.repair.name and plain.repair.name in plain.enhance.name
    nothing = load_backends(repair="none", enhance="none")
    assert (nothing.depth, nothing.normals, nothing.repair, nothing.enhance) == (None,) * 4


def test_a_depth_prior_that_runs_backwards_is_turned_over_and_said_so(views):
    depths = torch.stack([v.depth for v in views])
    conf = torch.full_like(depths, 5.0)
    same, note = oriented(2 * depths + 1, depths, conf)
    assert note is None and torch.equal(same, 2 * depths + 1)
    turned, note = oriented(1 / depths, depths, conf)
    assert torch.equal(turned, -1 / depths) and "turned over" in (note or "")


class Inverse:
    """A depth prior that gives disparity and does not say so."""

    name = "inverse depth"

    def __init__(self, views):
        self.views = views

    def predict(self, index, image):
        return 1 / self.views[index].depth


def test_a_whole_run_by_large_networks(views, controlnet_folder, image_folder, tmp_path):
    """Pairs, depth, repair and enhancement all from models on disk or stand-ins with their answers; a view is held out; the report names them."""
    from dataclasses import replace

    chosen = load_backends(repair=f"diffusers:{controlnet_folder}", enhance=f"diffusers:{image_folder}")
    assert isinstance(chosen.repair, DiffusersControlNetRepair)
    chosen = replace(
        chosen, stereo=Dust3rPrior(Dust3rLike(views), side=SIZE), depth=Inverse(views), repair=replace(chosen.repair, crop=SIZE, fit_steps=2, sample_steps=5),
        enhance=DiffusersVideoPrior(image_folder, side=SIZE, steps=5),
    )  # fmt: skip
    budget = Budget(align_steps=40, steps=8, refine_steps=2, splats=300, virtual_per_gap=2, path_frames=3, keep_early=2)
    result, held, small = reconstruct_photos(
        [v.rgb for v in views], [f"p{k}.png" for k in range(6)], size=SIZE, eval_every=6, backends=chosen, switches=Switches(rounds=1), budget=budget,
        folder=tmp_path,
    )  # fmt: skip
    report = result.report
    assert report["stereo"] == "stereo network Dust3rLike (DUSt3R-like)" and report["depth"] == "inverse depth"
    assert (
        "tiny-tile" in report["repair"]
        and "StableDiffusionImg2Img" in report["enhancement"]
        and report["normals"] is None
    )
    assert any("turned over" in note for note in report["notes"]) and report["unregistered"] == []
    assert len(result.cameras) == len(small) == 5 and held is not None and held.names == ("p0.png",)
    assert pose_errors(result.cameras, [v.camera for v in views[1:]]).rotation_degrees.max() < 1
    assert "EfficientNet" in held.scores["perceptual"] or held.scores["perceptual"].startswith("none")
    assert result.enhanced is not None and result.enhanced.shape == result.frames.shape


def test_a_multi_view_network_runs_at_two_sizes(views):
    network = VggtPrior(lambda x: vggt_like(views, "code"), side=28)
    budget = Budget(steps=4, splats=200, virtual_per_gap=1, path_frames=2)
    result, held, _ = reconstruct_photos([v.rgb for v in views], list("abcdef"), size=16, backends=Backends(stereo=network), switches=Switches(repair=False), budget=budget)  # fmt: skip
    assert held is None and result.cameras[0].width == 16 and "VGGT-like" in result.report["stereo"]
    assert pose_errors(result.cameras, [v.camera for v in views]).rotation_degrees.max() < 0.1
    assert result.report["repair"] is None and result.report["enhancement"] is None


def test_the_command_line_names_backends(views, tmp_path):
    from PIL import Image
    from typer.testing import CliRunner

    from surefoot.cli.app import app

    photos = tmp_path / "photos"
    photos.mkdir()
    for k, view in enumerate(views[:4]):
        Image.fromarray((view.rgb * 255).round().to(torch.uint8).numpy()).save(photos / f"p{k}.png")
    oracle = tmp_path / "oracle.py"
    oracle.write_text(
        "from surefoot.datasets.scenes import courtyard360\nfrom surefoot.geometry.lm_gaussian import OracleStereoPrior\n\n"
        f"scene = courtyard360({SIZE}, train=6, test=2)\nprior = OracleStereoPrior([scene.view(c) for c in scene.train])\n\n"
        "def make():\n    def network(a, b):\n        i, j = a['idx'], b['idx']\n"
        "        p = prior.predict(i, j, None, None)\n        return p.points_i, p.points_j, p.conf_i, p.conf_j\n    return network\n"
    )
    run = CliRunner()
    out = tmp_path / "scene"
    line = ["reconstruct", str(photos), "--out", str(out), "--stereo", f"dust3r:{oracle}:make", "--repair", "none", "--enhance", "none", "--mode", "forward", "--size", str(SIZE), "--steps", "10", "--splats", "300", "--json"]  # fmt: skip
    done = run.invoke(app, line)
    assert done.exit_code == 0, done.output
    report = json.loads((out / "reconstruct.json").read_text())
    assert report["stereo"] == "stereo network oracle.py:make (DUSt3R-like)" and report["enhancement"] is None
    assert "oracle.py:make" in (out / "report.html").read_text()
    bad = run.invoke(app, ["reconstruct", str(photos), "--out", str(out), "--stereo", "mast3r:x"])
    assert isinstance(bad.exception, InvalidInput) or bad.exit_code == 2


def test_the_simulator_and_a_network_that_repeats_it_give_the_same_pairs(views):
    oracle = OracleStereoPrior(views)

    def network(a, b):
        p = oracle.predict(a["idx"], b["idx"], views[a["idx"]].rgb, views[b["idx"]].rgb)
        return p.points_i, p.points_j, p.conf_i, p.conf_j

    ours, theirs = (
        Dust3rPrior(network, side=SIZE).predict(0, 2, views[0].rgb, views[2].rgb),
        oracle.predict(0, 2, views[0].rgb, views[2].rgb),
    )
    assert all(torch.equal(a, b) for a, b in zip(ours[2:], theirs[2:], strict=True))
    assert torch.allclose(invert_rigid(views[0].camera.w2c) @ views[0].camera.w2c, torch.eye(4), atol=1e-5)
