"""The command line: fast where it must be, one sentence and exit code 2 for bad input, JSON as promised."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

RUN = [sys.executable, "-m", "surefoot.cli"]


def surefoot(*args, cwd=None, **env):
    import os

    return subprocess.run([*RUN, *args], capture_output=True, text=True, cwd=cwd, env=os.environ | env, timeout=300)


def test_list_and_help_import_nothing_heavy():
    code = "import sys; sys.argv = ['surefoot', {!r}]\ntry:\n    from surefoot.cli import main; main()\nexcept SystemExit:\n    pass\nheavy = {{'torch', 'numpy', 'scipy', 'plotly', 'pandas'}} & set(sys.modules)\nassert not heavy, heavy"
    for verb in ("list", "--help"):
        done = subprocess.run([sys.executable, "-c", code.format(verb)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_list_json():
    start = time.perf_counter()
    done = surefoot("list", "--json")
    assert time.perf_counter() - start < 5  # the 0.4 s are measured in benchmarks/, not asserted on a busy machine
    rows = json.loads(done.stdout)
    assert len(rows) == 73
    assert set(rows[0]) == {"slug", "family", "title", "paper", "works", "verdicts"}


def test_show_and_cite():
    shown = surefoot("show", "elr")
    assert shown.returncode == 0
    assert "lam=3.0" in shown.stdout
    cited = surefoot("cite", "elr", "pissa")
    assert cited.stdout.count("@inproceedings") == 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("show", "elx"), "did you mean"),
        (("audit", "small_cnn", "--data", "nowhere"), "neither a known name"),
        (("audit", "nowhere.pt2", "--data", "digits"), "neither an embedded name"),
        (("audit", "small_cnn", "--data", "digits", "--only", "magic"), "no such instrument"),
        (("audit", "small_cnn", "--data", "digits", "--device", "abacus"), "device 'abacus'"),
        (("harden", "small_cnn", "--data", "digits", "--with", "elr,ldr"), "each bring a training loss"),
        (("harden", "small_cnn", "--data", "digits", "--with", "elr(lamb=3)"), "no setting lamb"),
        (("harden", "small_cnn", "--data", "digits", "--with", "corda"), "cannot be used as a treatment yet"),
        (("trial", "corda"), "corda"),
    ],
)
def test_bad_input(args, words, tmp_path):
    done = surefoot(*args, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_pickles_need_trust(tmp_path):
    import torch
    from torch import nn

    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), tmp_path / "m.pt")
    refused = surefoot("audit", "m.pt", "--data", "digits", "--only", "accuracy", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--trust" in refused.stderr
    trusted = surefoot("audit", "m.pt", "--data", "digits", "--only", "accuracy", "--trust", "--json", cwd=tmp_path)
    assert trusted.returncode == 0, trusted.stderr
    assert json.loads(trusted.stdout)["findings"][0]["instrument"] == "accuracy"


@pytest.mark.slow
def test_harden_then_audit_what_was_saved(tmp_path):
    done = surefoot("harden", "small_cnn", "--data", "digits", "--with", "elr,tract", "--label-noise", "0.3", "--epochs", "4", "--budget", "quick", "--only", "accuracy,translation_consistency", "--json", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    after = result["after"]["findings"][0]["value"]
    assert (tmp_path / "surefoot-report" / "index.html").exists()
    again = surefoot("audit", "surefoot-report/model", "--data", "digits", "--budget", "quick", "--only", "accuracy", "--out", "second", "--json", cwd=tmp_path)  # fmt: skip
    assert json.loads(again.stdout)["findings"][0]["value"] == pytest.approx(after, abs=1e-9)
    cited = surefoot("cite", "surefoot-report", cwd=tmp_path)
    assert "liu2020elr" in cited.stdout
    assert "petersen2024tract" in cited.stdout


@pytest.mark.slow
def test_unlabelled_photos(tmp_path):
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for i in range(6):
        Image.effect_noise((40, 40), 60 + i).convert("RGB").save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "net.py").write_text("from surefoot.models import small_cnn\ndef make(input_shape):\n    return small_cnn(input_shape, 5)\n")  # fmt: skip
    done = surefoot("audit", "net.py:make", "--data", "photos", "--budget", "quick", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert "translation_consistency" in {f["instrument"] for f in result["findings"]}
    assert "accuracy" in {s["instrument"] for s in result["skipped"]}
    assert all(s["reason"].strip()[-1] in ".!?" for s in result["skipped"])


@pytest.mark.slow
def test_an_interrupted_run_goes_on(tmp_path):
    """Killed in its training, the same command goes on from the checkpoint and ends where an undisturbed run ends."""
    args = ["harden", "small_cnn", "--data", "digits", "--with", "tract", "--epochs", "30", "--budget", "quick", "--only", "accuracy", "--json"]  # fmt: skip
    whole = surefoot(*args, "--out", "whole", cwd=tmp_path)
    running = subprocess.Popen([*RUN, *args, "--out", "killed"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 120
    while (
        not list((tmp_path / "killed").glob("training-*.pt")) and time.monotonic() < deadline and running.poll() is None
    ):
        time.sleep(0.02)
    running.kill()
    running.wait()
    assert list((tmp_path / "killed").glob("training-*.pt"))
    again = surefoot(*args, "--out", "killed", cwd=tmp_path)
    assert "Going on" in again.stderr
    values = [json.loads(run.stdout)["after"]["findings"][0]["value"] for run in (whole, again)]
    assert values[0] == values[1]
    assert not list((tmp_path / "killed").glob("training-*.pt"))
