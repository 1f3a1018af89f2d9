"""Noisy states (z_t, t) with what the original model predicts there: drawn from recorded trajectories, or made from images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from surefoot.adversarial.adv_unlearn.backend import TextToImage, condition, frozen, gaussian
from surefoot.errors import check, check_at_least
from surefoot.nn.diffusion import ddim, guided, noised


@dataclass(frozen=True)
class States:
    """N points at which noise predictions are compared; nothing here carries a gradient."""

    z: Tensor  # [N, ...]
    t: Tensor  # int64 [N]
    given: Tensor  # [N, ...] the prediction aimed at: e_0(z, t, c), or the true noise
    without: Tensor | None = None  # [N, ...] e_0(z, t, '')

    def __len__(self) -> int:
        return len(self.z)


@dataclass
class _Recorded:
    z: Tensor  # [copies, S, ...]
    given: Tensor
    without: Tensor
    draws: int = 0
    oldest: int = 0


class TrajectoryPool:
    """Guided DDIM runs of the current U-Net under the original text states, kept with the original's predictions at every level.

    `draw` takes random levels of random runs. After `reuse` draws for a prompt its oldest run is recorded anew, so that noise stays fresh at a small
    share of the price of a run a draw; a U-Net under training is followed the same way. While the U-Nets are one and the same (text-encoder target) the
    predictions fall off the sampling itself. A state's t is the level of its z; nothing is jittered. Memory: copies x steps x 3 latents a prompt.
    """

    def __init__(
        self,
        model: TextToImage,
        original: TextToImage,
        *,
        steps: int,
        copies: int,
        reuse: int,
        guidance: float,
        generator: torch.Generator,
    ) -> None:
        for name, value in (("copies", copies), ("reuse", reuse)):
            check_at_least(name, value, 1)
        self.model, self.original = model, original
        self.steps, self.copies, self.reuse, self.guidance = steps, copies, reuse, guidance
        self.generator = generator
        self.known: dict[str, _Recorded] = {}
        self.times = torch.zeros(steps, dtype=torch.long)

    def draw(self, prompts: Sequence[str], each: int = 1) -> States:
        """`each` states for every prompt, prompt by prompt: N = len(prompts) * each."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        if new:
            parts = [
                part.unflatten(0, (len(new), self.copies))
                for part in self._run([p for p in new for _ in range(self.copies)])
            ]
            for prompt, z, given, without in zip(new, *parts, strict=True):
                self.known[prompt] = _Recorded(z, given, without)
        stale = [p for p in dict.fromkeys(prompts) if self.known[p].draws >= self.reuse]
        if stale:
            for prompt, *fresh in zip(stale, *self._run(stale), strict=True):
                kept = self.known[prompt]
                kept.z[kept.oldest], kept.given[kept.oldest], kept.without[kept.oldest] = fresh
                kept.oldest, kept.draws = (kept.oldest + 1) % self.copies, 0
        picks = [self._pick(prompt, each) for prompt in prompts]
        z, t, given, without = (torch.cat(column) for column in zip(*picks, strict=True))
        return States(z, t, given, without)

    def _pick(self, prompt: str, each: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kept = self.known[prompt]
        kept.draws += each
        place = torch.randint(self.copies * self.steps, (each,), generator=self.generator, device=self.generator.device)
        run, level = (part.to(kept.z.device) for part in (place // self.steps, place % self.steps))
        return kept.z[run, level], self.times[level], kept.given[run, level], kept.without[run, level]

    @torch.no_grad()
    def _run(self, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """z, e_0(c) and e_0('') `[B, S, ...]` of one run a prompt."""
        sampler, original = self.model, self.original
        same = sampler.unet is original.unet
        with frozen(sampler.unet, original.unet, original.text_encoder):
            both = torch.cat([condition(original, [""]).expand(len(prompts), -1, -1), condition(original, prompts)])
            seen: list[tuple[Tensor, Tensor, Tensor]] = []

            def predict(z: Tensor, t: Tensor) -> Tensor:
                twice = z.repeat(2, *[1] * (z.dim() - 1)), t.repeat(2), both
                without, given = sampler.predict_noise(*twice).chunk(2)
                theirs = (without, given) if same else tuple(original.predict_noise(*twice).chunk(2))
                seen.append((z, theirs[1], theirs[0]))
                return guided(without, given, self.guidance)

            start = gaussian((len(prompts), *sampler.latent_shape), sampler, self.generator)
            walk = list(ddim(predict, start, sampler.alphas_bar, steps=self.steps, clip=sampler.clip))
        self.times = torch.tensor([level.t for level in walk], device=start.device)
        z, given, without = (torch.stack(column, 1) for column in zip(*seen, strict=True))
        return z, given, without


def guided_states(
    pool: TrajectoryPool,
    prompt: str,
    n: int,
) -> States:
    """`n` states of the prompt's trajectories, with the guided predictions that the sampler followed there (`pool.guidance`)."""
    drawn = pool.draw([prompt], n)
    assert drawn.without is not None
    return replace(drawn, given=guided(drawn.without, drawn.given, pool.guidance))


def image_states(
    model: TextToImage,
    latents: Tensor,  # [B, ...] clean
    n: int,
    *,
    generator: torch.Generator,
) -> States:
    """`n` noisy versions of given latents, with the noise that was put in: what a prompt must explain to draw these images."""
    check_at_least("n", n, 1)
    check(tuple(latents.shape[1:]) == tuple(model.latent_shape), f"latents must be [B, {', '.join(map(str, model.latent_shape))}], got {tuple(latents.shape)}.")  # fmt: skip
    device = generator.device
    pick = torch.arange(n) % len(latents)
    # evenly over the schedule, so that few states still cover all levels
    spread = (torch.arange(n, device=device) + torch.rand(n, generator=generator, device=device)) / n
    t = (spread * len(model.alphas_bar)).long().clamp(max=len(model.alphas_bar) - 1)
    t = t[torch.randperm(n, generator=generator, device=device)].to(model.device)
    noise = gaussian((n, *model.latent_shape), model, generator)
    return States(noised(latents[pick].to(noise), t, noise, model.alphas_bar), t, noise)
