"""Adversarial unlearning: the dossier's exact checks on an untrained toy and on a linear one, attacks, refusals, diffusers."""

import copy
import itertools
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from surefoot.adversarial import adv_unlearn as au
from surefoot.adversarial.adv_unlearn.backend import trainable_parameters
from surefoot.adversarial.adv_unlearn.prompts import prompt_length
from surefoot.errors import InvalidInput, MissingExtra, Refused
from surefoot.models.toy_diffusion import TEMPLATES, ToyDiffusion, ToyTextEncoder, ToyUNet, caption, toy_diffusion
from surefoot.nn.diffusion import cosine_alphas_bar, noised

QUICK = au.AdvUnlearner(
    lr=1e-3, iterations=4, warmup=2, retain_batch=2, ddim_steps=4, copies=2, reuse=3, attack=au.Attack(steps=2, lr=1e-2)
)
RETAIN = ["a one", "the digit 2", "a five", "handwritten 9", "6"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def toy(seed=0):
    """Untrained, with text that matters as much as it will."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ToyDiffusion(ToyUNet(8).eval(), ToyTextEncoder().eval(), alphas_bar=cosine_alphas_bar(20))
        with torch.no_grad():
            unet: Any = model.unet
            for module in (*unet.read_low, unet.read_high):
                module.out.weight.mul_(5)
    return model


def perturbed(model, scale=0.1, seed=1):
    """The same model with another text encoder, as unlearning leaves one."""
    other = replace(model, text_encoder=copy.deepcopy(model.text_encoder))
    with torch.no_grad():
        for p in other.text_encoder.layers.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator(seed)))
    return other


def pool_of(model, original=None, seed=0, **settings):
    settings = {"steps": 4, "copies": 2, "reuse": 50, "guidance": 3.0, **settings}
    return au.TrajectoryPool(model, original or model, generator=generator(seed), **settings)


def weights(*modules):
    return [p.detach().clone() for m in modules for p in (*m.parameters(), *m.buffers())]


def same(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ---------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 3.0])
def test_at_the_start_the_erasing_loss_is_a_constant(eta):
    model = toy()
    states = pool_of(model).draw(["a three"], 6)
    loss = au.esd_loss(model, au.condition(model, ["a three"]), states, negative_guidance=eta)
    assert states.without is not None
    gap = (states.given - states.without).pow(2).mean()
    assert gap > 1e-4
    assert loss.item() == pytest.approx((1 + eta) ** 2 * gap.item(), rel=1e-4)


def test_at_the_start_the_concept_itself_has_attack_loss_zero():
    model = toy()
    states = pool_of(model).draw(["a three"], 6)
    assert au.prompt_loss(model, au.condition(model, ["a three"]), states).item() == pytest.approx(0, abs=1e-12)
    assert au.prompt_loss(model, au.condition(model, ["a nine"]), states) > 1e-5


def test_eta_zero_aims_at_the_unconditional_prediction():
    model = toy()
    states = pool_of(model).draw(["a three"], 4)
    loss = au.esd_loss(model, au.condition(model, [""]), states, negative_guidance=0.0)
    assert loss.item() == pytest.approx(0, abs=1e-12)


def test_at_the_start_retaining_costs_nothing_and_pulls_nowhere():
    model: Any = toy()
    states = pool_of(model).draw(RETAIN)
    loss = au.retain_loss(model, au.condition(model, RETAIN), states)
    loss.backward()
    # single and batched convolutions may round differently: zero up to float32
    assert loss.item() == pytest.approx(0, abs=1e-11)
    assert max(p.grad.abs().max().item() for p in model.text_encoder.layers.parameters()) < 1e-6


def test_no_gradient_flows_into_the_target():
    model = toy()
    states = pool_of(model).draw(["three"], 3)
    assert states.without is not None
    assert not any(x.requires_grad for x in (states.z, states.given, states.without))


def test_float32_agrees_with_float64():
    small = toy()
    big = replace(
        small, unet=copy.deepcopy(small.unet).double(), text_encoder=copy.deepcopy(small.text_encoder).double()
    )
    states = pool_of(small).draw(["three"], 4)
    assert states.without is not None
    wide = au.States(states.z.double(), states.t, states.given.double(), states.without.double())
    losses = [au.esd_loss(m, au.condition(m, ["a three"]), s).item() for m, s in ((small, states), (big, wide))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# ------------------------------------------------------------------------------------------ the linear model


class LinearText(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(3, 3)
        self.map = nn.Linear(3, 3, bias=False)


class LinearNoise(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5, 3))

    def forward(self, z, t, text):
        return text[:, 1] @ self.weight.T


@dataclass
class Linear:
    """e(z, t, c) = W c, c = T x of the first token. Prompts: "" is the end token alone, "x" the word."""

    unet: nn.Module
    text_encoder: nn.Module
    alphas_bar: torch.Tensor
    latent_shape: tuple = (5,)
    clip: float | None = None
    end_id = 1
    device = torch.device("cpu")
    word_ids = torch.tensor([2])

    def token_ids(self, prompts):
        return torch.tensor([[0, 2, 1, 1] if p else [0, 1, 1, 1] for p in prompts])

    def words(self, ids):
        return "x"

    def embed_tokens(self, ids):
        return self.text_encoder.get_submodule("words")(ids)

    def encode(self, embeds, ids):
        return self.text_encoder.get_submodule("map")(embeds)

    def predict_noise(self, z, t, condition):
        return self.unet(z, t, condition)

    def decode(self, z):
        return z


def linear():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = Linear(LinearNoise(), LinearText(), cosine_alphas_bar(10))
        nn.init.normal_(model.unet.weight)
    w, t0 = model.unet.weight.detach(), model.text_encoder.map.weight.detach().clone()
    x, empty = (model.text_encoder.words.weight.detach()[i] for i in (2, 1))
    target = w @ t0 @ empty - (w @ t0 @ x - w @ t0 @ empty)
    a = torch.linalg.lstsq(w, target[:, None]).solution[:, 0]
    return model, t0, x, a


def test_linear_model_ends_at_the_least_squares_answer():
    model, t0, x, a = linear()
    learner = replace(QUICK, attack=None, retain_weight=0.0, iterations=800, lr=2e-2, reuse=10_000)
    result: Any = learner.fit(model, ["x"], generator=generator())
    trained = result.model.text_encoder.map.weight.detach()
    assert torch.allclose(trained @ x, a, atol=1e-3)
    assert not torch.allclose(t0 @ x, a, atol=0.1)
    assert result.report.erase[-1] < 1e-5


def test_linear_model_under_plain_gradient_descent_changes_least_and_moves_its_neighbours():
    model, t0, x, a = linear()
    states = pool_of(model).draw(["x"], 4)
    layer: Any = model.text_encoder.map
    smooth = torch.linalg.svdvals(model.unet.weight.detach())[0] ** 2 * (x @ x)
    for _ in range(4000):
        (slope,) = torch.autograd.grad(au.esd_loss(model, au.condition(model, ["x"]), states), layer.weight)
        with torch.no_grad():
            layer.weight -= 2.5 / smooth * slope  # the mean over 5 outputs divides the curvature by 5
    expected = t0 + torch.outer(a - t0 @ x, x) / (x @ x)
    assert torch.allclose(layer.weight, expected, atol=1e-3)
    near, across = x + torch.tensor([0.1, 0.0, 0.0]), torch.linalg.svd(x[None]).Vh[1]
    assert torch.allclose(layer.weight @ across, t0 @ across, atol=1e-3)  # orthogonal: untouched
    assert (layer.weight @ near - t0 @ near).norm() > 0.5 * (a - t0 @ x).norm()  # why a retain term is needed


# ---------------------------------------------------------------------------------------------------- prompts


def test_prefix_keeps_length_start_and_end_and_shifts_the_prompt():
    model = toy()
    ids = model.token_ids(["the digit three"])[0]
    x, rows = model.embed_tokens(ids), torch.randn(2, 64)
    out = au.spliced(x, rows, 3)
    assert out.shape == x.shape
    assert torch.equal(out[0], x[0])
    assert torch.equal(out[1:3], rows)
    assert torch.equal(out[3:6], x[1:4])
    assert torch.equal(out[6:], x[4:-2])
    assert (au.spliced(ids, torch.tensor([7, 8]), 3)[6:] == model.end_id).all()


@pytest.mark.parametrize(
    ("place", "rows", "expected"),
    [
        ("prefix", [7], [0, 7, 5, 6, 1, 1]),
        ("suffix", [7], [0, 5, 6, 7, 1, 1]),
        ("replace", [7], [0, 7, 1, 1, 1, 1]),
        ("replace", [7, 8, 9], [0, 7, 8, 9, 1, 1]),
        ("add", [10, 20], [0, 15, 26, 1, 1, 1]),
    ],
)
def test_places(place, rows, expected):
    assert au.spliced(torch.tensor([0, 5, 6, 1, 1, 1]), torch.tensor(rows), 2, place).tolist() == expected


def test_what_does_not_fit_is_refused():
    ids = torch.tensor([0, 5, 6, 7, 1, 1])
    assert au.spliced(ids, torch.tensor([9]), 3).tolist() == [0, 9, 5, 6, 7, 1]
    with pytest.raises(InvalidInput, match="exceeds the 6"):
        au.spliced(ids, torch.tensor([9, 9]), 3)
    with pytest.raises(InvalidInput, match="one row for each"):
        au.spliced(ids, torch.tensor([9]), 3, "add")
    with pytest.raises(InvalidInput, match="no end token"):
        prompt_length(torch.tensor([0, 5, 6]), 1)


def test_retain_prompts_come_without_repetition_and_start_over():
    prompts = [f"prompt {k}" for k in range(7)]
    source = au.RetainPrompts(prompts, ["three"], 3, generator())
    for _ in range(5):  # a pass is two draws: after six, one prompt is left, fewer than a batch
        seen = source.draw() + source.draw()
        assert len(set(seen)) == 6
        assert set(seen) <= set(prompts)


def test_retain_prompts_that_name_the_concept_are_listed():
    prompts = ["a one", "A THREE, large", "threesome", "the 3", "a church tower"]
    with pytest.raises(InvalidInput, match="'A THREE, large', 'the 3'"):
        au.RetainPrompts(prompts, ["three", "3"], 2, generator())
    assert au.prompts_without(prompts, ["three", "3", "Church Tower"]) == ["a one", "threesome"]


# ------------------------------------------------------------------------------------------------ trajectories


def test_states_lie_on_the_models_own_trajectory_with_the_originals_predictions():
    model = toy()
    pool = pool_of(model, steps=5, copies=1)
    pool.draw(["three"])
    kept, times = pool.known["three"], pool.times
    assert times.tolist() == [19, 15, 11, 7, 3]
    both = au.condition(model, ["three"]), au.condition(model, [""])
    with torch.no_grad():
        for place, t in enumerate(times):
            z = kept.z[0, place][None]
            given, without = (model.predict_noise(z, t[None], c)[0] for c in both)
            assert torch.allclose(kept.given[0, place], given, atol=1e-4)
            assert torch.allclose(kept.without[0, place], without, atol=1e-4)
            if place + 1 < len(times):
                noise = without + 3 * (given - without)
                level, below = model.alphas_bar[t], model.alphas_bar[times[place + 1]]
                x0 = ((z[0] - (1 - level).sqrt() * noise) / level.sqrt()).clamp(-1, 1)
                noise = (z[0] - level.sqrt() * x0) / (1 - level).sqrt()
                step = below.sqrt() * x0 + (1 - below).sqrt() * noise
                assert torch.allclose(kept.z[0, place + 1], step, atol=1e-4)


def test_a_unet_under_training_samples_itself_and_the_original_answers():
    original = toy()
    trained: Any = replace(original, unet=copy.deepcopy(original.unet))
    with torch.no_grad():
        trained.unet.stem.weight.mul_(1.5)
    states = pool_of(trained, original).draw(["three"], 5)
    with torch.no_grad():
        theirs, own = (
            m.predict_noise(states.z, states.t, au.condition(original, ["three"] * 5)) for m in (original, trained)
        )
    assert torch.allclose(states.given, theirs, atol=1e-5)
    assert not torch.allclose(states.given, own, atol=1e-3)
    assert not torch.equal(states.z, pool_of(original).draw(["three"], 5).z)


def test_runs_are_renewed_one_by_one():
    pool = pool_of(toy(), copies=2, reuse=4)
    pool.draw(["three"], 4)
    first = pool.known["three"].z.clone()
    pool.draw(["three"], 4)
    second = pool.known["three"].z.clone()
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    pool.draw(["three"])
    assert torch.equal(second[0], pool.known["three"].z[0])
    assert not torch.equal(second[1], pool.known["three"].z[1])


def test_image_states_are_the_forward_process():
    model, latents = toy(), torch.randn(3, 1, 8, 8, generator=generator())
    states = au.image_states(model, latents, 20, generator=generator(1))
    assert torch.allclose(noised(latents[torch.arange(20) % 3], states.t, states.given, model.alphas_bar), states.z)
    assert sorted(states.t.tolist()) == list(range(20))  # one in each twentieth of the schedule


# --------------------------------------------------------------------------------------------------- attacks


def test_attack_changes_nothing_but_its_rows():
    model: Any = toy()
    model.unet.train()
    model.unet.stem.weight.requires_grad_(False)
    model.text_encoder.position_embedding.requires_grad_(False)
    before, rng = weights(model.unet, model.text_encoder), torch.get_rng_state()
    flags = [p.requires_grad for m in (model.unet, model.text_encoder) for p in m.parameters()]
    pool = pool_of(model)
    assert QUICK.attack is not None
    with torch.no_grad():  # evaluation loops stand in such a block
        found = au.soft_prompt_attack(
            model, "three", lambda n: pool.draw(["three"], n), QUICK.attack, generator=generator()
        )
    assert same(before, weights(model.unet, model.text_encoder))
    assert flags == [p.requires_grad for m in (model.unet, model.text_encoder) for p in m.parameters()]
    assert model.unet.training and not model.text_encoder.training
    assert all(p.grad is None for p in model.unet.parameters())
    assert torch.equal(rng, torch.get_rng_state())
    assert found.rows.shape == (1, 64) and len(found.losses) == found.gradients == 2


@pytest.mark.parametrize("place", ["prefix", pytest.param("add", marks=pytest.mark.slow)])
def test_attack_lowers_the_loss_on_held_out_states(place):
    original = toy()
    model, better = perturbed(original), 0
    held = pool_of(original, seed=99).draw(["a three"], 16)
    attack = au.Attack(steps=30, lr=5e-3, batch=2, place=place)
    k = 2 if place == "add" else 1
    for seed in range(20):
        pool = pool_of(original, seed=seed)
        start = model.embed_tokens(model.word_ids[torch.randint(39, (k,), generator=generator(seed))]).detach()
        found = au.soft_prompt_attack(
            model, "a three", lambda n, p=pool: p.draw(["a three"], n), attack, generator=generator(seed), start=start
        )
        with torch.no_grad():
            values = [
                au.prompt_loss(model, replace(found, rows=rows).condition(model), held) for rows in (start, found.rows)
            ]
        better += bool(values[1] < values[0])
    assert better >= 19


def test_gradients_are_fresh_at_every_step():
    """Published code never clears them between steps, so that its Adam sees running sums."""
    original = toy()
    model = perturbed(original)
    draws = [pool_of(original).draw(["three"], 2) for _ in range(4)]
    start = model.embed_tokens(torch.tensor([5])).detach()
    feed = iter(draws)
    attack = au.Attack(steps=4, lr=1e-2)
    found = au.soft_prompt_attack(model, "three", lambda n: next(feed), attack, generator=generator(), start=start)

    def by_hand(accumulate):
        rows = start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([rows], lr=1e-2)
        for states in draws:
            if not accumulate:
                optimizer.zero_grad()
            au.prompt_loss(model, au.AdversarialPrompt("three", rows).condition(model), states).backward(inputs=[rows])
            optimizer.step()
        return rows.detach()

    assert torch.allclose(found.rows, by_hand(False), atol=1e-6)
    assert not torch.allclose(found.rows, by_hand(True), atol=1e-4)


def test_fast_attack_is_one_signed_step():
    original = toy()
    model, pool = perturbed(original), pool_of(original)
    start = model.embed_tokens(torch.tensor([5])).detach()
    found = au.soft_prompt_attack(
        model, "three", lambda n: pool.draw(["three"], n), au.FAST, generator=generator(), start=start
    )
    assert found.gradients == 1
    assert torch.allclose((found.rows - start).abs(), torch.full_like(start, au.FAST.lr), atol=1e-6)
    assert au.FAST.lr == pytest.approx(au.Attack().steps * au.Attack().lr)


def test_attack_behind_the_text_encoder():
    original = toy()
    model, pool = perturbed(original), pool_of(original)
    attack = au.Attack(steps=5, lr=1e-2, space="condition", num_tokens=2)
    found = au.soft_prompt_attack(model, "three", lambda n: pool.draw(["three"], n), attack, generator=generator())
    text, plain = found.condition(model), au.condition(model, ["three"])
    assert torch.equal(text[0, 1:3], found.rows)
    assert torch.equal(text[0, 3], plain[0, 1])


def test_token_search_is_exhaustive_where_it_can_be():
    original = toy()
    model = perturbed(original)
    states = pool_of(original).draw(["three"], 6)
    found = au.discrete_prompt_attack(
        model, "three", states, num_tokens=1, queries=60, swaps=60, top=60, generator=generator()
    )
    with torch.no_grad():
        brute = [
            au.prompt_loss(model, au.condition(model, [f"{model.words(word)} three"]), states).item()
            for word in model.word_ids
        ]
        plain = au.prompt_loss(model, au.condition(model, ["three"]), states).item()
    assert min(brute) < plain == pytest.approx(found.losses[0], rel=1e-4)
    assert found.losses[-1] == pytest.approx(min(brute), rel=1e-4)
    assert found.text == f"{model.words(model.word_ids[brute.index(min(brute))])} three"
    assert torch.allclose(found.condition(model), au.condition(model, [found.text]), atol=1e-6)


def test_the_plain_prompt_is_a_candidate_and_comes_back_where_nothing_beats_it():
    model = toy()
    plain = au.plain_prompt(model, "a three")
    assert plain.text == "a three" and plain.tokens is not None and plain.tokens.numel() == 0
    assert torch.equal(plain.condition(model), au.condition(model, ["a three"]))
    states = au.guided_states(pool_of(model), "a three", 8)  # under the model itself: loss zero
    for place in ("prefix", "suffix", "replace"):
        found = au.discrete_prompt_attack(
            model, "a three", states, queries=40, place=place, guidance=3.0, generator=generator()
        )
        assert found.queries == 40 and found.gradients > 0
        assert found.text == "a three" and len(found.rows) == 0
        assert found.losses[0] == pytest.approx(0, abs=1e-9)


def test_a_guided_loss_compares_what_the_sampler_follows():
    original = toy()
    model, pool = perturbed(original), pool_of(original)
    states = au.guided_states(pool, "three", 5)
    text, bare = au.condition(model, ["a nine"]), au.condition(model, [""])
    with torch.no_grad():
        given, without = (model.predict_noise(states.z, states.t, c.expand(5, -1, -1)) for c in (text, bare))
    expected = (without + 3.0 * (given - without) - states.given).pow(2).mean().item()
    assert au.prompt_loss(model, text, states, guidance=3.0).item() == pytest.approx(expected, rel=1e-4)
    assert au.prompt_loss(model, text, states, guidance=3.0, empty=without).item() == pytest.approx(expected, rel=1e-4)
    assert au.prompt_loss(model, text, states).item() != pytest.approx(expected, rel=1e-2)
    with torch.no_grad():
        theirs = [original.predict_noise(states.z, states.t, au.condition(original, [p]).expand(5, -1, -1)) for p in ("", "three")]  # fmt: skip
    assert torch.allclose(states.given, theirs[0] + 3.0 * (theirs[1] - theirs[0]), atol=1e-4)


def test_soft_attack_follows_a_guided_loss():
    original = toy()
    model, pool = perturbed(original), pool_of(original)
    feed = [au.guided_states(pool, "three", 2)] * 2
    start = model.embed_tokens(torch.tensor([5])).detach()
    found = au.soft_prompt_attack(
        model, "three", lambda n: feed[0], au.Attack(steps=1), generator=generator(), start=start, guidance=3.0
    )
    first = au.prompt_loss(model, au.AdversarialPrompt("three", start).condition(model), feed[0], guidance=3.0)
    assert found.losses[0] == pytest.approx(first.item(), rel=1e-4)


def test_the_strongest_candidate_is_the_judges():
    model = toy()
    candidates = [replace(au.plain_prompt(model, p), queries=5) for p in ("three", "a nine", "the digit 5")]
    draw = {"steps": 3, "guidance": 4.0}
    bright = []

    def watching(images):
        bright.append(images.mean().item())
        return nn.functional.one_hot(torch.zeros(len(images), dtype=torch.long), 2).float()

    equal = au.strongest(model, watching, 0, candidates, images=6, generator=generator(3), **draw)
    assert equal.prompt == "three"  # the first of equals
    assert equal.queries == 3 * 5 + 3 * 6
    border = sorted(bright)[1] + 1e-6  # between the brightest prompt and the rest

    def judge(images):
        return nn.functional.one_hot((images.mean() > border).long().expand(len(images)), 2).float()

    best = au.strongest(model, judge, 1, candidates, images=6, generator=generator(3), **draw)
    assert best.prompt == candidates[bright.index(max(bright))].prompt


def test_token_search_keeps_to_its_budget_and_only_improves():
    original = toy()
    model, states = perturbed(original), pool_of(original).draw(["a three"], 4)
    before = weights(model.unet, model.text_encoder)
    found = [
        au.discrete_prompt_attack(model, "a three", states, queries=50, swaps=16, generator=generator(4))
        for _ in range(2)
    ]
    assert found[0].queries == 50
    assert all(b <= a for a, b in itertools.pairwise(found[0].losses))
    assert found[0].losses[-1] < found[0].losses[0]
    one, other = (attack.tokens for attack in found[:2])
    assert one is not None and other is not None and torch.equal(one, other)
    assert same(before, weights(model.unet, model.text_encoder))
    assert len(found[0].text.split()) == 5 and found[0].text.endswith("a three")
    alone = au.discrete_prompt_attack(model, "a three", states, queries=1, generator=generator())
    assert alone.queries == 1


# --------------------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize(
    "settings",
    [{}, {"trainable": "unet"}, {"attack": au.FAST}, {"attack": None}, {"retain_mode": "iter"}, {"retain_weight": 0.0},
     {"attack": au.Attack(steps=2, init="latest", place="suffix")}, {"attack_every": 2}, {"layers": 1}, {"batch": 3}],
)  # fmt: skip
def test_only_the_trained_part_of_a_copy_changes(settings):
    model = toy()
    model.text_encoder.train()
    before, rng = weights(model.unet, model.text_encoder), torch.get_rng_state()
    learner = replace(QUICK, **settings)
    prompts = RETAIN if learner.retain_weight else []
    runs = [learner.fit(model, ["three"], prompts, synonyms=["3"], generator=generator(5)) for _ in range(2)]
    trained = runs[0].model
    assert same(before, weights(model.unet, model.text_encoder))
    assert torch.equal(rng, torch.get_rng_state())
    other = "unet" if learner.trainable == "text_encoder" else "text_encoder"
    assert getattr(trained, other) is getattr(model, other)
    module, source = getattr(trained, learner.trainable), getattr(model, learner.trainable)
    assert module is not source
    assert module.training == source.training
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert same(weights(module), weights(getattr(runs[1].model, learner.trainable)))
    changed = {
        name
        for (name, p), q in zip(module.named_parameters(), source.parameters(), strict=True)
        if not torch.equal(p, q)
    }
    if learner.trainable == "text_encoder":
        assert changed
        assert not any("embedding" in name for name in changed)
        assert learner.layers is None or all(name.startswith("layers.0") for name in changed)
    report = runs[0].report
    assert len(report.erase) == 4
    assert len(report.retain) == (4 if prompts else 0)
    assert len(report.attacks) == (0 if learner.attack is None else 1 if learner.attack_every == 2 else 2)
    assert report.unet_passes > 0 and report.trained_parameters > 0


def test_passes_are_counted_and_recording_is_their_small_part():
    learner = replace(QUICK, iterations=3, warmup=1, retain_weight=0.0, reuse=1000, batch=2)
    report = learner.fit(toy(), ["three"], generator=generator()).report
    # recording 2 runs x 4 levels x 2 prompts; 3 erasing steps of 2; 2 attacks of 2 steps with 1 state
    assert report.unet_passes == 16 + 6 + 4


def test_what_is_trained_in_a_text_encoder():
    encoder: Any = toy().text_encoder
    full = trainable_parameters(encoder, "text_encoder")
    tables = encoder.token_embedding.weight.numel() + encoder.position_embedding.weight.numel()
    assert sum(p.numel() for p in full) == sum(p.numel() for p in encoder.parameters()) - tables
    with pytest.raises(InvalidInput, match="2 blocks"):
        trainable_parameters(encoder, "text_encoder", 3)


@pytest.mark.slow
def test_a_concept_is_forgotten_and_tokens_do_not_bring_it_back():
    model = toy_diffusion()
    prompts = ["", *(caption(d, template=t) for d in (0, 1, 2, 5, 6, 8) for t in TEMPLATES[:5])]
    learner = au.AdvUnlearner(
        lr=1e-3, iterations=100, warmup=30, batch=4, retain_batch=8, ddim_steps=10, copies=16, retain_weight=1.0,
        attack=au.Attack(steps=5, lr=3e-2, batch=2),
    )  # fmt: skip
    result = learner.fit(model, ["three"], prompts, synonyms=["3"], generator=generator(7))
    draw = {"steps": 10, "guidance": 4.0}

    def alike(images):  # nearest class mean, enough to tell a three
        from surefoot.datasets.embedded import digits

        train = digits(0).train
        means = torch.stack([train.x[train.labels == k].mean(0) for k in range(10)])
        return -torch.cdist(images.flatten(1), means.flatten(1))

    def rates(m):
        known = {"judge": alike, "concept_class": 3, "generator": generator(1), **draw}
        attacks = {"tokens": au.discrete_attacks(m, model, ["three"], queries=80, **known)}
        return au.evaluate_erasure(
            m, alike, 3, prompts=["three", "a three"], attacks=attacks, retained={"a one": 1, "a zero": 0, "six": 6},
            images=32, retained_images=16, generator=generator(2), **draw,
        )  # fmt: skip

    before, after = rates(model), rates(result.model)
    for name in ("prompts", "tokens"):
        assert before.concept[name].low > 0.3
        assert after.concept[name].high < before.concept[name].low
    assert after.retained.value > 0.5


@pytest.mark.slow
def test_words_at_which_a_search_is_stuck_lose_to_the_plain_prompt_and_no_attack_is_weaker_than_none():
    """The planted mistake: a search that never tries the plain prompt returns such words, and its rate flatters every defence."""
    from surefoot.trials.adversarial.adv_unlearn import DRAW, judge

    model, prompts = toy_diffusion(), ["three", "a three", "the three", "the digit three"]
    known: dict[str, Any] = {"judge": judge(), "concept_class": 3}
    words = model.token_ids(["two five nine"])[0, 1:4]
    plain = au.plain_prompt(model, "the digit three")
    stuck = au.AdversarialPrompt("the digit three", model.embed_tokens(words), tokens=words)
    states = au.guided_states(pool_of(model, steps=10, copies=16, guidance=4.0), "the digit three", 16)
    losses = [au.prompt_loss(model, found.condition(model), states, guidance=4.0).item() for found in (plain, stuck)]
    assert losses[0] < 0.1 * losses[1]
    assert au.strongest(model, known["judge"], 3, [stuck, plain], images=16, generator=generator(1), **DRAW).text == plain.text  # fmt: skip
    house = au.discrete_attacks(model, model, prompts, queries=80, generator=generator(11), **known, **DRAW)
    report = au.evaluate_erasure(
        model, judge(), 3, prompts=prompts, attacks={"stuck": [stuck], "house": house}, retained={"one": 1}, images=64,
        retained_images=1, generator=generator(12), **DRAW,
    )  # fmt: skip
    assert report.concept["stuck"].high < report.concept["prompts"].low
    assert report.concept["house"].high > report.concept["prompts"].low  # up to the luck of fresh images


# ------------------------------------------------------------------------------------------------- evaluation


def test_rates_are_what_the_judge_says():
    model = toy()

    def judge(images):  # the concept, whatever it is shown
        assert images.min() >= 0 and images.max() <= 1
        return nn.functional.one_hot(torch.full((len(images),), 3), 5).float()

    found = au.AdversarialPrompt("three", model.embed_tokens(torch.tensor([4])).detach(), queries=7, gradients=2)
    report = au.evaluate_erasure(
        model, judge, 3, prompts=["three"], paraphrases=["3", "a three"], attacks={"mine": [found]}, retained={"one": 3, "two": 2},
        images=4, retained_images=3, steps=3, guidance=2.0, reference=torch.rand(9, 1, 8, 8), features=lambda x: x.flatten(1)[:, :4],
        generator=generator(),
    )  # fmt: skip
    assert {name: (rate.value, rate.n) for name, rate in report.concept.items()} == {
        "prompts": (1.0, 4), "paraphrases": (1.0, 8), "mine": (1.0, 4),
    }  # fmt: skip
    assert report.retained.by_prompt == (1.0, 0.0)
    assert report.retained.value == 0.5 and report.retained.low < 0.5 < report.retained.high
    assert report.concept["mine"].worst == 1.0
    assert report.budgets == {"mine": (7.0, 2.0)}
    assert report.distance is not None and report.distance > 0


def test_frechet_distance():
    from scipy.linalg import sqrtm

    x, y = (torch.randn(40, 3, generator=generator(k), dtype=torch.float64) * (k + 1) + k for k in (0, 1))
    assert au.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    cx, cy = torch.cov(x.T), torch.cov(y.T)
    root: Any = sqrtm((cx @ cy).numpy())
    expected = (x.mean(0) - y.mean(0)).pow(2).sum() + (cx + cy).trace() - 2 * np.trace(root).real
    assert au.frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-8)


def test_generation_is_seeded_and_guided_by_the_models_own_empty_prompt():
    model = toy()
    text = au.condition(model, ["three", "one"]).detach()
    draws = [au.generate(model, text, generator=generator(0), steps=3, guidance=g) for g in (2.0, 2.0, 5.0)]
    assert draws[0].shape == (2, 1, 8, 8)
    assert torch.equal(draws[0], draws[1])
    assert not torch.allclose(draws[0], draws[2])
    whole = au.generate(model, text, generator=generator(0), steps=3, guidance=2.0, batch_size=1)
    assert torch.allclose(whole[0], draws[0][0], atol=1e-4)


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"trainable": "vae"}, "trainable"), ({"lr": 0.0}, "lr"), ({"negative_guidance": -1.0}, "negative_guidance"),
     ({"retain_weight": -0.1}, "retain_weight"), ({"iterations": 0}, "iterations"), ({"warmup": -1}, "warmup"),
     ({"retain_mode": "both"}, "retain_mode"), ({"copies": 0}, "copies")],
)  # fmt: skip
def test_bad_settings(settings, match):
    with pytest.raises(InvalidInput, match=match):
        au.AdvUnlearner(**settings)


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"lr": -1.0}, {"rule": "pgd"}, {"place": "mid"}, {"num_tokens": 0}, {"space": "pixel"}]
)
def test_bad_attacks(settings):
    with pytest.raises(InvalidInput):
        au.Attack(**settings)


def test_bad_runs():
    model, source = toy(), generator()
    for concepts in ([], [""], ["three", "  "]):
        with pytest.raises(InvalidInput, match="concept is empty"):
            QUICK.fit(model, concepts, RETAIN, generator=source)
    with pytest.raises(InvalidInput, match="list of prompts"):
        QUICK.fit(model, "three", RETAIN, generator=source)
    with pytest.raises(InvalidInput, match="'a five'"):
        QUICK.fit(model, ["three"], RETAIN, synonyms=["five"], generator=source)
    with pytest.raises(InvalidInput, match="no retain_prompts"):
        QUICK.fit(model, ["three"], generator=source)
    with pytest.raises(InvalidInput, match="twice"):
        QUICK.fit(model, ["three"], [*RETAIN, RETAIN[0]], generator=source)
    with pytest.raises(InvalidInput, match="batches of 2"):
        QUICK.fit(model, ["three"], RETAIN[:1], generator=source)
    long = "a small image of the large handwritten digit three"
    with pytest.raises(InvalidInput, match="room for 8"):
        replace(QUICK, attack=au.Attack(num_tokens=2)).fit(model, [long], RETAIN, generator=source)
    with pytest.raises(InvalidInput, match="no timesteps"):
        QUICK.fit(replace(model, alphas_bar=torch.zeros(0)), ["three"], RETAIN, generator=source)
    with pytest.raises(Refused, match="no gradient reaches"):
        au.AdvUnlearner(attack=au.Attack(space="condition"))
    with pytest.raises(InvalidInput, match="unconditional"):
        au.esd_loss(model, au.condition(model, ["three"]), replace(pool_of(model).draw(["three"]), without=None))
    with pytest.raises(InvalidInput, match="inference_mode"), torch.inference_mode():
        au.soft_prompt_attack(model, "three", lambda n: None, generator=source)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="latents"):
        au.image_states(model, torch.zeros(2, 3, 8, 8), 4, generator=source)
    known = {"judge": lambda x: x, "concept_class": 0, "generator": source}
    with pytest.raises(InvalidInput, match="places is empty"):
        au.discrete_attacks(model, model, ["three"], places=(), **known)
    with pytest.raises(InvalidInput, match="candidates is empty"):
        au.strongest(model, known["judge"], 0, [], generator=source)
    with pytest.raises(InvalidInput, match="guidance"):
        au.discrete_prompt_attack(model, "three", pool_of(model).draw(["three"]), guidance=-1.0, generator=source)
    broken: Any = replace(model, unet=copy.deepcopy(model.unet))
    with torch.no_grad():
        broken.unet.stem.weight.fill_(torch.nan)
    with pytest.raises(InvalidInput, match="not finite"):
        QUICK.fit(broken, ["three"], RETAIN, generator=source)


# -------------------------------------------------------------------------------------------------- diffusers


def tiny_pipeline(prediction_type="epsilon"):
    """Stable Diffusion's parts at random and as small as they go; the vocabulary splits words into letters."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = {
        token: k
        for k, token in enumerate(
            [*letters, *(f"{c}</w>" for c in letters), "th", "three</w>", "ree</w>", "re", "e</w>e"]
        )
    }
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocab[token] = len(vocab)
    merges = [("t", "h"), ("r", "e")]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)
        config = transformers.CLIPTextConfig(
            vocab_size=len(vocab), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, projection_dim=16, bos_token_id=len(vocab) - 2, eos_token_id=len(vocab) - 1, pad_token_id=len(vocab) - 1,
        )  # fmt: skip
        return diffusers.StableDiffusionPipeline(
            vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8, latent_channels=4),
            text_encoder=transformers.CLIPTextModel(config).eval(),
            tokenizer=tokenizer,
            unet=diffusers.UNet2DConditionModel(
                sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                norm_num_groups=4, attention_head_dim=2,
            ),
            scheduler=diffusers.DDIMScheduler(num_train_timesteps=20, prediction_type=prediction_type, steps_offset=1, clip_sample=False),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(path, safe_serialization=True)
    return path


def test_the_adapter_encodes_as_the_pipeline_does(folder):
    model: Any = au.load_pipeline(folder)
    pipeline = tiny_pipeline()
    ids = model.token_ids(["three", ""])
    assert ids.shape == (2, 16)
    n = prompt_length(ids[0], model.end_id)
    assert n > 1  # one word, several tokens: counting words would cut the concept
    text = au.condition(model, ["three"])
    theirs = pipeline.encode_prompt("three", "cpu", 1, False)[0]
    assert torch.allclose(text, theirs, atol=1e-5)
    assert model.end_id not in model.word_ids
    assert len(model.word_ids) == model.text_encoder.config.vocab_size - 2
    z = torch.randn(2, 4, 8, 8, generator=generator())
    own = model.predict_noise(z, torch.tensor([3, 17]), text.expand(2, -1, -1))
    theirs = pipeline.unet(z, torch.tensor([3, 17]), encoder_hidden_states=text.expand(2, -1, -1)).sample
    assert torch.allclose(own, theirs, atol=1e-5)
    assert model.decode(z).shape[:2] == (2, 3)


def test_velocity_is_turned_into_noise(folder):
    noise = au.load_pipeline(folder)
    velocity = au.StableDiffusion.from_pipeline(tiny_pipeline("v_prediction"))
    z, t = torch.randn(1, 4, 8, 8, generator=generator()), torch.tensor([7])
    text = au.condition(noise, ["one"])
    out, level = noise.predict_noise(z, t, text), noise.alphas_bar[7]
    assert torch.allclose(velocity.predict_noise(z, t, text), level.sqrt() * out + (1 - level).sqrt() * z, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"trainable": "unet"}, {"layers": 1}])
def test_the_same_code_unlearns_in_a_pipeline(folder, settings):
    model = au.load_pipeline(folder)
    before = weights(model.unet, model.text_encoder)
    result = replace(QUICK, **settings).fit(model, ["three"], ["one", "two", "a tower"], generator=generator())
    assert same(before, weights(model.unet, model.text_encoder))
    part = settings.get("trainable", "text_encoder")
    assert not same(weights(getattr(model, part)), weights(getattr(result.model, part)))
    known = {"judge": lambda x: x.flatten(1)[:, :4], "concept_class": 0, "tries": 2, "steps": 2, "guidance": 2.0}
    tokens = au.discrete_attacks(result.model, model, ["three"], queries=8, states=2, generator=generator(), **known)
    soft = au.embedding_attacks(result.model, model, ["three"], au.Attack(steps=2), images=2, generator=generator(), **known)  # fmt: skip
    assert tokens[0].queries == 8 + 3 * 2 and soft[0].queries == 2 * 2 + 3 * 2
    report = au.evaluate_erasure(
        result.model, lambda x: x.flatten(1)[:, :4], 0, prompts=["three"], attacks={"tokens": tokens, "soft": soft}, retained={"one": 1},
        images=2, retained_images=2, steps=2, generator=generator(),
    )  # fmt: skip
    assert set(report.concept) == {"prompts", "tokens", "soft"}


def test_exported_text_encoder_loads_unchanged(folder, tmp_path):
    transformers, diffusers = pytest.importorskip("transformers"), pytest.importorskip("diffusers")
    model = au.load_pipeline(folder)
    result: Any = QUICK.fit(model, ["three"], ["one", "two"], generator=generator())
    path = au.export_text_encoder(result.model, tmp_path / "text_encoder")
    assert {"config.json", "model.safetensors"} <= {f.name for f in path.iterdir()}
    loaded = transformers.CLIPTextModel.from_pretrained(path)
    assert list(loaded.state_dict()) == list(result.model.text_encoder.state_dict())
    assert same(weights(result.model.text_encoder), weights(loaded))
    assert not result.model.text_encoder.get_input_embeddings()._forward_hooks
    whole = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, text_encoder=loaded, local_files_only=True, safety_checker=None
    )
    theirs = whole.encode_prompt("three", "cpu", 1, False)[0]
    assert torch.allclose(theirs, au.condition(result.model, ["three"]), atol=1e-6)
    with pytest.raises(InvalidInput, match="no transformers model"):
        au.export_text_encoder(toy(), tmp_path)


def test_prompts_too_long_for_the_encoder_are_refused(folder):
    model = au.load_pipeline(folder)
    with pytest.raises(InvalidInput, match="the encoder takes 16"):
        model.token_ids(["abcdefghijklmnopqrst"])


def test_pipelines_that_do_not_fit_are_refused(folder, tmp_path):
    pipeline = tiny_pipeline()

    class Two:
        components = {**pipeline.components, "text_encoder_2": pipeline.text_encoder}  # noqa: RUF012

    with pytest.raises(Refused, match="two text encoders"):
        au.StableDiffusion.from_pipeline(Two())  # type: ignore[arg-type]
    (tmp_path / "model_index.json").write_text(json.dumps({"text_encoder_2": ["transformers", "CLIPTextModel"]}))
    with pytest.raises(Refused, match="two text encoders"):
        au.load_pipeline(tmp_path)
    with pytest.raises(InvalidInput, match=r"model_index\.json"):
        au.load_pipeline(tmp_path / "nowhere")
    pipeline.scheduler.alphas_cumprod = None
    with pytest.raises(InvalidInput, match="no timesteps"):
        au.StableDiffusion.from_pipeline(pipeline)
    with pytest.raises(InvalidInput, match="prediction_type"):
        au.StableDiffusion.from_pipeline(tiny_pipeline("sample"))


def test_absent_diffusers_is_named(tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(MissingExtra, match="diffusion"):
        au.load_pipeline(tmp_path)
