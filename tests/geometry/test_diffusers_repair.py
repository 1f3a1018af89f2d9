"""The Stable Diffusion + ControlNet + LoRA repair, on tiny random models that go through the disk: real loading, training and sampling."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from surefoot.errors import InvalidInput, MissingExtra, Refused
from surefoot.geometry.lm_gaussian import ControlNetParts, DiffusersControlNetRepair
from surefoot.geometry.lm_gaussian.diffusers_repair import Denoiser, same_crop
from surefoot.nn.lora import EmbeddingAdapter, add_lora_, lora_layers, remove_lora_, shared_copy
from surefoot.nn.lowrank import Adapter


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def prior(parts, **settings):
    return DiffusersControlNetRepair(parts, **{"crop": 16, "fit_steps": 6, "rank": 4, "alpha": 4.0, **settings})


def pictures(count=2, height=20, width=24, seed=1):
    clean = torch.rand(count, height, width, 3, generator=rng(seed))
    return 0.5 * clean + 0.2, clean


def counted(parts, monkeypatch):
    """A list that grows by the time of every call of the U-Net."""
    calls, forward = [], parts.unet.forward
    monkeypatch.setattr(parts.unet, "forward", lambda z, t, **k: calls.append(float(t)) or forward(z, t, **k))
    return calls


# ---------------------------------------------------------------------------------------------------------- loading


def test_parts_come_back_from_disk_frozen(parts, make_parts):
    made = make_parts()
    for name in ("vae", "unet", "controlnet", "text_encoder"):
        model, saved = getattr(parts, name), made[name].state_dict()
        assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    ids = parts.ids("the fox")
    assert ids.shape == (1, 16) and ids[0, 0] == 53 and ids[0, -1] == 54
    assert parts.multiple == 4
    assert not parts.scheduler.config.clip_sample


def test_the_controlnet_may_live_elsewhere(controlnet_folder, tmp_path):
    shutil.copytree(controlnet_folder, tmp_path / "sd", ignore=shutil.ignore_patterns("controlnet"))
    shutil.copytree(controlnet_folder / "controlnet", tmp_path / "tile")
    with pytest.raises(InvalidInput, match="lacks controlnet"):
        ControlNetParts.load(tmp_path / "sd")
    assert ControlNetParts.load(tmp_path / "sd", controlnet=tmp_path / "tile").name.endswith("(sd)")


def test_nothing_is_fetched_and_bad_folders_are_named(controlnet_folder, tmp_path):
    with pytest.raises(InvalidInput, match="is not a folder"):
        ControlNetParts.load("stabilityai/some-model-of-the-hub")
    bad = tmp_path / "bad"
    shutil.copytree(controlnet_folder, bad)
    weights = bad / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(bad / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(InvalidInput, match="no safetensors weights for unet"):
        ControlNetParts.load(bad)
    weights.write_bytes(b"not safetensors at all")
    with pytest.raises(InvalidInput, match="cannot be read as UNet2DConditionModel"):
        ControlNetParts.load(bad)
    shutil.rmtree(bad / "scheduler")
    with pytest.raises(InvalidInput, match="lacks scheduler"):
        ControlNetParts.load(bad)


def test_a_file_that_lacks_weights_is_refused_rather_than_filled_at_random(controlnet_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    bad = tmp_path / "bad"
    shutil.copytree(controlnet_folder, bad)
    for part, file in (("unet", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        state = load_file(bad / part / file)
        lost = sorted(state)[0]
        save_file({k: v for k, v in state.items() if k != lost}, bad / part / file, metadata={"format": "pt"})
        with pytest.raises(InvalidInput, match=f"{part} lacks the weights"):
            ControlNetParts.load(bad)
        save_file(state, bad / part / file, metadata={"format": "pt"})


def test_fp16_only_folders_load(controlnet_folder, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(controlnet_folder, half)
    for file in list(half.rglob("*.safetensors")):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    assert ControlNetParts.load(half, dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_missing_library(controlnet_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match=r"surefoot\[diffusion\]"):
        ControlNetParts.load(controlnet_folder)


def test_models_of_another_kind_are_refused(make_parts):
    with pytest.raises(Refused, match="predicts v_prediction"):
        ControlNetParts(**make_parts(prediction_type="v_prediction"))
    from diffusers.models.controlnets.controlnet import ControlNetModel

    made = make_parts()
    other = ControlNetModel.from_config({**made["controlnet"].config, "cross_attention_dim": 8})
    with pytest.raises(InvalidInput, match="reads text of width 8"):
        ControlNetParts(**{**made, "controlnet": other})


# ------------------------------------------------------------------------------------------------------------- LoRA


def outputs(net, parts):
    z, t, control = (
        torch.randn(2, 4, 8, 8, generator=rng(3)),
        torch.tensor([7, 400]),
        torch.rand(2, 3, 16, 16, generator=rng(4)),
    )
    with torch.no_grad():
        words = net.embed(parts.ids("the fox", 2))
        return net.noise(z, t, words, control), words


def test_lora_starts_as_the_identity_where_the_paper_puts_it(parts):  # exact check 9
    base = Denoiser(parts.unet, parts.controlnet, parts.text_encoder)
    net = parts.adapted(64, 1.0, rng())
    for found, true in zip(outputs(net, parts), outputs(base, parts), strict=True):
        assert torch.equal(found, true)
    for network in net[:2]:
        inside = [n for n, m in network.named_modules() if isinstance(m, (Adapter, EmbeddingAdapter))]
        assert inside and all("transformer_blocks" in n for n in inside)
        plain = [
            n
            for n, m in network.named_modules()
            if isinstance(m, (nn.Linear, nn.Conv2d)) and "transformer_blocks" in n.split(".")
        ]
        assert {n.removesuffix(".base") for n in plain} == set(inside)
    kinds = [type(m) for m in net.text_encoder.modules()]
    assert kinds.count(EmbeddingAdapter) == 2  # tokens and positions
    assert kinds.count(Adapter) == sum(isinstance(m, nn.Linear) for m in parts.text_encoder.modules()) == 12
    trained = [n for network in net for n, p in network.named_parameters() if p.requires_grad]
    assert all(n.endswith((".A", ".B")) for n in trained)


def test_merged_equals_unmerged_and_nothing_of_the_user_changes(parts):  # exact check 9
    before = {n: getattr(parts, n).state_dict() for n in ("vae", "unet", "controlnet", "text_encoder")}
    before = {n: {k: v.clone() for k, v in state.items()} for n, state in before.items()}
    repair = prior(parts, lr=1e-2)
    repair.fit(*pictures(), generator=rng())
    apart = outputs(repair.net_, parts)
    base = outputs(Denoiser(parts.unet, parts.controlnet, parts.text_encoder), parts)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(apart, base, strict=True))
    renders = pictures()[0]
    unmerged = repair.repair(renders, strength=0.2, generator=rng(5))
    repair.merge()
    assert repair.net_ is not None
    assert not any(isinstance(m, (Adapter, EmbeddingAdapter)) for network in repair.net_ for m in network.modules())
    for a, b in zip(outputs(repair.net_, parts), apart, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    torch.testing.assert_close(repair.repair(renders, strength=0.2, generator=rng(5)), unmerged, atol=1e-5, rtol=0)
    for n, state in before.items():
        assert all(torch.equal(v, state[k]) for k, v in getattr(parts, n).state_dict().items())
        assert not any(p.requires_grad for p in getattr(parts, n).parameters())


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.conv, self.out = (
            nn.Embedding(9, 6, padding_idx=0),
            nn.Conv2d(6, 5, 3, stride=2, padding=1),
            nn.Linear(5, 3),
        )

    def forward(self, ids):  # [B, H, W]
        return self.out(self.conv(self.words(ids).permute(0, 3, 1, 2)).mean((2, 3)))


@pytest.mark.parametrize("merged", [True, False])
def test_lora_on_every_kind_of_layer(merged):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixed().double()
    ids = torch.randint(9, (4, 6, 6), generator=rng())
    copy = add_lora_(shared_copy(model), lora_layers(model), rank=2, alpha=3.0, generator=rng())
    assert torch.equal(copy(ids), model(ids))
    for p in copy.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=rng(p.numel()), dtype=p.dtype)
    by_hand = Mixed().double()
    for name in ("words", "conv", "out"):
        adapter, layer = getattr(copy, name), getattr(model, name)
        update = 1.5 * (adapter.B @ adapter.A).reshape(layer.weight.shape)  # alpha / rank
        getattr(by_hand, name).weight.data = layer.weight + update
        if name != "words":
            getattr(by_hand, name).bias.data = layer.bias.data
        torch.testing.assert_close(adapter.weight, layer.weight + update)
    torch.testing.assert_close(copy(ids), by_hand(ids))
    plain = remove_lora_(copy, merged=merged)
    assert type(plain.words) is nn.Embedding and type(plain.conv) is nn.Conv2d
    torch.testing.assert_close(plain(ids), (by_hand if merged else model)(ids))
    assert all(p.requires_grad for p in model.parameters())


def test_lora_computes_what_peft_computes():
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixed().double()
        names = ["words", "conv", "out"]
        theirs = peft.inject_adapter_in_model(
            peft.LoraConfig(r=2, lora_alpha=3, target_modules=names), shared_copy(model)
        ).double()
    ours = add_lora_(shared_copy(model), names, rank=2, alpha=3.0, generator=rng())
    for name in names:
        a, b = getattr(ours, name), getattr(theirs, name)
        a.B.data = torch.randn(a.B.shape, generator=rng(3), dtype=torch.float64)
        if name == "words":  # theirs calls A what ours calls B^T
            b.lora_embedding_A["default"].data, b.lora_embedding_B["default"].data = a.B.detach().mT, a.A.detach().mT
        else:
            for factor, layer in ((a.A, b.lora_A["default"]), (a.B, b.lora_B["default"])):
                layer.weight.data = factor.detach().reshape(layer.weight.shape)
    ids = torch.randint(9, (4, 6, 6), generator=rng())
    torch.testing.assert_close(ours(ids), theirs(ids))
    assert (ours(ids) - model(ids)).abs().max() > 0.1


def test_lora_refuses_what_it_cannot_do():
    with pytest.raises(InvalidInput, match="no layer to adapt"):
        add_lora_(nn.Sequential(nn.ReLU()), [], rank=2, generator=rng())
    with pytest.raises(Refused, match="max_norm"):
        add_lora_(nn.Sequential(nn.Embedding(4, 3, max_norm=1.0)), ["0"], rank=2, generator=rng())


# ---------------------------------------------------------------------------------------------------------- fitting


def test_fitting_lowers_the_loss_on_one_pair(parts):
    steps = []
    repair = prior(parts, fit_steps=40, lr=2e-2, rank=8, alpha=8.0, on_step=lambda *a: steps.append(a))
    degraded, clean = pictures(1, 16, 16)

    def loss(net):
        pair = (t.permute(0, 3, 1, 2) for t in (degraded, clean))
        control, x = (t.expand(32, -1, -1, -1) for t in pair)
        with torch.no_grad():
            return float(repair._loss(net, parts.ids(repair.prompt, 32), control, x, rng(9)))

    before = loss(repair.parts.adapted(8, 8.0, rng()))
    repair.fit(degraded, clean, generator=rng())
    assert (
        loss(repair.net_) < before - 0.05
    )  # the same times and noises, so what differs is the net; the frozen last layer sets the floor
    assert [a[:2] for a in steps] == [(k + 1, 40) for k in range(40)] and [a[2] for a in steps] == repair.losses_


def test_fitting_is_repeatable_and_leaves_the_global_state(parts):
    state = torch.get_rng_state()
    runs = [prior(parts), prior(parts), prior(parts)]
    for repair, seed in zip(runs, (0, 0, 1), strict=True):
        repair.fit(*pictures(), generator=rng(seed))
    a, b, c = (outputs(r.net_, parts)[0] for r in runs)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(state, torch.get_rng_state())


def test_an_interruption_changes_nothing(parts):
    def stop(step, steps, loss):
        raise KeyboardInterrupt

    repair = prior(parts, on_step=stop)
    with pytest.raises(KeyboardInterrupt):
        repair.fit(*pictures(), generator=rng())
    assert repair.net_ is None and repair.losses_ == []


def test_crops_are_at_one_place_and_reach_beyond_256(parts):
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(700.0), indexing="ij")
    stack = torch.stack([rows, columns, rows]).expand(2, -1, -1, -1) + torch.tensor([0.0, 1000.0])[:, None, None, None]
    g, lefts = rng(), []
    for _ in range(60):
        a, b = same_crop((stack, -stack), 16, g)
        assert a.shape == (1, 3, 16, 16) and torch.equal(a, -b)
        lefts.append(float(a[0, 1, 0, 0]) % 1000)
    assert max(lefts) > 512 and min(lefts) < 200  # offsets kept in eight bits wrap at 256


# --------------------------------------------------------------------------------------------------------- sampling


def test_strength_is_a_share_of_the_steps(parts, monkeypatch):  # exact check 8
    calls = counted(parts, monkeypatch)
    repair, renders = prior(parts), pictures()[0]
    repair.repair(renders, strength=0.2, generator=rng())
    assert calls == [181.0 - 20 * k for k in range(10)]
    calls.clear()
    repair.repair(renders, strength=1.0, generator=rng())
    assert len(calls) == 50


def test_strength_zero_is_the_round_trip(parts, monkeypatch):  # exact check 8
    calls = counted(parts, monkeypatch)
    renders = pictures(height=20, width=24)[0]
    seen = []
    hook = parts.vae.encoder.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    found = prior(parts).repair(renders, strength=0.0, generator=rng())
    hook.remove()
    with torch.no_grad():
        x = renders.permute(0, 3, 1, 2)
        latent = parts.vae.encode(x * 255 / 127.5 - 1).latent_dist.mean
        true = (parts.vae.decode(latent).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(found, true, atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[0], x * 255 / 127.5 - 1, atol=1e-5, rtol=0)
    assert not calls


def test_eta_zero_is_deterministic(parts):  # exact check 8
    renders, g = pictures()[0], rng(2)
    repair = prior(parts, eta=0.0, batch=2)
    first = repair.repair(renders, strength=0.2, generator=g)
    once = rng(2)
    torch.randn(2, 4, 10, 12, generator=once)
    assert torch.equal(g.get_state(), once.get_state())  # the first noise, and no more
    state = torch.get_rng_state()
    assert torch.equal(first, repair.repair(renders, strength=0.2, generator=rng(2)))
    random = prior(parts, eta=1.0)
    a, b, c = (random.repair(renders, strength=0.2, generator=rng(s)) for s in (2, 2, 3))
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, first)
    assert torch.equal(state, torch.get_rng_state())


def test_sampling_against_the_formula(parts):
    renders = pictures(1, 16, 16)[0]
    repair = prior(parts, eta=0.0, control_scale=0.8)
    found = repair.repair(renders, strength=0.04, generator=rng(6))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    level, x = torch.cumprod(1 - betas, 0), renders.permute(0, 3, 1, 2)
    net = Denoiser(parts.unet, parts.controlnet, parts.text_encoder)
    z = parts.encode(x).double()
    noise = torch.randn(z.shape, generator=rng(6)).double()
    z = level[21].sqrt() * z + (1 - level[21]).sqrt() * noise
    for here, below in ((21, level[1]), (1, level[0])):
        with torch.no_grad():
            eps = net.noise(z.float(), torch.tensor(here), net.embed(parts.ids(repair.prompt)), x, 0.8).double()
        clean = (z - (1 - level[here]).sqrt() * eps) / level[here].sqrt()
        z = below.sqrt() * clean + (1 - below).sqrt() * eps
    torch.testing.assert_close(found, parts.decode(z.float()).permute(0, 2, 3, 1), atol=2e-5, rtol=0)


def test_control_prompt_and_guidance_matter(parts):
    renders = pictures()[0]
    runs = [{}, {"control_scale": 0.0}, {"prompt": "a fox in a wood"}, {"guidance": 5.0}]
    found = [prior(parts, eta=0.0, **r).repair(renders, strength=0.4, generator=rng()) for r in runs]
    assert all((found[0] - other).abs().max() > 1e-5 for other in found[1:])


@pytest.mark.parametrize("size", [(9, 13), (21, 30), (16, 40)])
def test_any_size_comes_back(parts, size):
    renders = torch.rand(3, *size, 3, generator=rng())
    found = prior(parts, batch=2).repair(renders, strength=0.1, generator=rng())
    assert found.shape == renders.shape and torch.isfinite(found).all() and found.min() >= 0 and found.max() <= 1


def test_half_precision_weights(controlnet_folder):
    repair = DiffusersControlNetRepair.from_folder(controlnet_folder, dtype=torch.bfloat16, crop=16, fit_steps=2)
    repair.fit(*pictures(), generator=rng())
    assert repair.net_ is not None
    assert {p.dtype for n in repair.net_ for k, p in n.named_parameters() if k.endswith((".A", ".B"))} == {
        torch.float32
    }
    assert repair.repair(pictures()[0], strength=0.1, generator=rng()).dtype == torch.float32
    assert "tiny-tile" in repair.name and "LoRA of rank 64" in repair.name


def test_bad_input(parts):
    repair = prior(parts)
    with pytest.raises(InvalidInput, match="strength must be between 0 and 1"):
        repair.repair(pictures()[0], strength=1.2, generator=rng())
    with pytest.raises(InvalidInput, match=r"must both be \[P, H, W, 3\]"):
        repair.fit(pictures()[0], pictures()[1][:, :-1], generator=rng())
    with pytest.raises(InvalidInput, match="not been fitted"):
        repair.merge()
    with pytest.raises(InvalidInput, match="multiple of 4"):
        prior(parts, crop=18)
    with pytest.raises(InvalidInput, match="eta"):
        prior(parts, eta=1.5)
    nan = prior(parts, fit_steps=1)
    with pytest.raises(InvalidInput, match="NaN"):
        nan.fit(*(t * float("nan") for t in pictures()), generator=rng())
