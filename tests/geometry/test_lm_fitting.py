"""Fitting the repair model, stopped and killed, ends where an undisturbed fit ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from surefoot.errors import InvalidInput
from surefoot.geometry.lm_gaussian import (
    Budget,
    DiffusersControlNetRepair,
    OracleStereoPrior,
    PatchDenoiserRepair,
    Switches,
    reconstruct,
)
from surefoot.geometry.lm_gaussian.stages import StageStore
from surefoot.nn.geometry.splats import NAMES

pytest.importorskip("skimage")
STEPS = 9


class Stop(Exception):
    pass


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures():
    clean = torch.rand(2, 16, 20, 3, generator=rng(1))
    return 0.5 * clean + 0.2, clean


def patch_prior(**settings):
    return PatchDenoiserRepair(**{"patch": 16, "fit_steps": STEPS, "batch": 4, "widths": (8, 8, 8), "sample_steps": 2, **settings})  # fmt: skip


def lora_prior(folder, **settings):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    return DiffusersControlNetRepair.from_folder(folder, **{"crop": 16, "fit_steps": STEPS, "rank": 4, "alpha": 2.0, "lr": 2e-2, "sample_steps": 5, **settings})  # fmt: skip


@pytest.fixture(params=["patch", "lora"])
def make(request):
    """A maker of priors of one kind; the large one's models are read from disk by every prior anew, as another process would."""
    if request.param == "patch":
        return patch_prior
    folder = request.getfixturevalue("controlnet_folder")
    return lambda **settings: lora_prior(folder, **settings)


def stops(*at):
    """An `on_step` that is interrupted at these steps, once each, and remembers all that it was told."""
    left, seen = list(at), []

    def on_step(step, steps, loss):
        seen.append(step)
        if left and step == left[0]:
            left.pop(0)
            raise Stop

    return on_step, seen


def tensors(state):
    """All tensors of a nested state, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    return [t for key in sorted(state) for t in tensors(state[key])] if isinstance(state, dict) else []


def assert_same(one, other):
    mine, theirs = tensors(one.state_dict()), tensors(other.state_dict())
    assert len(mine) == len(theirs) > 10
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert one.losses_ == other.losses_ and len(one.losses_) == STEPS


def undisturbed(make):
    prior, generator = make(), rng(3)
    prior.fit(*pictures(), generator=generator)
    return prior, generator


def test_an_interrupted_fit_ends_bit_equal(make, tmp_path):
    whole, end = undisturbed(make)
    on_step, seen = stops(2, 3, 7)
    store = StageStore(tmp_path, "key", seconds=0)
    for _ in range(3):
        prior = make(on_step=on_step)
        with pytest.raises(Stop):
            prior.fit(*pictures(), generator=rng(3), checkpoint=store.checkpoint("repair"))
        assert prior.net_ is None and prior.losses_ == []  # an interrupted fit leaves the prior as it was
    prior, generator = make(on_step=on_step), rng(3)
    prior.fit(*pictures(), generator=generator, checkpoint=store.checkpoint("repair"))
    assert seen == list(range(1, STEPS + 1))  # no step was taken twice
    assert_same(prior, whole)
    assert torch.equal(generator.get_state(), end.get_state())


def half_done(make, store):
    with pytest.raises(Stop):
        make(on_step=stops(4)[0]).fit(*pictures(), generator=rng(3), checkpoint=store.checkpoint("repair"))


def test_forgotten_moments_would_be_noticed(make, tmp_path):
    """The comparison can fail: the same fit taken up without AdamW's moments ends elsewhere."""
    whole, _ = undisturbed(make)
    store, generator = StageStore(tmp_path, "key", seconds=0), rng()
    half_done(make, store)
    saved = store.get("repair_unfinished", generator)
    assert saved is not None
    saved["optimizer"]["state"] = {}
    store.put("repair_unfinished", saved, generator)
    prior = make()
    prior.fit(*pictures(), generator=rng(3), checkpoint=store.checkpoint("repair"))
    assert prior.losses_[:5] == whole.losses_[:5] != prior.losses_[5:]
    assert not all(torch.equal(a, b) for a, b in zip(tensors(prior.state_dict()), tensors(whole.state_dict()), strict=True))  # fmt: skip


@pytest.mark.parametrize("what", ["another fit", "a damaged file"])
def test_what_cannot_be_taken_up_is_passed_over(make, tmp_path, what):
    """A checkpoint of other settings, or one that cannot be read: the fit begins anew, and no draw is shifted."""
    whole, end = undisturbed(make)
    store = StageStore(tmp_path, "key", seconds=0)
    half_done(make if what == "a damaged file" else lambda **k: make(lr=3e-3, **k), store)
    if what == "a damaged file":
        file = tmp_path / "repair_unfinished-key.pt"
        file.write_bytes(file.read_bytes()[:-200])
    on_step, seen = stops()
    prior, generator = make(on_step=on_step), rng(3)
    prior.fit(*pictures(), generator=generator, checkpoint=store.checkpoint("repair"))
    assert seen[0] == 1
    assert_same(prior, whole)
    assert torch.equal(generator.get_state(), end.get_state())


def test_a_fit_that_diverges_says_so_at_once(make):
    on_step, seen = stops()
    prior, (degraded, clean) = make(on_step=on_step), pictures()
    clean = torch.full_like(clean, float("nan"))
    with pytest.raises(InvalidInput, match="loss became NaN or infinite; lower lr"):
        prior.fit(degraded, clean, generator=rng())
    assert seen == [] and prior.net_ is None


# ------------------------------------------------------------------------------------------------------- the whole method

BUDGET = Budget(align_steps=4, steps=6, refine_steps=4, splats=150, virtual_per_gap=1, path_frames=2, keep_early=2)


def whole_method(views, prior, **options):
    return reconstruct([v.rgb for v in views], stereo_prior=OracleStereoPrior(views), repair_prior=prior, budget=BUDGET, switches=Switches(rounds=1, cross_view=False), generator=rng(), **options)  # fmt: skip


class TakesNoCheckpoint:
    """A person's own prior, of the old kind: kept when it is fitted, and its fit takes no checkpoint."""

    name = "own"

    def __init__(self):
        self.fits = 0

    def fit(self, degraded, clean, *, generator):
        self.fits += 1

    def repair(self, renders, *, strength, generator):
        return renders

    def state_dict(self):
        return {"fits": self.fits}

    def load_state_dict(self, state):
        self.fits = state["fits"]


def test_priors_whose_fit_takes_no_checkpoint_still_serve(views, tmp_path):
    prior = TakesNoCheckpoint()
    whole_method(views, prior, stages=StageStore(tmp_path, "key", seconds=0))
    assert prior.fits == 1


SCRIPT = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {here!r})
import test_lm_fitting as t
from surefoot.datasets.scenes import courtyard360
scene = courtyard360(24, train=4)
views = [scene.view(camera, supersample=1) for camera in scene.train]
settings = {{"on_step": lambda step, *_: print(step, flush=True)}}
prior = t.patch_prior(**settings) if {folder!r} is None else t.lora_prior({folder!r}, **settings)
result = t.whole_method(views, prior, stages=t.StageStore(Path({store!r}), "key", seconds=0))
torch.save([prior.state_dict(), [getattr(result.scene, n).detach() for n in t.NAMES]], {out!r})
"""


@pytest.mark.slow
def test_a_process_killed_in_the_fit_goes_on_and_ends_bit_equal(make, views, request, tmp_path):
    """SIGKILL gives no chance to tidy up: what is on disk must be whole."""
    whole = make()
    scene = whole_method(views, whole).scene
    folder = None if isinstance(whole, PatchDenoiserRepair) else str(request.getfixturevalue("controlnet_folder"))
    out = tmp_path / "fitted.pt"
    script = SCRIPT.format(here=str(Path(__file__).parent), store=str(tmp_path / "stages"), out=str(out), folder=folder)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    first = []
    for at in (3, 6, None):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(int(line))
            if lines[-1] == at:
                time.sleep(0.005)  # anywhere in a step or in a save
                process.send_signal(signal.SIGKILL)
        process.wait()
        assert (process.returncode == 0) is (at is None)
        first.append(lines[0])
    assert first[0] == 1 and first[1] > 3 and first[2] > 6
    state, splats = torch.load(out)
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), tensors(whole.state_dict()), strict=True))
    assert state["losses"] == whole.losses_
    assert all(torch.equal(a, getattr(scene, name)) for a, name in zip(splats, NAMES, strict=True))
