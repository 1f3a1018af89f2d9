"""`surefoot reconstruct`: every option reaches the library, and one that would do nothing is refused."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from surefoot.datasets.scenes import courtyard360
from surefoot.errors import InvalidInput
from surefoot.geometry.lm_gaussian import Budget, Rates, Switches

pytest.importorskip("skimage")
SIZE = 24
FLAGS = [f.name for f in fields(Switches) if f.type == "bool" and f.default]


@pytest.fixture(scope="module")
def views():
    scene = courtyard360(SIZE, train=5)
    return [scene.view(camera, supersample=1) for camera in scene.train]


def command_line(views, tmp_path):
    """Photos on disk, a stereo network that is the simulator, and the words that run it small."""
    from PIL import Image

    photos = tmp_path / "photos"
    photos.mkdir(exist_ok=True)
    for k, view in enumerate(views):
        Image.fromarray((view.rgb * 255).round().to(torch.uint8).numpy()).save(photos / f"p{k}.png")
    oracle = tmp_path / "oracle.py"
    oracle.write_text(
        "from surefoot.datasets.scenes import courtyard360\nfrom surefoot.geometry.lm_gaussian import OracleStereoPrior\n\n"
        f"scene = courtyard360({SIZE}, train={len(views)})\nprior = OracleStereoPrior([scene.view(c, supersample=1) for c in scene.train])\n\n"
        "def make():\n    def network(a, b):\n        p = prior.predict(a['idx'], b['idx'], None, None)\n"
        "        return p.points_i, p.points_j, p.conf_i, p.conf_j\n    return network\n"
    )
    out = tmp_path / "scene"
    return out, ["reconstruct", str(photos), "--out", str(out), "--stereo", f"dust3r:{oracle}:make", "--size", str(SIZE), "--steps", "10", "--splats", "300"]  # fmt: skip


def asked(monkeypatch, line):
    """What the command line hands to the library, without running it."""
    from typer.testing import CliRunner

    from surefoot.cli.app import app
    from surefoot.geometry.lm_gaussian import run

    seen = {}

    def stop(images, names, **options):
        seen.update(options)
        raise InvalidInput("seen")

    monkeypatch.setattr(run, "reconstruct_photos", stop)
    done = CliRunner().invoke(app, line)
    assert seen, done.output or done.exception
    return seen


def test_the_command_line_reaches_every_option(views, tmp_path, monkeypatch):
    _, line = command_line(views, tmp_path)
    plain = asked(monkeypatch, line[:-4])  # no --steps, no --splats
    assert plain["budget"] == Budget() and plain["switches"] == Switches(rounds=2)
    assert plain["K"] is None and not plain["optimize_poses"] and plain["backends"].repair.fit_steps == 600
    words = "--steps 700 --rounds 3 --repair-steps 5 --repair-strength 0.4 --frames 7 --distill-steps 4 --mask-unreliable --adaptor --optimize-poses --focal 40 --align-steps 70"  # fmt: skip
    seen = asked(monkeypatch, [*line, *words.split()])
    budget, switches = seen["budget"], seen["switches"]
    assert (budget.steps, budget.refine_steps, budget.repair_strength) == (490, 210, 0.4)
    assert (budget.path_frames, budget.distill_steps, budget.align_steps, budget.rates) == (7, 4, 70, Rates.of(700))
    assert switches == Switches(rounds=3, mask_unreliable=True, adaptor=True)
    assert seen["optimize_poses"] and seen["backends"].repair.fit_steps == 5
    assert seen["K"].tolist() == [[40, 0, SIZE / 2], [0, 40, SIZE / 2], [0, 0, 1]]
    for flag in FLAGS:
        seen = asked(monkeypatch, [*line, "--without", flag, "--without", "cleaning"])
        assert seen["switches"] == replace(Switches(rounds=2), **{"cleaning": False, flag: False})
        assert (seen["backends"].repair is None) == (flag == "repair")
        assert (seen["backends"].enhance is None) == (flag == "enhancement")
        assert seen["budget"].refine_steps == (0 if flag == "repair" else 3)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--repair none --repair-steps 9", "--repair-steps has nothing to act on without --repair"),
        ("--without repair --mask-unreliable", "--mask-unreliable has nothing to act on"),
        ("--repair none --repair-strength 0.2", "--repair-strength has nothing to act on"),
        ("--enhance none --distill-steps 3", "--distill-steps has nothing to act on without --enhance"),
        ("--stereo colmap --adaptor", "needs --stereo dust3r:PATH"),
        ("--stereo colmap --align-steps 9", "needs --stereo dust3r:PATH"),
        ("--depth-scope all", "needs --stereo dust3r:PATH and --depth"),
        ("--without colour", "--without must be one of depth_guidance"),
        ("--repair-strength 1.5", "at most 1"),
        ("--rounds 0", "--rounds"),
        ("--frames 1", "--frames"),
        ("--focal -3", "--focal"),
    ],
)
def test_options_that_would_do_nothing_are_refused(views, tmp_path, words, sentence):
    from typer.testing import CliRunner

    from surefoot.cli.app import app

    _, line = command_line(views, tmp_path)
    done = CliRunner().invoke(app, [*line, *words.split()])
    assert isinstance(done.exception, InvalidInput) and sentence in str(done.exception)


def test_every_option_is_explained():
    import inspect

    from surefoot.cli.app import reconstruct as verb

    for name, parameter in inspect.signature(verb, eval_str=True).parameters.items():
        assert len(parameter.annotation.__metadata__[0].help) > 10, name


def test_a_run_from_the_command_line_with_known_focal_and_frames_fed_back(views, tmp_path):
    import json

    from typer.testing import CliRunner

    from surefoot.cli.app import app

    out, line = command_line(views, tmp_path)
    focal = float(views[0].camera.K[0, 0])
    words = ["--align-steps", "12", "--repair-steps", "2", "--distill-steps", "2", "--frames", "3", "--focal", f"{focal:.6f}", "--eval-every", "5", "--without", "virtual_views"]  # fmt: skip
    done = CliRunner().invoke(app, [*line, *words])
    assert done.exit_code == 0, done.output
    report = json.loads((out / "reconstruct.json").read_text())
    assert report["focal"] == pytest.approx(focal, rel=1e-5) and report["switches"]["virtual_views"] is False
    assert report["held_out"]["before_distilling"]["psnr_fitted"] > 0 and report["distillation"]["steps"] == 2
    assert report["seed"] == 0 and torch.__version__.startswith(
        report["environment"]["packages"]["torch"].split("+")[0]
    )
    assert {"scene_undistilled.ply", "path_distilled.gif", "report.html"} <= {p.name for p in out.iterdir()}
    assert "fed back" in (out / "report.html").read_text()


def test_the_device_decides_the_default_length(views, tmp_path, monkeypatch):
    from surefoot.geometry.lm_gaussian import backends

    _, line = command_line(views, tmp_path)
    with pytest.raises(InvalidInput, match="tpu9"):
        backends.usable_device("tpu9")
    monkeypatch.setattr(backends, "usable_device", torch.device)  # as on a machine that has one
    seen = asked(monkeypatch, [*line[:-4], "--device", "cuda"])
    assert seen["budget"] == Budget.full("360")
    assert seen["device"] == torch.device("cuda")
    assert asked(monkeypatch, line[:-4])["budget"] == Budget()


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("b.mp4", b"film", "holds 1 photo, and a reconstruction needs at least two. It holds the video b.mp4"),
        ("b.png", "smaller", "The photos have 2 sizes (a.png (24 x 24), b.png (20 x 24))"),
        ("b.png", b"no picture", "b.png cannot be read as a picture"),
    ],
)
def test_bad_photos_end_with_one_sentence_and_code_2(views, tmp_path, name, data, sentence):
    import subprocess
    import sys

    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray((views[0].rgb * 255).byte().numpy()).save(folder / "a.png")
    if data == "smaller":
        Image.fromarray((views[1].rgb[:, :20] * 255).byte().numpy()).save(folder / name)
    else:
        (folder / name).write_bytes(data)
    line = [sys.executable, "-m", "surefoot.cli", "reconstruct", str(folder), "--out", str(tmp_path / "scene")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert sentence in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    assert not (tmp_path / "scene").exists()
