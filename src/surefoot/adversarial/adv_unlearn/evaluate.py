"""Whether the concept is gone: plain prompts, paraphrases and attacks, each judged on fresh images; and what other prompts still draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from surefoot.adversarial.adv_unlearn.attacks import (
    AdversarialPrompt,
    Attack,
    discrete_prompt_attack,
    plain_prompt,
    soft_prompt_attack,
)
from surefoot.adversarial.adv_unlearn.backend import TextToImage, condition, frozen, generate, sample_latents
from surefoot.adversarial.adv_unlearn.states import States, TrajectoryPool, guided_states, image_states
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


@torch.no_grad()
def strongest(
    model: TextToImage,
    judge: Judge,
    concept_class: int,
    candidates: Sequence[AdversarialPrompt],
    *,
    images: int = 8,
    steps: int = 50,
    guidance: float = 7.5,
    generator: torch.Generator,
) -> AdversarialPrompt:
    """The candidate whose images the judge takes for the concept most often, the first of equals; all are drawn from the same noise.

    It carries the queries and gradients of all candidates, and a query more for each image drawn.
    """
    check(len(candidates) > 0, "candidates is empty; give the plain prompt at least.")
    check_at_least("images", images, 1)
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    rates = []
    with frozen(model.text_encoder):
        for found in candidates:
            same = torch.Generator(generator.device).manual_seed(seed)
            text = found.condition(model).expand(images, -1, -1)
            pictures = generate(model, text, generator=same, steps=steps, guidance=guidance)
            rates.append(float((_judged(judge, pictures) == concept_class).double().mean()))
    return replace(
        candidates[rates.index(max(rates))],
        queries=sum(found.queries for found in candidates) + images * len(candidates),
        gradients=sum(found.gradients for found in candidates),
    )


def embedding_attacks(
    model: TextToImage,
    original: TextToImage,
    prompts: Sequence[str],
    attack: Attack = Attack(steps=60, lr=1e-2, num_tokens=3, batch=8),  # noqa: B008  frozen
    *,
    judge: Judge,
    concept_class: int,
    images: int = 32,
    tries: int = 8,
    steps: int = 50,
    guidance: float = 7.5,
    generator: torch.Generator,
) -> list[AdversarialPrompt]:
    """For each prompt, the strongest (`strongest`, `tries` images) of the plain prompt and two searches with losses other than training's.

    One inverts `images` images that `original` draws, the other makes `model` follow the guided trajectories of `original`.
    """
    found = []
    draw = {"steps": steps, "guidance": guidance, "generator": generator}
    pool = TrajectoryPool(original, original, copies=images, reuse=attack.steps * attack.batch, **draw)
    for prompt in prompts:
        pictures = _pictures(original, prompt, images, steps, guidance, generator)
        inverted = soft_prompt_attack(
            model, prompt, lambda n, p=pictures: _fresh_states(original, p, n, generator), attack, generator=generator
        )
        followed = soft_prompt_attack(
            model, prompt, lambda n, c=prompt: guided_states(pool, c, n), attack, guidance=guidance, generator=generator
        )
        candidates = [plain_prompt(model, prompt), inverted, followed]
        found.append(strongest(model, judge, concept_class, candidates, images=tries, **draw))
    return found


def discrete_attacks(
    model: TextToImage,
    original: TextToImage,
    prompts: Sequence[str],
    *,
    judge: Judge,
    concept_class: int,
    places: Sequence[Literal["prefix", "suffix", "replace"]] = ("prefix", "replace"),
    num_tokens: int = 3,
    queries: int = 200,
    states: int = 16,
    tries: int = 8,
    steps: int = 50,
    guidance: float = 7.5,
    generator: torch.Generator,
) -> list[AdversarialPrompt]:
    """For each prompt, the strongest (`strongest`, `tries` images) of the plain prompt and a search for real tokens at each place.

    "prefix" puts tokens before the prompt (as UnlearnDiffAtk does), "replace" in its place (as P4D); they share `queries` losses. They make `model` follow
    the guided trajectories of `original`, e_0('') + w (e_0(c) - e_0('')) with the sampler's w. Under `original` itself the plain prompt has loss zero.
    """
    check(len(places) > 0, "places is empty; name where tokens may go.")
    check_at_least("queries", queries, len(places))
    found = []
    draw = {"steps": steps, "guidance": guidance, "generator": generator}
    pool = TrajectoryPool(original, original, copies=states, reuse=states, **draw)
    for prompt in prompts:
        fixed = guided_states(pool, prompt, states)
        candidates = [plain_prompt(model, prompt)]
        for place in places:
            searched = discrete_prompt_attack(
                model, prompt, fixed, num_tokens=num_tokens, queries=queries // len(places), place=place, guidance=guidance, generator=generator
            )  # fmt: skip
            candidates.append(searched)
        found.append(strongest(model, judge, concept_class, candidates, images=tries, **draw))
    return found


def _pictures(
    original: TextToImage, prompt: str, n: int, steps: int, guidance: float, generator: torch.Generator
) -> Tensor:
    with torch.no_grad(), frozen(original.text_encoder):
        text = condition(original, [prompt])
    return sample_latents(original, text.expand(n, -1, -1), generator=generator, steps=steps, guidance=guidance)


def _fresh_states(model: TextToImage, pictures: Tensor, n: int, generator: torch.Generator) -> States:
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
