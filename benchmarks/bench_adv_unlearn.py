"""What adversarial unlearning adds: a prompt attack beside a training step, and batched searches beside loops over candidates and states.

An untrained toy model (8x8 digits, forty words): time does not hang on weights. In the first rows `peer` is one training step of the denoiser on as
many states, so that the ratio says how many plain steps an attack costs: the fast one takes one signed step, the published standard one thirty.
Steps of unlearning with each stand beside plain erasing (ESD, no attack). The token search has a true peer: the same greedy search that scores its
candidates one after the other. So has the attack on embeddings: one state after the other, gradients added up.
Both sides run in turn on one thread (`_timing.py`).

Run: python benchmarks/bench_adv_unlearn.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from _timing import Row, memory_mb, row, timed
from surefoot.adversarial.adv_unlearn import (
    FAST,
    AdversarialPrompt,
    AdvUnlearner,
    Attack,
    States,
    attacks,
    condition,
    discrete_prompt_attack,
    image_states,
    prompt_loss,
    soft_prompt_attack,
)
from surefoot.models import seeded_build
from surefoot.models.toy_diffusion import ToyDiffusion, ToyTextEncoder, ToyUNet

BATCH, PROMPT = 4, "a three"
RETAIN = ["", "a one", "a seven", "a nine"]


def source() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def toy() -> ToyDiffusion:
    unet, encoder = (seeded_build(build, source()) for build in (ToyUNet, ToyTextEncoder))
    assert isinstance(unet, ToyUNet) and isinstance(encoder, ToyTextEncoder)
    return ToyDiffusion(unet.eval(), encoder.eval())


def some_states(model: ToyDiffusion, n: int) -> States:
    latents = 2 * torch.rand(n, *model.latent_shape, generator=source()) - 1
    return image_states(model, latents, n, generator=source())


def denoiser_step(model: ToyDiffusion, states: States) -> Callable[[], float]:
    """Plain training on noise prediction; the weights barely move."""
    parameters = list(model.unet.parameters())
    optimizer = torch.optim.Adam(parameters, 1e-8)
    text = condition(model, [PROMPT]).detach().expand(len(states), -1, -1)

    def step() -> float:
        loss = F.mse_loss(model.predict_noise(states.z, states.t, text), states.given)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def attack_rows(model: ToyDiffusion) -> list[Row]:
    states, found = some_states(model, BATCH), []
    for name, attack in (("fast", FAST), ("standard", Attack())):
        settings = Attack(**{**vars(attack), "batch": BATCH})
        search = partial(soft_prompt_attack, model, PROMPT, lambda _: states, settings)
        plain = denoiser_step(model, states)

        def attacked(search: partial[Any] = search) -> Any:
            return search(generator=source())

        (ours, result), (theirs, _) = timed(attacked, plain)
        what = f"{name} attack, {settings.steps} step{'s'[: settings.steps > 1]}, {BATCH} states"
        note = f"{ours / theirs:.1f} training steps; loss {result.losses[0]:.3f} to {result.losses[-1]:.3f}"
        found.append(row(what, ours, "one denoiser training step", theirs, note, ours_mb=memory_mb(attacked), peer_mb=memory_mb(plain)))  # fmt: skip
    return found


def unlearning_rows(model: ToyDiffusion) -> list[Row]:
    def learn(attack: Attack | None) -> Callable[[], Any]:
        learner = AdvUnlearner(
            iterations=5, warmup=0, batch=BATCH, retain_batch=BATCH, ddim_steps=4, copies=4, attack=attack
        )
        return lambda: learner.fit(model, [PROMPT], RETAIN, synonyms=["3"], generator=source())

    (plain, erased), (fast, quick), (standard, slow) = timed(learn(None), learn(FAST), learn(Attack()))
    memory = [memory_mb(learn(attack)) for attack in (None, FAST, Attack())]
    passes = f"U-Net passes {{}} | {erased.report.unet_passes}, recording included"
    return [
        row("5 unlearning steps, fast attack", fast, "erasing without attack", plain, passes.format(quick.report.unet_passes), ours_mb=memory[1], peer_mb=memory[0]),
        row("5 unlearning steps, standard attack", standard, "erasing without attack", plain, passes.format(slow.report.unet_passes), ours_mb=memory[2], peer_mb=memory[0]),
    ]  # fmt: skip


def token_search(model: ToyDiffusion) -> Row:
    """Candidates in one batch beside a loop over them, within the same search."""
    states, batched = some_states(model, 4), attacks._losses

    def in_turn(model, ids, trials: Tensor, n, place, states, guidance, empty) -> Tensor:
        scored = [batched(model, ids, trials[k : k + 1], n, place, states, guidance, empty) for k in range(len(trials))]
        return torch.cat(scored)

    def search() -> AdversarialPrompt:
        return discrete_prompt_attack(model, PROMPT, states, queries=65, generator=source())

    def loop() -> AdversarialPrompt:
        with mock.patch.object(attacks, "_losses", in_turn):
            return search()

    (ours, found), (theirs, other) = timed(search, loop)
    quality = f"words {found.text!r} | {other.text!r}, loss {found.losses[-1]:.5f} | {other.losses[-1]:.5f}"
    return row("token search, 65 losses on 4 states", ours, "one candidate after another", theirs, quality, ours_mb=memory_mb(search), peer_mb=memory_mb(loop))  # fmt: skip


def embedding_search(model: ToyDiffusion) -> Row:
    """16 states in one pass beside a loop over states, five steps of Adam each."""
    count, steps = 16, 5
    states = some_states(model, count)
    settings = Attack(steps=steps, lr=3e-2, batch=count)
    start = model.embed_tokens(model.word_ids[:1]).detach()

    def search() -> Tensor:
        return soft_prompt_attack(model, PROMPT, lambda n: states, settings, generator=source(), start=start).rows

    def loop() -> Tensor:
        rows = start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([rows], lr=settings.lr)
        for _ in range(steps):
            rows.grad = torch.zeros_like(rows)
            for k in range(count):
                one = States(states.z[k : k + 1], states.t[k : k + 1], states.given[k : k + 1])
                text = AdversarialPrompt(PROMPT, rows).condition(model)
                rows.grad += torch.autograd.grad(prompt_loss(model, text, one) / count, rows)[0]
            optimizer.step()
        return rows.detach()

    (ours, found), (theirs, other) = timed(search, loop)
    gap = (found - other).abs().max().item()
    return row(f"embedding attack, {steps} steps on {count} states", ours, "one state after another", theirs, f"rows differ by at most {gap:.1e}", ours_mb=memory_mb(search), peer_mb=memory_mb(loop))  # fmt: skip


def rows() -> list[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = toy()
        return [*attack_rows(model), *unlearning_rows(model), token_search(model), embedding_search(model)]
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    for entry in rows():
        print(entry)
