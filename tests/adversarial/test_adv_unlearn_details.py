"""Adversarial unlearning, where a plausible slip would go unseen: what the loop asks of its losses and attacks, step by step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surefoot.adversarial import adv_unlearn as au
from surefoot.adversarial.adv_unlearn import attacks, unlearn
from surefoot.models.toy_diffusion import ToyDiffusion, ToyTextEncoder, ToyUNet
from surefoot.nn.diffusion import cosine_alphas_bar

RETAIN = ["a one", "the digit 2", "a five", "handwritten 9", "6"]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Dropping(ToyTextEncoder):
    """With dropout, which must be off whatever mode the encoder came in."""

    def forward(self, embeds: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(embeds), 0.5, self.training)


def toy() -> ToyDiffusion:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ToyDiffusion(ToyUNet(8).eval(), Dropping().train(), alphas_bar=cosine_alphas_bar(20))
        with torch.no_grad():
            unet: Any = model.unet
            for module in (*unet.read_low, unet.read_high):
                module.out.weight.mul_(5)
    return model


class Watch:
    """The loop's parts, wrapped so that each call is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.erase: list[tuple[Any, Tensor, float]] = []
        self.retain: list[tuple[Any, Tensor, Any]] = []
        self.attack: list[tuple[Any, str, Tensor | None, au.AdversarialPrompt]] = []
        self.steps: list[float] = []
        esd, kept, soft, step = unlearn.esd_loss, unlearn.retain_loss, unlearn.soft_prompt_attack, au.AdvUnlearner._step

        def esd_loss(model: Any, text: Tensor, states: Any, *, negative_guidance: float) -> Tensor:
            assert not model.text_encoder.training
            self.erase.append((model, text.detach(), negative_guidance))
            return esd(model, text, states, negative_guidance=negative_guidance)

        def retain_loss(model: Any, text: Tensor, states: Any) -> Tensor:
            self.retain.append((model, text.detach(), states))
            return kept(model, text, states)

        def soft_prompt_attack(model: Any, prompt: str, draw: Any, attack: Any, *, generator: Any, start: Any) -> Any:
            found = soft(model, prompt, draw, attack, generator=generator, start=start)
            self.attack.append((model, prompt, start, found))
            return found

        def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
            self.steps.append(float(loss.detach()))
            step(optimizer, loss)

        monkeypatch.setattr(unlearn, "esd_loss", esd_loss)
        monkeypatch.setattr(unlearn, "retain_loss", retain_loss)
        monkeypatch.setattr(unlearn, "soft_prompt_attack", soft_prompt_attack)
        monkeypatch.setattr(au.AdvUnlearner, "_step", staticmethod(_step))


def learner(**settings: Any) -> au.AdvUnlearner:
    attack = au.Attack(steps=2, lr=1e-2, init=settings.pop("init", "random"))
    settings = {"lr": 1e-9, **settings}
    return au.AdvUnlearner(
        iterations=5, warmup=2, retain_batch=2, ddim_steps=4, copies=2, reuse=3, attack=attack, retain_weight=0.3,
        negative_guidance=1.7, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("init", ["random", "latest"])
def test_the_loop_step_by_step(init, monkeypatch):
    """lr is so small that the model stays as it was, and every text state can be made again."""
    model, watch = toy(), Watch(monkeypatch)
    result = learner(init=init).fit(model, ["a three"], RETAIN, synonyms=["3"], generator=rng(1))
    trained = copy.copy(result.model)
    assert model.text_encoder.training and trained.text_encoder.training  # as they came
    trained.text_encoder.eval()
    plain = au.condition(trained, ["a three"])
    assert [guidance for _, _, guidance in watch.erase] == [1.7] * 5
    for step, (of, text, _) in enumerate(watch.erase):
        assert of.text_encoder is trained.text_encoder
        expected = plain if step < 2 else watch.attack[step - 2][3].condition(trained)
        assert torch.allclose(text, expected, atol=1e-4)
    assert not torch.allclose(watch.erase[2][1], plain, atol=1e-3)
    assert len(watch.attack) == 3
    for number, (of, prompt, start, _) in enumerate(watch.attack):
        assert of.text_encoder is trained.text_encoder and prompt == "a three"  # the model under training is attacked
        if init == "latest" and number > 0:
            assert start is not None and torch.equal(start, watch.attack[number - 1][3].rows)
        else:
            assert start is None
    model.text_encoder.eval()
    for of, text, states in watch.retain:  # the original's predictions for the retain prompts, at their own states
        assert of.text_encoder is trained.text_encoder and len(states) == 2
        rows = au.condition(model, RETAIN)
        names = [int((rows - row).abs().amax((1, 2)).argmin()) for row in text]
        assert len(set(names)) == 2
        with torch.no_grad():
            given = model.predict_noise(states.z, states.t, rows[names])
        assert torch.allclose(states.given, given, atol=1e-4)


def test_erasing_and_retaining_are_one_weighted_loss(monkeypatch):
    watch = Watch(monkeypatch)
    report = learner(lr=1e-2).fit(toy(), ["a three"], RETAIN, generator=rng(1)).report
    assert min(report.retain[1:]) > 1e-3 * max(report.erase)  # the first is zero: nothing has moved
    assert watch.steps == pytest.approx([e + 0.3 * r for e, r in zip(report.erase, report.retain)], rel=1e-6)


def test_in_iter_mode_erasing_and_retaining_take_turns_unweighted(monkeypatch):
    watch = Watch(monkeypatch)
    report = learner(retain_mode="iter", lr=1e-2).fit(toy(), ["a three"], RETAIN, generator=rng(1)).report
    assert min(report.retain) > 1e-3 * max(report.erase)
    assert watch.steps == pytest.approx(
        [value for pair in zip(report.erase, report.retain) for value in pair], rel=1e-6
    )


def test_synonyms_are_forbidden_in_retain_prompts_like_the_concept_itself():
    for words in (["five"], ["2", "nine", "9"]):
        with pytest.raises(ValueError, match="retain_prompts name"):
            learner().fit(toy(), ["a three"], RETAIN, synonyms=words, generator=rng(1))


def test_signed_steps_are_signed_at_every_step():
    """Adam on signs and Adam on gradients part after the first step."""
    original: Any = toy()
    model: Any = toy()
    for m in (original, model):
        m.text_encoder.eval()
    with torch.no_grad():
        for p in model.text_encoder.layers.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng(2)))
    pool = au.TrajectoryPool(original, original, steps=4, copies=2, reuse=99, guidance=3.0, generator=rng(3))
    feed = [pool.draw(["three"], 2) for _ in range(3)]
    start = model.embed_tokens(torch.tensor([5])).detach()
    for rule in ("adam", "sign"):
        states = iter(feed)
        found = attacks.soft_prompt_attack(
            model, "three", lambda n, s=states: next(s), au.Attack(steps=3, lr=1e-2, rule=rule), generator=rng(), start=start
        )  # fmt: skip
        rows = start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([rows], lr=1e-2)
        for part in feed:
            loss = au.prompt_loss(model, au.AdversarialPrompt("three", rows).condition(model), part)
            (slope,) = torch.autograd.grad(loss, rows)
            rows.grad = slope.sign() if rule == "sign" else slope
            optimizer.step()
        assert torch.allclose(found.rows, rows.detach(), atol=1e-5)
        assert found.losses[-1] < found.losses[0] or rule == "sign"
