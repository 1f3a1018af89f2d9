"""Whether the concept is gone: plain prompts, paraphrases and attacks, each judged on fresh images; and what other prompts still draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surefoot.adversarial.adv_unlearn.attacks import (
    AdversarialPrompt,
    Attack,
    discrete_prompt_attack,
    soft_prompt_attack,
)
from surefoot.adversarial.adv_unlearn.backend import TextToImage, condition, frozen, generate, sample_latents
from surefoot.adversarial.adv_unlearn.states import image_states
from surefoot.core.statistics import wilson_interval
from surefoot.errors import check, check_at_least

Judge = Callable[[Tensor], Tensor]  # images [B, C, H, W] in [0, 1] -> logits [B, K]


@dataclass(frozen=True)
class Rate:
    """A share of generated images, with Wilson's interval (images of one prompt count as independent), and the share prompt by prompt."""

    value: float
    low: float
    high: float
    n: int
    by_prompt: tuple[float, ...]

    @property
    def worst(self) -> float:
        """The highest share of any one prompt: what an attacker with that many tries gets."""
        return max(self.by_prompt)


@dataclass(frozen=True)
class ErasureReport:
    """`concept[name]`: how often the judge sees the concept (names: "prompts", "paraphrases" and those of the attacks).

    `retained`: how often other prompts draw what they say. `distance`: Fréchet distance of the retained images' features from the
    reference's, if one was given. `budgets[name]`: mean (queries, gradients) of an attack. No number here is a guarantee.
    """

    concept: Mapping[str, Rate]
    retained: Rate
    budgets: Mapping[str, tuple[float, float]]
    distance: float | None = None


def evaluate_erasure(
    model: TextToImage,
    judge: Judge,
    concept_class: int,
    *,
    prompts: Sequence[str],
    paraphrases: Sequence[str] = (),
    attacks: Mapping[str, Sequence[AdversarialPrompt]] = {},
    retained: Mapping[str, int],
    images: int = 20,
    retained_images: int = 10,
    steps: int = 50,
    guidance: float = 7.5,
    reference: Tensor | None = None,  # [M, C, H, W]
    features: Callable[[Tensor], Tensor] | None = None,  # images -> [B, F]
    generator: torch.Generator,
) -> ErasureReport:
    """Draw `images` for each prompt and attack with noise that no search has seen, and let `judge` say what they show.

    `retained` maps prompts to the classes they ask for. Searches run before: `discrete_attacks`, `embedding_attacks`, or your own.
    """
    check(len(prompts) > 0, "prompts is empty; give the prompts that name the concept.")
    check(len(retained) > 0, "retained is empty; without it nobody sees what the erasure cost.")
    check_at_least("images", images, 1)
    check_at_least("retained_images", retained_images, 1)
    check((reference is None) == (features is None), "reference and features go together; give both or neither.")

    def draw(text: Tensor, each: int) -> Tensor:
        return generate(model, text.repeat_interleave(each, 0), generator=generator, steps=steps, guidance=guidance)

    def seen(text: Tensor) -> Rate:
        found = _judged(judge, draw(text, images)) == concept_class
        return _rate(found.view(len(text), images))

    with torch.no_grad(), frozen(model.text_encoder):
        texts = {"prompts": condition(model, prompts)}
        if paraphrases:
            texts["paraphrases"] = condition(model, paraphrases)
        texts |= {name: torch.cat([found.condition(model) for found in list_]) for name, list_ in attacks.items()}
        kept = condition(model, list(retained))
    concept = {name: seen(text) for name, text in texts.items()}
    pictures = draw(kept, retained_images)
    wanted = torch.tensor(list(retained.values()), device=pictures.device).repeat_interleave(retained_images)
    right = _rate((_judged(judge, pictures) == wanted).view(len(retained), -1))
    distance = None
    if reference is not None and features is not None:
        with torch.no_grad():
            distance = frechet_distance(features(pictures), features(reference.to(pictures)))
    return ErasureReport(concept, right, {name: _budget(list_) for name, list_ in attacks.items()}, distance)


@torch.no_grad()
def _judged(judge: Judge, images: Tensor) -> Tensor:  # int64 [B]
    if isinstance(judge, nn.Module):
        with frozen(judge):
            logits = judge(images)
    else:
        logits = judge(images)
    check(
        logits.dim() == 2 and len(logits) == len(images),
        f"The judge must give logits [B, K], got {tuple(logits.shape)}.",
    )
    return logits.argmax(1)


def _rate(found: Tensor) -> Rate:  # bool [prompts, images]
    hits, n = int(found.sum()), found.numel()
    interval = wilson_interval(hits, n)
    low, high = interval[-2:]
    return Rate(hits / n, float(low), float(high), n, tuple(found.double().mean(1).tolist()))


def _budget(found: Sequence[AdversarialPrompt]) -> tuple[float, float]:
    return (sum(a.queries for a in found) / len(found), sum(a.gradients for a in found) / len(found))


def embedding_attacks(
    model: TextToImage,
    original: TextToImage,
    prompts: Sequence[str],
    attack: Attack = Attack(steps=60, lr=1e-2, num_tokens=3, batch=8),  # noqa: B008  frozen
    *,
    images: int = 32,
    steps: int = 50,
    guidance: float = 7.5,
    generator: torch.Generator,
) -> list[AdversarialPrompt]:
    """For each prompt, embeddings inverted from images that `original` draws: another loss than training's, which matches predictions on trajectories."""
    found = []
    for prompt in prompts:
        pictures = _pictures(original, prompt, images, steps, guidance, generator)
        found.append(
            soft_prompt_attack(
                model,
                prompt,
                lambda n, p=pictures: _fresh_states(original, p, n, generator),
                attack,
                generator=generator,
            )
        )
    return found


def discrete_attacks(
    model: TextToImage,
    original: TextToImage,
    prompts: Sequence[str],
    *,
    num_tokens: int = 3,
    queries: int = 200,
    states: int = 16,
    steps: int = 50,
    guidance: float = 7.5,
    generator: torch.Generator,
) -> list[AdversarialPrompt]:
    """For each prompt, real tokens searched on noisy versions of images that `original` draws of it."""
    found = []
    for prompt in prompts:
        pictures = _pictures(original, prompt, states, steps, guidance, generator)
        fixed = image_states(original, pictures, states, generator=generator)
        found.append(
            discrete_prompt_attack(model, prompt, fixed, num_tokens=num_tokens, queries=queries, generator=generator)
        )
    return found


def _pictures(
    original: TextToImage, prompt: str, n: int, steps: int, guidance: float, generator: torch.Generator
) -> Tensor:
    with torch.no_grad(), frozen(original.text_encoder):
        text = condition(original, [prompt])
    return sample_latents(original, text.expand(n, -1, -1), generator=generator, steps=steps, guidance=guidance)


def _fresh_states(model: TextToImage, pictures: Tensor, n: int, generator: torch.Generator):
    pick = torch.randint(len(pictures), (n,), generator=generator, device=generator.device).to(pictures.device)
    return image_states(model, pictures[pick], n, generator=generator)


def frechet_distance(
    x: Tensor,  # [N, F]
    y: Tensor,  # [M, F]
) -> float:
    """|mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x^1/2 C_y C_x^1/2)^1/2): Fréchet distance of Gaussians fitted to two sets of features."""
    check(
        x.dim() == y.dim() == 2 and x.shape[1] == y.shape[1],
        f"Features must be [N, F] and [M, F], got {tuple(x.shape)} and {tuple(y.shape)}.",
    )
    check(min(len(x), len(y)) > 1, "A covariance needs at least two rows of features.")
    x, y = x.double(), y.double()
    cx, cy = torch.cov(x.T).reshape(x.shape[1], -1), torch.cov(y.T).reshape(y.shape[1], -1)
    values, vectors = torch.linalg.eigh(cx)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cy @ root).clamp(min=0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).pow(2).sum() + cx.trace() + cy.trace() - 2 * cross)
