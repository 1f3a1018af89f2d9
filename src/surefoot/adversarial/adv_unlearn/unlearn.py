"""The losses, and the loop that erases a concept against an attacker."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.adversarial.adv_unlearn.attacks import AdversarialPrompt, Attack, soft_prompt_attack
from surefoot.adversarial.adv_unlearn.backend import (
    TextToImage,
    Trainable,
    condition,
    frozen,
    trainable_parameters,
    with_copy,
)
from surefoot.adversarial.adv_unlearn.prompts import RetainPrompts, prompt_length
from surefoot.adversarial.adv_unlearn.states import States, TrajectoryPool
from surefoot.errors import (
    InvalidInput,
    Refused,
    check,
    check_at_least,
    check_choice,
    check_non_negative,
    check_positive,
)

M = TypeVar("M", bound=TextToImage)


def esd_loss(
    model: TextToImage,
    text: Tensor,  # [1, L, E] text states of the prompt under erasure, with gradient
    states: States,  # on the concept's trajectories
    *,
    negative_guidance: float = 1.0,
) -> Tensor:  # scalar
    """|| e_theta(z, t, c) - [e_0('') - eta (e_0(c*) - e_0(''))] ||^2, mean; eta = 0 aims at the unconditional prediction."""
    if states.without is None:
        raise InvalidInput("The states carry no unconditional prediction; take them from a TrajectoryPool.")
    target = states.without - negative_guidance * (states.given - states.without)
    predicted = model.predict_noise(states.z, states.t, text.expand(len(states), -1, -1))
    return F.mse_loss(predicted.float(), target.float())


def retain_loss(
    model: TextToImage,
    text: Tensor,  # [N, L, E] text states of the retain prompts
    states: States,  # N, in the same order
) -> Tensor:  # scalar
    """|| e_theta(z, t, c_r) - e_0(z, t, c_r) ||^2, mean."""
    return F.mse_loss(model.predict_noise(states.z, states.t, text).float(), states.given.float())


@dataclass(frozen=True)
class UnlearnReport:
    """What a run did. `unet_passes` counts U-Net evaluations of single latents, recording and attacks included."""

    erase: tuple[float, ...] = field(repr=False)  # l_ESD, step by step
    retain: tuple[float, ...] = field(repr=False)  # empty without retain prompts
    attacks: tuple[tuple[float, float], ...] = field(repr=False)  # first and last loss of each attack
    seconds: float
    unet_passes: int
    trained_parameters: int


@dataclass(frozen=True)
class Unlearned(Generic[M]):
    """`model` shares everything with the one given but the part that was trained."""

    model: M
    report: UnlearnReport


@dataclass(frozen=True)
class AdvUnlearner:
    """Settings of adversarial unlearning, as published for Stable Diffusion 1.4 (batch, pool and DDIM steps are about speed only).

    `attack=None` is ESD, with or without retain prompts; `attack=FAST` the cheap variant. `retain_mode="iter"` takes a separate optimizer step
    on the retain loss, unweighted, after each erasing step. `copies` and `reuse` are those of `TrajectoryPool`; `retain_weight` 0 needs no prompts.
    """

    trainable: Trainable = "text_encoder"
    layers: int | None = None  # first blocks of the text encoder; None: all, and the final norm
    lr: float = 1e-5
    iterations: int = 1000
    warmup: int = 200
    negative_guidance: float = 1.0
    start_guidance: float = 3.0
    retain_weight: float = 0.3
    retain_batch: int = 5
    retain_mode: Literal["reg", "iter"] = "reg"
    attack: Attack | None = field(default_factory=Attack)
    attack_every: int = 1
    batch: int = 1
    ddim_steps: int = 50
    copies: int = 16
    reuse: int = 50

    def __post_init__(self) -> None:
        check_choice("trainable", self.trainable, ("text_encoder", "unet"))
        check_choice("retain_mode", self.retain_mode, ("reg", "iter"))
        check_positive("lr", self.lr)
        for name in ("negative_guidance", "start_guidance", "retain_weight"):
            check_non_negative(name, getattr(self, name))
        for name in ("iterations", "retain_batch", "attack_every", "batch", "ddim_steps", "copies", "reuse"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("warmup", self.warmup, 0)
        if self.trainable == "text_encoder" and self.attack is not None and self.attack.space == "condition":
            raise Refused(
                "An attack behind the text encoder cannot train it: no gradient reaches it; use Attack(space='word')."
            )

    def fit(
        self,
        model: M,
        concepts: Sequence[str],
        retain_prompts: Sequence[str] = (),
        *,
        synonyms: Sequence[str] = (),
        generator: torch.Generator,
    ) -> Unlearned[M]:
        """Erase `concepts` (prompts, one drawn at each step); `model` itself stays as it is.

        `synonyms` are further words that no retain prompt may contain. Raises `InvalidInput` for an empty concept, retain prompts
        that name a concept (they are listed), prompts too long for the inserted tokens, a retain weight without prompts.
        """
        start = time.perf_counter()
        retain = self._check(model, concepts, retain_prompts, synonyms, generator)
        trained = with_copy(model, self.trainable)
        module = getattr(trained, self.trainable)
        erase: list[float] = []
        kept: list[float] = []
        attacks: list[tuple[float, float]] = []
        with (
            frozen(model.unet, model.text_encoder),
            frozen(module),
            counting({model.unet, trained.unet}) as passes,
            torch.enable_grad(),
        ):
            parameters = trainable_parameters(module, self.trainable, self.layers)
            for parameter in parameters:
                parameter.requires_grad_(True)
            self._loop(model, trained, list(concepts), retain, parameters, generator, (erase, kept, attacks))
        for parameter in parameters:
            parameter.grad = None
        size = sum(parameter.numel() for parameter in parameters)
        report = UnlearnReport(tuple(erase), tuple(kept), tuple(attacks), time.perf_counter() - start, passes[0], size)
        return Unlearned(trained, report)

    def _check(
        self,
        model: TextToImage,
        concepts: Sequence[str],
        prompts: Sequence[str],
        synonyms: Sequence[str],
        generator: torch.Generator,
    ) -> RetainPrompts | None:
        check(not isinstance(concepts, str), "concepts is a list of prompts; put the one prompt into a list.")
        check(len(concepts) > 0 and all(c.strip() for c in concepts), "A concept is empty; name what to erase.")
        check(model.alphas_bar.numel() > 0, "The model's schedule has no timesteps.")
        for concept in concepts:
            ids = model.token_ids([concept])
            extra = 0 if self.attack is None or self.attack.place in ("add", "replace") else self.attack.num_tokens
            n, room = prompt_length(ids, model.end_id), ids.shape[1] - 2 - extra
            check(
                n <= room,
                f"The concept {concept!r} has {n} tokens, and with {extra} adversarial ones there is room for {room}.",
            )
        if self.retain_weight == 0:
            return None
        check(
            len(prompts) > 0,
            "retain_weight is positive, and there are no retain_prompts; give some, or retain_weight=0.",
        )
        model.token_ids(list(prompts))  # too long a prompt fails here, not in the middle of a run
        return RetainPrompts(prompts, [*concepts, *synonyms], self.retain_batch, generator)

    def _loop(
        self,
        original: TextToImage,
        trained: TextToImage,
        concepts: list[str],
        retain: RetainPrompts | None,
        parameters: list[nn.Parameter],
        generator: torch.Generator,
        records: tuple[list[float], list[float], list[tuple[float, float]]],
    ) -> None:
        erase, kept, attacks = records
        optimizer = torch.optim.Adam(parameters, lr=self.lr)
        pool = self._pool(trained, original, self.copies, generator)
        retain_pool = self._pool(trained, original, 1, generator)
        latest: dict[str, AdversarialPrompt] = {}

        def retained() -> Tensor:
            assert retain is not None
            prompts = retain.draw()
            loss = retain_loss(trained, condition(trained, prompts), retain_pool.draw(prompts))
            kept.append(float(loss.detach()))
            return loss

        for step in range(self.iterations):
            concept = concepts[int(torch.randint(len(concepts), (), generator=generator, device=generator.device))]
            if self.attack is not None and step >= self.warmup:
                if concept not in latest or (step - self.warmup) % self.attack_every == 0:
                    latest[concept] = self._searched(
                        trained, concept, pool, self.attack, latest.get(concept), generator
                    )
                    attacks.append((latest[concept].losses[0], latest[concept].losses[-1]))
                text = latest[concept].condition(trained)
            else:
                text = condition(trained, [concept])
            loss = esd_loss(trained, text, pool.draw([concept], self.batch), negative_guidance=self.negative_guidance)
            erase.append(float(loss.detach()))
            if retain is not None and self.retain_mode == "reg":
                loss = loss + self.retain_weight * retained()
            self._step(optimizer, loss)
            if retain is not None and self.retain_mode == "iter":
                self._step(optimizer, retained())

    def _pool(
        self, model: TextToImage, original: TextToImage, copies: int, generator: torch.Generator
    ) -> TrajectoryPool:
        return TrajectoryPool(
            model,
            original,
            steps=self.ddim_steps,
            copies=copies,
            reuse=self.reuse,
            guidance=self.start_guidance,
            generator=generator,
        )

    def _searched(
        self,
        model: TextToImage,
        concept: str,
        pool: TrajectoryPool,
        attack: Attack,
        last: AdversarialPrompt | None,
        generator: torch.Generator,
    ) -> AdversarialPrompt:
        start = last.rows if last is not None and attack.init == "latest" else None
        return soft_prompt_attack(
            model, concept, lambda n: pool.draw([concept], n), attack, generator=generator, start=start
        )

    @staticmethod
    def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise InvalidInput("The unlearning loss is not finite; lower lr, or use float32 or bfloat16 weights.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


@contextmanager
def counting(unets: set[nn.Module]) -> Iterator[list[int]]:
    """Counts the single latents that pass through the U-Nets within the block, in a list of one number."""
    passes = [0]

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        passes[0] += len(inputs[0])

    hooks = [unet.register_forward_pre_hook(count) for unet in unets]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()
