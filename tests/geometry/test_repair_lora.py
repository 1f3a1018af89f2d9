"""The fitted LoRA in files: read by peft and diffusers, taken up by a resumed run. On tiny random models that go through the disk."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from surefoot.errors import InvalidInput
from surefoot.geometry.lm_gaussian import DiffusersControlNetRepair
from surefoot.geometry.lm_gaussian.diffusers_repair import Denoiser
from surefoot.nn.lora import add_lora_, lora_layers, shared_copy
from surefoot.nn.lora_files import load_peft_factors, lora_factors, save_peft, set_lora_factors_


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def prior(parts, **settings):
    return DiffusersControlNetRepair(parts, **{"crop": 16, "fit_steps": 4, "rank": 4, "alpha": 2.0, "lr": 2e-2, **settings})  # fmt: skip


def pictures(count=2, height=16, width=20):
    clean = torch.rand(count, height, width, 3, generator=rng(1))
    return 0.5 * clean + 0.2, clean


@pytest.fixture(scope="module")
def fitted(parts):
    repair = prior(parts)
    repair.fit(*pictures(), generator=rng())
    return repair


@pytest.fixture(scope="module")
def folder(fitted, tmp_path_factory):
    where = tmp_path_factory.mktemp("lora")
    fitted.save_lora(where)
    return where


def outputs(net, ids):
    z, t, control = torch.randn(2, 4, 8, 8, generator=rng(3)), torch.tensor([7, 400]), torch.rand(2, 3, 16, 16, generator=rng(4))  # fmt: skip
    with torch.no_grad():
        words = net.embed(ids)
        return net.noise(z, t, words, control), words


def test_peft_computes_what_was_fitted(parts, fitted, folder, make_parts):
    made = make_parts()
    theirs = Denoiser(*(peft.PeftModel.from_pretrained(made[part].eval(), str(folder / part)).eval() for part in Denoiser._fields))  # fmt: skip
    ids = parts.ids("the fox", 2)
    base = outputs(Denoiser(parts.unet, parts.controlnet, parts.text_encoder), ids)
    for ours, read, plain in zip(outputs(fitted.net_, ids), outputs(theirs, ids), base, strict=True):
        torch.testing.assert_close(read, ours, atol=1e-5, rtol=0)
        assert (ours - plain).abs().max() > 1e-2
    encoder: Any = theirs.text_encoder
    merged = encoder.merge_and_unload()
    torch.testing.assert_close(merged(ids)[0], outputs(fitted.net_, ids)[1], atol=1e-5, rtol=0)


def test_a_diffusers_pipeline_loads_unet_and_text_encoder(fitted, folder, make_parts):
    from diffusers.pipelines.controlnet.pipeline_controlnet import StableDiffusionControlNetPipeline

    none: Any = None  # the signature asks for a checker, the code takes none
    pipe = StableDiffusionControlNetPipeline(**make_parts(), safety_checker=none, feature_extractor=none, requires_safety_checker=False)  # fmt: skip
    pipe.load_lora_weights(str(folder))
    z, t, words = torch.randn(2, 4, 8, 8, generator=rng(3)), torch.tensor([7, 400]), torch.randn(2, 16, 16, generator=rng(4))  # fmt: skip
    with torch.no_grad():
        ours, theirs = (net(z, t, encoder_hidden_states=words).sample for net in (fitted.net_.unet, pipe.unet))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    # The format has no place for embeddings, so the text encoder is told apart by its linear layers.
    mine = {n: m.weight.detach() for n, m in fitted.net_.text_encoder.named_modules() if hasattr(m, "kind")}
    for name, weight in mine.items():
        layer = pipe.text_encoder.get_submodule(name)
        torch.testing.assert_close(layer.weight + layer.get_delta_weight(layer.active_adapters[0]), weight, atol=1e-6, rtol=0)  # fmt: skip
    assert len(mine) == 12


def test_a_saved_lora_replaces_fitting_to_the_bit(parts, fitted, folder):
    again = prior(parts)
    again.load_lora(folder)
    renders = pictures()[0]
    asked = {"strength": 0.1, "generator": rng(5)}
    other = prior(parts)
    other.load_state_dict(fitted.state_dict())
    first = fitted.repair(renders, **asked)
    assert torch.equal(first, again.repair(renders, **{**asked, "generator": rng(5)}))
    assert torch.equal(first, other.repair(renders, **{**asked, "generator": rng(5)}))
    assert other.losses_ == fitted.losses_
    assert again.net_ is not None
    assert not any(p.requires_grad for network in again.net_ for p in network.parameters())
    assert not torch.equal(first, prior(parts).repair(renders, **{**asked, "generator": rng(5)}))


def test_a_lora_that_does_not_fit_is_named(parts, fitted, folder, tmp_path):
    with pytest.raises(InvalidInput, match=r"alpha / rank = 0.5 and this prior has 0.25"):
        prior(parts, alpha=1.0).load_lora(folder)
    with pytest.raises(InvalidInput, match="does not fit this network"):
        prior(parts, rank=2, alpha=1.0).load_lora(folder)
    with pytest.raises(InvalidInput, match="holds no LoRA that can be read"):
        prior(parts).load_lora(tmp_path)
    with pytest.raises(InvalidInput, match="not been fitted"):
        prior(parts).save_lora(tmp_path)
    merged = prior(parts)
    merged.load_lora(folder)
    merged.merge()
    with pytest.raises(InvalidInput, match="has been merged"):
        merged.save_lora(tmp_path)


class Mixed(nn.Module):
    """Names that end alike, ranks that are cut to what a weight has."""

    def __init__(self):
        super().__init__()
        self.words, self.conv = nn.Embedding(9, 6, padding_idx=0), nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.out, self.inner = nn.Linear(5, 3), nn.ModuleDict({"out": nn.Linear(3, 8)})

    def forward(self, ids):  # [B, H, W]
        return self.inner["out"](self.out(self.conv(self.words(ids).permute(0, 3, 1, 2)).mean((2, 3))))


def test_peft_files_of_every_kind_of_layer(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixed()
    ids = torch.randint(9, (4, 6, 6), generator=rng())
    names = [name for name in lora_layers(model) if name != "inner.out"]  # which the pattern must not match
    ours = add_lora_(shared_copy(model), names, rank=4, alpha=3.0, generator=rng())
    for k, p in enumerate(ours.parameters()):
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=rng(k))
    save_peft(ours, tmp_path, base="mixed")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["rank_pattern"] == {"^out$": 3} and config["base_model_name_or_path"] == "mixed"
    theirs = peft.PeftModel.from_pretrained(shared_copy(model), str(tmp_path))
    torch.testing.assert_close(theirs(ids), ours(ids), atol=1e-5, rtol=1e-5)
    assert (ours(ids) - model(ids)).abs().max() > 0.1
    factors, scaling = load_peft_factors(tmp_path)
    assert scaling == 0.75 and all(torch.equal(factors[n], v) for n, v in lora_factors(ours).items())
    again = add_lora_(shared_copy(model), names, rank=4, alpha=3.0, generator=rng(7))
    assert torch.equal(set_lora_factors_(again, factors)(ids), ours(ids))


def test_a_resumed_run_takes_the_lora_up(parts, tmp_path, monkeypatch):
    """Stopped in stage 2: the next process fits nothing, ends at the same bits, and the LoRA stands in the output folder."""
    pytest.importorskip("skimage")
    from surefoot.datasets.scenes import courtyard360
    from surefoot.geometry.lm_gaussian import Budget, OracleStereoPrior, Switches, TemporalFilterEnhance, reconstruct
    from surefoot.geometry.lm_gaussian.outputs import save_result
    from surefoot.geometry.lm_gaussian.stages import StageStore

    scene = courtyard360(16, train=3)
    views = [scene.view(camera, supersample=1) for camera in scene.train]
    budget = Budget(align_steps=4, steps=6, refine_steps=4, splats=150, virtual_per_gap=1, path_frames=2, keep_early=2)

    def run(repair, **options):
        repair.sample_steps = 5
        return reconstruct([v.rgb for v in views], stereo_prior=OracleStereoPrior(views), repair_prior=repair, video_prior=TemporalFilterEnhance(repair), budget=budget, switches=Switches(rounds=1, cross_view=False), generator=rng(), **options)  # fmt: skip

    class Stop(Exception):
        pass

    def stop(stage, step, steps):
        if stage == "refine":
            raise Stop

    whole = run(prior(parts))
    store = StageStore.of(tmp_path / "stages", [v.rgb for v in views], budget)
    with pytest.raises(Stop):
        run(prior(parts), stages=store, progress=stop)
    monkeypatch.setattr(DiffusersControlNetRepair, "fit", lambda *a, **k: pytest.fail("fitted again"))
    for _ in range(2):  # the second time all stages are finished
        repair = prior(parts)
        resumed = run(repair, stages=store)
        assert resumed.enhanced is not None and whole.enhanced is not None
        assert torch.equal(resumed.scene.means, whole.scene.means) and torch.equal(resumed.enhanced, whole.enhanced)
        files = save_result(resumed, tmp_path / "scene", repair=repair)
        assert files["repair model"] == "repair_lora/"
        prior(parts).load_lora(tmp_path / "scene" / "repair_lora")
    assert "repair model" not in save_result(resumed, tmp_path / "other", repair=None)
    assert "repair model" not in save_result(resumed, tmp_path / "other", repair=prior(parts))
